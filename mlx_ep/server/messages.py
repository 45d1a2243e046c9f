"""What the ranks tell each other once per step, in one collective of a fixed shape.

Each rank gives a row of whole numbers:

    bytes of its payload | status ... | one word per place | the first payload bytes
                                        (token + 1) | reason << 28, 0: no token

A payload is msgpack: rank 0's decision, and log probabilities from a rank that drew for
others. It mostly is nothing, or short enough for the row. What is longer, such as a
prompt, follows in a second collective, whose size all ranks have read in the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import mlx.core as mx
import msgpack
import numpy as np

from mlx_ep.comm import Comm
from mlx_ep.server.prefix_cache import PrefixHit
from mlx_ep.server.requests import FinishReason, Request, Sampling
from mlx_ep.server.scheduler import Decision, Enter
from mlx_ep.types import to_host

INLINE = 256  # bytes of a payload that fit the row
STATUS = 3  # numbers that each rank says of itself
_SHIFT = 28  # bits of a token
_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length", "error")


class Heard(NamedTuple):
    """What one rank told.

    Attributes:
        status: `STATUS` numbers.
        tokens: by place: a token, and why the sequence ends with it.
        payload: what came with them.
    """

    status: list[int]
    tokens: dict[int, tuple[int, FinishReason | None]]
    payload: bytes


class StepExchange:
    """The collective of every step.

    Args:
        num_places: sequences at most; alike on all ranks.
    """

    def __init__(self, comm: Comm, num_places: int) -> None:
        self._comm, self._num_places = comm, num_places

    def __call__(
        self,
        tokens: dict[int, tuple[int, FinishReason | None]],
        status: Sequence[int],
        payload: bytes = b"",
    ) -> list[Heard]:
        """Tell and hear; every rank must call it.

        Args:
            tokens: that this rank has drawn, as in `Heard`.
        """
        row = np.zeros(1 + STATUS + self._num_places + INLINE // 4, np.int32)
        row[0] = len(payload)
        row[1 : 1 + STATUS] = status
        for place, (token, reason) in tokens.items():
            row[1 + STATUS + place] = token + 1 | _REASONS.index(reason) << _SHIFT
        is_short = len(payload) <= INLINE
        if is_short:
            text = payload.ljust(INLINE, b"\0")
            row[-INLINE // 4 :] = np.frombuffer(text, np.int32)
        rows = self._gather(row).reshape(self._comm.size, -1)
        sizes = rows[:, 0].tolist()  # on host
        long = self._gather_long(payload, sizes) if max(sizes) > INLINE else []
        heard = []
        for rank, (size, other) in enumerate(zip(sizes, rows, strict=True)):
            short = other[-INLINE // 4 :].tobytes()
            text = (short if size <= INLINE else long[rank])[:size]
            said = other[1 : 1 + STATUS].tolist()  # on host
            heard.append(Heard(said, self._tokens(other), text))
        return heard

    def _tokens(self, row: np.ndarray) -> dict[int, tuple[int, FinishReason | None]]:
        words = row[1 + STATUS : 1 + STATUS + self._num_places]
        places = np.flatnonzero(words).tolist()  # on host
        mask = (1 << _SHIFT) - 1
        return {
            place: (int(words[place] & mask) - 1, _REASONS[words[place] >> _SHIFT])
            for place in places
        }

    def _gather_long(self, payload: bytes, sizes: list[int]) -> list[bytes]:
        """The payloads that do not fit their rows; nothing from those that do."""
        width = max(size for size in sizes)
        mine = payload if len(payload) > INLINE else b""
        gathered = self._gather(np.frombuffer(mine.ljust(width, b"\0"), np.uint8))
        return [row.tobytes() for row in gathered.reshape(self._comm.size, width)]

    def _gather(self, row: np.ndarray) -> np.ndarray:
        if self._comm.size == 1:
            return row
        # sync: the step depends on what rank 0 decided.
        return to_host(self._comm.all_gather(mx.array(row)))


def encode_decision(decision: Decision) -> bytes:
    """A decision as msgpack; b"" where nothing was decided."""
    if decision == Decision():
        return b""
    return _packed(
        [
            decision.cancel,
            [
                [enter.place, enter.owner, _request_record(enter.request), enter.hit]
                for enter in decision.enter
            ],
            list(decision.prefill.items()),
            decision.stop,
            decision.record,
        ]
    )


def decode_decision(payload: bytes) -> Decision:
    """What `encode_decision` was given."""
    if not payload:
        return Decision()
    cancel, enter, prefill, stop, record = msgpack.unpackb(
        payload, strict_map_key=False
    )
    return Decision(
        cancel,
        [
            Enter(place, owner, _request(values), PrefixHit(*hit) if hit else None)
            for place, owner, values, hit in enter
        ],
        {
            owner: [(place, count) for place, count in chunks]
            for owner, chunks in prefill
        },
        stop,
        record,
    )


Details = dict[int, tuple[float | None, tuple[tuple[int, float], ...], str]]


def encode_details(details: Details) -> bytes:
    """By place: log probability, those of the top tokens, what went wrong."""
    return _packed(list(details.items())) if details else b""


def decode_details(payload: bytes) -> Details:
    """What `encode_details` was given."""
    items = msgpack.unpackb(payload) if payload else []
    return {
        place: (logprob, tuple((token, value) for token, value in top), message)
        for place, (logprob, top, message) in items
    }


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
