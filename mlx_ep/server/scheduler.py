"""Who enters, who leaves, whose prompt goes on: decided by rank 0, once per step. Pure.

    waiting --admit--> active: prompt --chunks--> active: one token a step --> out

A request is admitted when there is a place and its KV cache fits beside those of the
others, for as many tokens as it may come to have. Places are numbers that all ranks
know sequences by.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mlx_ep.server.prefix_cache import PrefixHit
from mlx_ep.server.requests import QueueFull, Request
from mlx_ep.server.router import RankLoad, choose_rank
from mlx_ep.server.sizes import KvSizes

# Chunks of other prompts that the oldest one waits for, before it has one.
PATIENCE = 2
# A guess at what a request takes, s, before one has ended.
FIRST_SECONDS = 5.0
MOST_RETRY_AFTER = 60  # s


class Enter(NamedTuple):
    """A request that takes a place.

    Attributes:
        place: a number below the number of sequences at most.
        owner: the rank that runs its attention; 0 where all do.
        hit: the part of the owner's prefix cache that it begins with.
    """

    place: int
    owner: int
    request: Request
    hit: PrefixHit | None


@dataclass
class Decision:
    """What all ranks do in one step.

    Attributes:
        cancel: places that become free.
        enter: who takes one, after that.
        prefill: by owner, (place, tokens) of the prompts that go on together.
        stop: this is the last step.
        record: "start", "stop", "dump" or "": what the recorder of routing does.
    """

    cancel: list[int] = field(default_factory=list)
    enter: list[Enter] = field(default_factory=list)
    prefill: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    stop: bool = False
    record: str = ""


class Pending(NamedTuple):
    """A prompt that is not processed yet: its place, and how many tokens are left."""

    place: int
    left: int


def choose_chunks(
    pending: Sequence[Pending], most: int, waited: int
) -> list[tuple[int, int]]:
    """The prompts that go on in one pass, and by how many tokens each.

    The shortest goes first, so that a short request does not wait for a long one; the
    oldest has its turn after `PATIENCE` chunks of others. Those that fit are processed
    beside it to their end, padded to the longest.

    Args:
        pending: the oldest first, each with tokens left.
        most: tokens of a pass, with padding.
        waited: chunks that the oldest has been passed over for.
    """
    if not pending:
        return []
    by_length = sorted(pending, key=lambda prompt: prompt.left)
    first = pending[0] if waited >= PATIENCE else by_length[0]
    if first.left >= most:
        return [(first.place, most)]
    group, longest = [first], first.left
    for prompt in by_length:
        width = max(longest, prompt.left)
        if prompt is not first and (len(group) + 1) * width <= most:
            group.append(prompt)
            longest = width
    return [(prompt.place, prompt.left) for prompt in group]


@dataclass
class _Active:
    request: Request
    owner: int
    length: int  # tokens that it may come to have
    left: int  # of the prompt, before the first token can be drawn


@dataclass
class _Owner:
    """What runs on the rank of a number; one for all where all ranks run the same."""

    limit: int
    waited: int = 0
    oldest: int = -1


class RequestScheduler:
    """The queue, the places and the memory.

    Args:
        sizes: of a sequence's KV caches on one rank.
        limits: bytes for the KV caches of running sequences, of each rank that runs
            sequences of its own; one number where all ranks run the same.
        places: sequences at most, of all ranks together.
        most_waiting: requests that may wait.
        prefill_step: tokens of a prompt that are processed beside a decoded token.
        find: the part of the rank's prefix cache that a prompt begins with.
        clock: seconds.

    Attributes:
        places: of active requests, by their number.
    """

    def __init__(
        self,
        sizes: KvSizes,
        limits: Sequence[int],
        *,
        places: int,
        most_waiting: int,
        prefill_step: int,
        find: Callable[[int, Sequence[int]], PrefixHit | None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sizes, self._find, self._clock = sizes, find, clock
        self._owners = [_Owner(limit) for limit in limits]
        self._num_places, self._most_waiting = places, most_waiting
        self._prefill_step = prefill_step
        self._waiting: deque[Request] = deque()
        self._cancelled: set[str] = set()
        self.places: dict[int, _Active] = {}
        self._started: dict[str, float] = {}
        self._seconds = FIRST_SECONDS

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self.places)

    @property
    def has_room(self) -> bool:
        """Whether there is a place for one more request beside those that wait."""
        return len(self.places) + len(self._waiting) < self._num_places

    def requests(self) -> list[str]:
        """The ids of all requests that have not ended."""
        active = [active.request.id for active in self.places.values()]
        return active + [request.id for request in self._waiting]

    def problem(self, request: Request) -> str:
        """Why a request can never be admitted, or ""."""
        length = _length(request)
        needed, most = self._sizes.batch([length]), max(o.limit for o in self._owners)
        if needed <= most:
            return ""
        return (
            f"The KV cache of {length} tokens must fit {most} bytes; it takes "
            f"{needed}. Ask for fewer tokens, or raise --max-kv-memory."
        )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFull: as many wait as may, beside those that places are free for.
        """
        free = self._num_places - len(self.places)
        if len(self._waiting) >= self._most_waiting + free:
            raise QueueFull(self.retry_after())
        self._waiting.append(request)

    def retry_after(self) -> int:
        """Seconds until a request that waits now may have a place, by recent ones."""
        rounds = (len(self._waiting) + 1) / self._num_places
        return max(1, min(MOST_RETRY_AFTER, math.ceil(rounds * self._seconds)))

    def cancel(self, request: str) -> bool:
        """End a request; True where it was waiting, and so has ended already."""
        for waiting in self._waiting:
            if waiting.id == request:
                self._waiting.remove(waiting)
                return True
        self._cancelled.add(request)
        return False

    def decide(self) -> Decision:
        """What all ranks do in the next step; it counts as done from here on."""
        decision = Decision()
        for place, active in list(self.places.items()):
            if active.request.id in self._cancelled:
                decision.cancel.append(place)
                self._free(place, has_answer=False)
        self._cancelled.clear()
        while self._waiting and (enter := self._admit(self._waiting[0])):
            self._waiting.popleft()
            decision.enter.append(enter)
        for owner in range(len(self._owners)):
            if chunks := self._chunks(owner):
                decision.prefill[owner] = chunks
        return decision

    def ended(self, place: int, request: str) -> None:
        """A request has its last token; its place may have been taken already."""
        active = self.places.get(place)
        if active is not None and active.request.id == request:
            self._free(place, has_answer=True)

    def _free(self, place: int, has_answer: bool) -> None:
        active = self.places.pop(place)
        started = self._started.pop(active.request.id)
        if has_answer:
            self._seconds += 0.2 * (self._clock() - started - self._seconds)

    def _admit(self, request: Request) -> Enter | None:
        """A place for a request; None where there is none now."""
        free = set(range(self._num_places)) - set(self.places)
        if not free:
            return None
        length, prompt = _length(request), request.tokens
        loads: dict[int, RankLoad] = {}
        hits: dict[int, PrefixHit | None] = {}
        for owner in range(len(self._owners)):
            if not self._fits(owner, length):
                continue
            hits[owner] = hit = self._find(owner, prompt[:-1])
            cached = hit.num_tokens if hit else 0
            mine = [a for a in self.places.values() if a.owner == owner]
            left = sum(active.left for active in mine)
            loads[owner] = RankLoad(len(mine), left, len(prompt) - 1 - cached)
        if not loads:
            return None
        owner, place = choose_rank(loads), min(free)
        self._started[request.id] = self._clock()
        self.places[place] = _Active(request, owner, length, loads[owner].new_tokens)
        return Enter(place, owner, request, hits[owner])

    def _fits(self, owner: int, length: int) -> bool:
        lengths = [a.length for a in self.places.values() if a.owner == owner]
        return self._sizes.batch([*lengths, length]) <= self._owners[owner].limit

    def _chunks(self, owner: int) -> list[tuple[int, int]]:
        of = self._owners[owner]
        pending = [
            Pending(place, active.left)
            for place, active in self.places.items()  # in the order of entering
            if active.owner == owner and active.left
        ]
        oldest = pending[0].place if pending else -1
        if oldest != of.oldest:
            of.oldest, of.waited = oldest, 0
        if not pending:
            return []
        chunks = choose_chunks(pending, self._prefill_step, of.waited)
        is_served = any(place == of.oldest for place, _ in chunks)
        of.waited = 0 if is_served else of.waited + 1
        for place, count in chunks:
            self.places[place].left -= count
        return chunks


def _length(request: Request) -> int:
    """The most tokens that the KV cache of a request comes to hold."""
    return len(request.tokens) + request.max_tokens
