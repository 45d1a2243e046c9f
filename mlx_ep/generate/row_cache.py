"""KV caches of a batch from which each sequence can take tokens back alone.

mlx-lm's caches for batches align sequences at their last token, so that all write at
one place and only all together can take tokens back. Here each begins at the left and
writes behind its own last token:

    sequence 0   a b c d .          '.' not written, or taken back
    sequence 1   e f . . .

Taking back is a smaller length: nothing is moved, and what lies behind a sequence's
length is masked until it is written over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Bool, Float
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from mlx_ep.loading.caches import leaf_caches

_STEP = 256  # tokens by which it grows, as mlx-lm's caches do


class RowCache:
    """What one layer keeps of a batch of B sequences; a cache for mlx-lm's models.

    Attributes:
        keys: ``[B, H, S, D]``, S places for each sequence; None: nothing yet.
        values: as `keys`, of a width of their own.
        lengths: tokens of each sequence.
        offset: int32 ``[B]``, the same for the model: the position of its next token.
    """

    def __init__(self, num_sequences: int) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.rewind([0] * num_sequences)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Keep so many tokens of each sequence."""
        self.lengths = list(lengths)
        self.offset = mx.array(self.lengths, mx.int32)

    def update_and_fetch(
        self, keys: Float[mx.array, "B H N D"], values: Float[mx.array, "B H N V"]
    ) -> tuple[Float[mx.array, "B H S D"], Float[mx.array, "B H S V"]]:
        """Write N tokens behind each sequence; all that is up to the longest one."""
        count = keys.shape[2]
        end = max(self.lengths) + count
        self.keys = _write(_with_room(self.keys, keys, end), keys, self.offset)
        self.values = _write(_with_room(self.values, values, end), values, self.offset)
        self.rewind([length + count for length in self.lengths])
        return self.keys[..., :end, :], self.values[..., :end, :]

    def make_mask(
        self, count: int, return_array: bool = False, window_size: int | None = None
    ) -> Bool[mx.array, "B 1 N S"]:
        """Which places each of the next N tokens of a sequence looks at."""
        places = mx.arange(max(self.lengths) + count)
        tokens = (self.offset[:, None] + mx.arange(count))[:, None, :, None]
        mask = places <= tokens
        if window_size is not None:
            mask = mask & (tokens < places + window_size)
        return mask

    def filter(self, rows: Sequence[int]) -> None:
        """Keep these sequences."""
        self.rewind([self.lengths[row] for row in rows])
        if self.keys is not None and self.values is not None:
            kept, most = mx.array(list(rows)), max(self.lengths)
            self.keys, self.values = self.keys[kept], self.values[kept]
            places = -(-most // _STEP) * _STEP
            self.keys = self.keys[..., :places, :]
            self.values = self.values[..., :places, :]

    def extend(self, other: RowCache) -> None:
        """The sequences of another cache join."""
        self.keys = _joined(self.keys, other.keys, self.lengths, other.lengths)
        self.values = _joined(self.values, other.values, self.lengths, other.lengths)
        self.rewind([*self.lengths, *other.lengths])

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.state if each is not None)


def _with_room(
    held: mx.array | None, new: Float[mx.array, "B H N D"], end: int
) -> Float[mx.array, "B H S D"]:
    """What is held, with `end` places or more for each sequence."""
    batch, heads, _, width = new.shape
    places = 0 if held is None else held.shape[2]
    if held is not None and places >= end:
        return held
    more = -(-(end - places) // _STEP) * _STEP
    room = mx.zeros((batch, heads, more, width), new.dtype)
    return room if held is None else mx.concatenate([held, room], axis=2)


def _write(
    held: Float[mx.array, "B H S D"], new: Float[mx.array, "B H N D"], offset: mx.array
) -> Float[mx.array, "B H S D"]:
    places = (offset[:, None] + mx.arange(new.shape[2]))[:, None, :, None]
    return mx.put_along_axis(held, mx.broadcast_to(places, new.shape), new, axis=2)


def _joined(
    first: mx.array | None,
    second: mx.array | None,
    first_lengths: Sequence[int],
    second_lengths: Sequence[int],
) -> mx.array | None:
    """What both hold, one sequence behind the other; one without tokens gets room."""
    some = first if first is not None else second
    if some is None:
        return None
    _, heads, _, width = some.shape
    parts = [
        mx.zeros((len(lengths), heads, 0, width), some.dtype) if held is None else held
        for held, lengths in ((first, first_lengths), (second, second_lengths))
    ]
    places = max(part.shape[2] for part in parts)
    padded = [
        mx.pad(part, [(0, 0), (0, 0), (0, places - part.shape[2]), (0, 0)])
        for part in parts
    ]
    return mx.concatenate(padded)


def row_caches(model: nn.Module, num_sequences: int) -> list[Any]:
    """A model's caches for a batch, one of each layer, with `RowCache` as leaves.

    Raises:
        ValueError: as `check_row_caches`.
    """
    return [_of_rows(each, num_sequences) for each in make_prompt_cache(model)]


def check_row_caches(model: nn.Module, whose: str) -> None:
    """Whether `RowCache` can stand for the model's caches; no weight is needed.

    Args:
        whose: the model, for the error.

    Raises:
        ValueError: it cannot: a window forgets, and a state holds no single tokens.
    """
    caches = leaf_caches(make_prompt_cache(model))
    if other := sorted({type(each).__name__ for each in caches} - {"KVCache"}):
        raise ValueError(
            "--draft-model needs a KV cache from which tokens can be taken back; "
            f"{whose} ({', '.join(other)}) cannot."
        )


def _of_rows(cache: Any, num_sequences: int) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_of_rows(inner, num_sequences) for inner in cache.caches))
    assert type(cache) is KVCache
    return RowCache(num_sequences)


def rewind(caches: Iterable[Any], lengths: Sequence[int]) -> None:
    """Keep so many tokens of each sequence, in every layer."""
    for leaf in leaf_caches(caches):
        leaf.rewind(lengths)


def keep_rows(caches: Iterable[Any], rows: Sequence[int]) -> None:
    """Keep these sequences, in every layer."""
    for leaf in leaf_caches(caches):
        leaf.filter(rows)


def join(caches: Sequence[Any], others: Sequence[Any]) -> None:
    """The sequences of `others` join, in every layer."""
    for leaf, other in zip(leaf_caches(caches), leaf_caches(others), strict=True):
        leaf.extend(other)
