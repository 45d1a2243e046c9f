"""What the ranks tell each other once per step, in one collective of a fixed shape.

Each rank gives a row of whole numbers:

    bytes of its payload | status ... | token + 1 of every place | the first payload
                                        (0: none was drawn)        bytes

The tokens need not be known yet when a row is sent: what computes them is part of the
same graph, and so is the pass that takes them. A payload is msgpack: rank 0's decision,
and what a rank has to say of the tokens that it drew. It mostly is nothing, or short
enough for the row. What is longer, such as a prompt, follows in a second collective,
whose size all ranks have read in the rows.

Where no layer has to exchange anything, each rank reads its own tokens, and rows and
payloads travel over sockets (`Doorbell`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import mlx.core as mx
import msgpack
import numpy as np
from jaxtyping import Int32

from mlx_ep.comm import Comm
from mlx_ep.server.prefix_cache import PrefixHit
from mlx_ep.server.requests import Request, Sampling
from mlx_ep.server.scheduler import Decision, Enter
from mlx_ep.types import to_host

# By place: log probability, those of the top tokens, what went wrong.
Details = dict[int, tuple[float | None, tuple[tuple[int, float], ...], str]]

INLINE = 256  # bytes of a payload that fit the row
STATUS = 3  # numbers that each rank says of itself


class Heard(NamedTuple):
    """What one rank told.

    Attributes:
        status: `STATUS` numbers.
        tokens: that it has drawn, by place.
        payload: what came with them.
    """

    status: list[int]
    tokens: dict[int, int]
    payload: bytes


class DrawnHere(NamedTuple):
    """The tokens that are being drawn on this rank.

    Attributes:
        places: of their sequences.
        tokens: not evaluated; None where there are none.
    """

    places: Sequence[int] = ()
    tokens: Int32[mx.array, " B"] | None = None

    def words(self, num_places: int) -> Int32[mx.array, " places"]:
        """Token + 1 of every place that one is drawn for here, else 0."""
        if self.tokens is None:
            return mx.zeros(num_places, mx.int32)
        # Row of each place; one row more, of zeros, for those that draw nothing here.
        row_of = [len(self.places)] * num_places
        for row, place in enumerate(self.places):
            row_of[place] = row
        none = mx.zeros(1, mx.int32)
        return mx.concatenate([self.tokens + 1, none])[mx.array(row_of)]


class Sent(NamedTuple):
    """What is under way.

    Attributes:
        rows: of all ranks, not evaluated; None where this rank tells the others by
            itself, when it has read its tokens.
        drawn, status, payload: of this rank.
    """

    rows: Int32[mx.array, "P W"] | None
    drawn: DrawnHere
    status: Sequence[int]
    payload: bytes


class StepExchange:
    """The exchange of every step: `send`, then `receive`, on every rank.

    Args:
        num_places: sequences at most; alike on all ranks.
        gather: takes the place of collectives, for ranks whose tokens come from no
            collective: gives every rank's bytes, in rank order.
    """

    def __init__(
        self,
        comm: Comm,
        num_places: int,
        gather: Callable[[bytes], list[bytes]] | None = None,
    ) -> None:
        self._comm, self._num_places, self._gather = comm, num_places, gather

    def send(
        self, drawn: DrawnHere, status: Sequence[int], payload: bytes = b""
    ) -> Sent:
        """Tell; nothing is waited for."""
        if self._gather is not None:
            return Sent(None, drawn, status, payload)
        text = payload.ljust(INLINE, b"\0") if len(payload) <= INLINE else bytes(INLINE)
        first = mx.array([len(payload), *status], mx.int32)
        last = mx.array(np.frombuffer(text, np.int32))
        rows = mx.concatenate([first, drawn.words(self._num_places), last])[None]
        if self._comm.size > 1:
            rows = self._comm.all_gather(rows)
        mx.async_eval(rows)
        return Sent(rows, drawn, status, payload)

    def words(self, sent: Sent, rank: int) -> Int32[mx.array, " places"]:
        """`DrawnHere.words` of a rank, not evaluated."""
        if sent.rows is None:
            assert rank == self._comm.rank, "those of others are not here yet"
            return sent.drawn.words(self._num_places)
        start = 1 + STATUS
        return sent.rows[rank, start : start + self._num_places]

    def receive(self, sent: Sent) -> list[Heard]:
        """Hear what all ranks have told."""
        if sent.rows is None:
            return self._receive_by_itself(sent)
        # sync: the step depends on what rank 0 decided, and on the tokens.
        rows = to_host(sent.rows)
        sizes = rows[:, 0].tolist()  # on host
        long = self._gather_long(sent.payload, sizes) if max(sizes) > INLINE else []
        heard = []
        for rank, (size, row) in enumerate(zip(sizes, rows, strict=True)):
            short = row[-INLINE // 4 :].tobytes()
            text = (short if size <= INLINE else long[rank])[:size]
            heard.append(self._heard(row, text))
        return heard

    def _receive_by_itself(self, sent: Sent) -> list[Heard]:
        """Tell the others this rank's row and payload, and hear theirs."""
        assert self._gather is not None
        numbers = np.zeros(1 + STATUS + self._num_places, np.int32)
        numbers[: 1 + STATUS] = (len(sent.payload), *sent.status)
        if sent.drawn.tokens is not None:
            places = np.add(sent.drawn.places, 1 + STATUS)
            # sync: likewise.
            numbers[places] = to_host(sent.drawn.tokens) + 1
        parts = self._gather(numbers.tobytes() + sent.payload)
        size = numbers.nbytes
        return [
            self._heard(np.frombuffer(part[:size], np.int32), part[size:])
            for part in parts
        ]

    def _heard(self, row: np.ndarray, payload: bytes) -> Heard:
        status = row[1 : 1 + STATUS].tolist()  # on host
        return Heard(status, self._tokens(row), payload)

    def _tokens(self, row: np.ndarray) -> dict[int, int]:
        words = row[1 + STATUS : 1 + STATUS + self._num_places]
        places = np.flatnonzero(words).tolist()  # on host
        return {place: int(words[place]) - 1 for place in places}

    def _gather_long(self, payload: bytes, sizes: list[int]) -> list[bytes]:
        """The payloads that do not fit their rows; nothing from those that do."""
        width = max(sizes)
        mine = payload if len(payload) > INLINE else b""
        row = mx.array(np.frombuffer(mine.ljust(width, b"\0"), np.uint8))
        if self._comm.size > 1:
            row = self._comm.all_gather(row)
        # sync: likewise.
        gathered = to_host(row).reshape(self._comm.size, width)
        return [row.tobytes() for row in gathered]


