"""Schedules of an all-to-all: who sends which chunk to whom, in which order.

Pure functions of numbers; nothing here communicates. A *chunk* is what one rank
(its origin) has for another (its target). Four kinds of schedule:

    exchange  2 ranks: one all_gather of the chunk for the peer. Everything gathered
              is either wanted or one's own, so it is an exact all-to-all, and both
              directions of the cable work at once.
    gather    one all_gather of everything, of which a rank keeps its own column.
              One collective with a fixed shape: works on every transport.
    pairwise  send and recv with every other rank in turn.
    relay     send and recv with the two neighbours only; a chunk for a rank at
              distance d is passed on d times, the shorter way around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_ep.comm.capabilities import Capability

Kind = Literal["exchange", "gather", "pairwise", "relay"]
# One size for all chunks, or the size of each: chunk_bytes[origin][target].
ChunkBytes = int | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Transfer:
    """One hop of one chunk: from rank `source` to rank `destination`."""

    source: int
    destination: int
    origin: int
    target: int


@dataclass(frozen=True)
class Round:
    """Transfers in which each rank sends to one peer and receives from one.

    Attributes:
        transfers: the hops. Those between the same two ranks are one message, the
            chunks in the order they have here.
        sends_first: the ranks that send before they receive; the others receive
            first. With blocking operations, ranks that all send first would wait
            for each other for ever.
    """

    transfers: tuple[Transfer, ...]
    sends_first: frozenset[int]


@dataclass(frozen=True)
class Message:
    """What one rank does in one step: send chunks to a peer, or receive them."""

    is_send: bool
    peer: int
    chunks: tuple[tuple[int, int], ...]  # (origin, target) of each, in order


@dataclass(frozen=True)
class Schedule:
    """An all-to-all as rounds of transfers.

    The rounds of the kinds "exchange" and "gather" say what their one collective
    moves (around a ring, as MLX gathers); they are not executed one by one.
    """

    kind: Kind
    num_ranks: int
    rounds: tuple[Round, ...]

    @property
    def is_collective(self) -> bool:
        """Whether one collective does it all, without a host sync."""
        return self.kind in ("exchange", "gather")

    def messages(self, rank: int) -> Iterator[Message]:
        """What `rank` has to do, in order. Every operation may block."""
        for step in self.rounds:
            sent = [t for t in step.transfers if t.source == rank]
            received = [t for t in step.transfers if t.destination == rank]
            both = [(True, sent), (False, received)]
            for is_send, transfers in both if rank in step.sends_first else both[::-1]:
                if transfers:
                    first = transfers[0]
                    yield Message(
                        is_send,
                        first.destination if is_send else first.source,
                        tuple((t.origin, t.target) for t in transfers),
                    )

    def busiest_link_bytes(self, chunk_bytes: ChunkBytes) -> int:
        """Bytes over the busiest link, one direction of one pair of ranks."""
        return max(self._loads(chunk_bytes).values(), default=0)

    def _loads(self, chunk_bytes: ChunkBytes) -> dict[tuple[int, int], int]:
        loads: dict[tuple[int, int], int] = {}
        for step in self.rounds:
            for t in step.transfers:
                link = (t.source, t.destination)
                size = _size(chunk_bytes, t.origin, t.target)
                loads[link] = loads.get(link, 0) + size
        return loads


def exchange_schedule(num_ranks: int) -> Schedule:
    """One all_gather of the chunk for the peer.

    Raises:
        ValueError: there are not 2 ranks.
    """
    if num_ranks != 2:
        raise ValueError(f"an exchange needs 2 ranks, got {num_ranks}")
    transfers = (Transfer(0, 1, 0, 1), Transfer(1, 0, 1, 0))
    return Schedule("exchange", 2, (Round(transfers, frozenset({0})),))


def gather_schedule(num_ranks: int) -> Schedule:
    """One all_gather of all chunks.

    Drawn as a ring moves it: in round i a rank passes on, to the next rank, all
    chunks of the rank i places back. One rank has nothing to move.
    """
    rounds = []
    for distance in range(num_ranks - 1):
        transfers = tuple(
            Transfer(rank, (rank + 1) % num_ranks, (rank - distance) % num_ranks, to)
            for rank in range(num_ranks)
            for to in range(num_ranks)
        )
        rounds.append(Round(transfers, _even(num_ranks)))
    return Schedule("gather", num_ranks, tuple(rounds))


def pairwise_schedule(num_ranks: int) -> Schedule:
    """Every rank meets every other rank once; needs a transport with any peer.

    Each round is a set of disjoint pairs (the round-robin of a tournament), so no
    cycle of ranks can wait for each other: within a pair the lower rank sends
    first. An odd number of ranks leaves one rank out in each round.
    """
    # The circle method pairs rank with (i - rank) mod m for an odd m. With an even
    # number of ranks the last one meets whoever would meet itself.
    is_odd = num_ranks % 2 == 1
    modulus = num_ranks if is_odd else num_ranks - 1
    rounds = []
    for i in range(modulus):
        pairs = set()
        for rank in range(modulus):
            peer = (i - rank) % modulus
            if peer == rank:
                if is_odd:
                    continue
                peer = num_ranks - 1
            pairs.add((min(rank, peer), max(rank, peer)))
        transfers = tuple(
            Transfer(source, destination, source, destination)
            for low, high in sorted(pairs)
            for source, destination in ((low, high), (high, low))
        )
        if transfers:
            rounds.append(Round(transfers, frozenset(low for low, _ in pairs)))
    return Schedule("pairwise", num_ranks, tuple(rounds))


def relay_schedule(num_ranks: int) -> Schedule:
    """Chunks are passed on between neighbours, the shorter way around the ring.

    With an even number of ranks the opposite rank is as far both ways: half of
    the ranks go one way and half the other, so that both are equally busy. Example
    of 4 ranks, the chunks that leave rank 0 (->) and what rank 1 does with them:

        round 1, upwards    0 -> 1: (0,1) (0,2)     rank 1 keeps (0,1)
        round 2, downwards  0 -> 3: (0,3)
        round 3, upwards    1 -> 2: (0,2)           passed on by rank 1
    """
    rounds = []
    for hop in range(num_ranks // 2):
        for direction in (1, -1):
            transfers = tuple(
                Transfer(
                    (origin + direction * hop) % num_ranks,
                    (origin + direction * (hop + 1)) % num_ranks,
                    origin,
                    (origin + direction * distance) % num_ranks,
                )
                for origin in range(num_ranks)
                for distance in range(hop + 1, num_ranks // 2 + 1)
                if _goes(origin, distance, direction, num_ranks)
            )
            if transfers:
                # Around a ring with at least one even and one odd rank, even ranks
                # that send first always find a neighbour that receives first.
                rounds.append(Round(transfers, _even(num_ranks)))
    return Schedule("relay", num_ranks, tuple(rounds))


def choose_schedule(capability: Capability, num_ranks: int) -> Schedule:
    """The schedule that moves the fewest bytes over the busiest link.

    Where two are equal, the one with a collective: it needs no host sync.

    Raises:
        ValueError: no group of this transport has so many ranks.
    """
    most = capability.max_ranks
    if num_ranks < 1 or (most is not None and num_ranks > most):
        raise ValueError(
            f"a group over {capability.transport!r} has 1 to {most or 'any number of'} "
            f"ranks, got {num_ranks}"
        )
    if num_ranks == 2:
        return exchange_schedule(2)
    makers: list[Callable[[int], Schedule]] = [gather_schedule]
    if not capability.is_fixed_shape:
        if capability.peers == "any":
            makers.append(pairwise_schedule)
        elif capability.peers == "neighbours":
            makers.append(relay_schedule)
    candidates = [maker(num_ranks) for maker in makers]
    return min(candidates, key=lambda schedule: schedule.busiest_link_bytes(1))


def _goes(origin: int, distance: int, direction: int, num_ranks: int) -> bool:
    """Whether the chunk for the rank at `distance` leaves in this direction."""
    if 2 * distance < num_ranks:
        return True
    return 2 * distance == num_ranks and (direction == 1) == (origin % 2 == 0)


def _even(num_ranks: int) -> frozenset[int]:
    return frozenset(range(0, num_ranks, 2))


def _size(chunk_bytes: ChunkBytes, origin: int, target: int) -> int:
    if isinstance(chunk_bytes, int):
        return chunk_bytes
    return chunk_bytes[origin][target]