def encode(decision: Decision, details: Details) -> bytes:
    """A payload; b"" where nothing was decided and there is nothing to say."""
    if not details and decision == Decision():
        return b""
    return _packed([_decision_record(decision), list(details.items())])


def decode(payload: bytes) -> tuple[Decision, Details]:
    """What `encode` was given."""
    if not payload:
        return Decision(), {}
    decision, details = msgpack.unpackb(payload, strict_map_key=False)
    return _decision(decision), {
        place: (logprob, tuple((token, value) for token, value in top), message)
        for place, (logprob, top, message) in details
    }


def _decision_record(decision: Decision) -> list[Any]:
    if decision == Decision():
        return []
    return [
        decision.cancel,
        [
            [enter.place, enter.owner, _request_record(enter.request), enter.hit]
            for enter in decision.enter
        ],
        list(decision.prefill.items()),
        decision.stop,
        decision.record,
    ]


def _decision(record: list[Any]) -> Decision:
    if not record:
        return Decision()
    cancel, enter, prefill, stop, action = record
    return Decision(
        cancel,
        [
            Enter(place, owner, _request(values), PrefixHit(*hit) if hit else None)
            for place, owner, values, hit in enter
        ],
        {owner: [(place, n) for place, n in chunks] for owner, chunks in prefill},
        stop,
        action,
    )


def _request_record(request: Request) -> dict[str, Any]:
    """A request without what is as by default, its prompt as bytes."""
    default = asdict(Sampling())
    sampling = {k: v for k, v in asdict(request.sampling).items() if v != default[k]}
    return {
        "id": request.id,
        "tokens": np.asarray(request.tokens, np.int32).tobytes(),  # on host
        "max_tokens": request.max_tokens,
        "sampling": sampling,
        "stop": request.stop,
        "grammar": request.grammar,
    }


def _request(record: dict[str, Any]) -> Request:
    tokens = np.frombuffer(record["tokens"], np.int32).tolist()  # on host
    return Request(
        record["id"],
        tuple(tokens),
        record["max_tokens"],
        Sampling(**record["sampling"]),
        tuple(tuple(stop) for stop in record["stop"]),
        record["grammar"],
    )


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed
