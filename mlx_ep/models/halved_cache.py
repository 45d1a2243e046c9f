"""The KV cache of a batch that decodes in two halves.

mlx-lm's caches for batches hold one array for all sequences. Two micro-batches that
wrote into it in turn would copy it whole each time, as one still reads what the other
overwrites. So each half has a cache of its own, for as long as the batch stays as it
is; when sequences join or leave, the halves are made anew, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
)

# Their rows are independent of one another, and `filter` and `extend` cut and join.
_OF_BATCHES = (BatchKVCache, BatchRotatingKVCache, ArraysCache)
_OF_SEQUENCES = (KVCache, RotatingKVCache, ArraysCache)


def why_not_halved(caches: Sequence[Any]) -> str:
    """Which of a model's caches, made for one sequence, cannot be cut; "": none."""
    for cache in caches:
        if isinstance(cache, CacheList):
            if reason := why_not_halved(cache.caches):
                return reason
        elif not isinstance(cache, _OF_SEQUENCES):
            return f"a {type(cache).__name__} cannot be cut between sequences"
    return ""


class HalvedCache:
    """In the place of a batch's cache in one layer: two of them, one for each half.

    Attributes:
        parts: one or two caches for batches.
        sizes: sequences in each.
    """

    def __init__(self, cache: Any, num_sequences: int) -> None:
        self.parts, self.sizes = [cache], [num_sequences]

    @property
    def num_sequences(self) -> int:
        return sum(self.sizes)

    def whole(self) -> Any:
        """One cache of all sequences, to be used instead until the next `cut`."""
        if len(self.parts) == 2:
            first, second = self.parts
            first.extend(second)
            self.parts, self.sizes = [first], [self.num_sequences]
        return self.parts[0]

    def cut(self, first: int) -> tuple[Any, Any]:
        """The caches of the first so many sequences and of the others."""
        if self.sizes != [first, self.num_sequences - first]:
            total, cache = self.num_sequences, self.whole()
            rows = [range(first), range(first, total)]
            self.parts = [_rows(cache, list(part)) for part in rows]
            self.sizes = [first, total - first]
            # sync: one layer at a time, so that one at most is held twice.
            mx.eval([part.state for part in self.parts])
        return self.parts[0], self.parts[1]

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep these sequences, as mlx-lm's caches do."""
        first = self.sizes[0]
        keep = [
            [index for index in batch_indices if index < first],
            [index - first for index in batch_indices if index >= first],
        ]
        kept = [
            (part, rows) for part, rows in zip(self.parts, keep, strict=False) if rows
        ]
        for part, rows in kept:
            part.filter(rows)
        self.parts = [part for part, _ in kept]
        self.sizes = [len(rows) for _, rows in kept]

    def extend(self, other: Any) -> None:
        """Sequences join."""
        theirs = other.whole() if isinstance(other, HalvedCache) else other
        joined = num_sequences(theirs)
        self.whole().extend(theirs)
        self.sizes = [self.sizes[0] + joined]

    def extract(self, index: int) -> Any:
        """The cache of one sequence, a copy."""
        first = self.sizes[0]
        if index < first:
            return self.parts[0].extract(index)
        return self.parts[1].extract(index - first)

    def prepare(self, **padding: Any) -> None:
        """Prompts of several lengths follow."""
        self.whole().prepare(**padding)

    def finalize(self) -> None:
        self.whole().finalize()

    def size(self) -> int:
        return max(part.size() for part in self.parts)

    def empty(self) -> bool:
        return all(part.empty() for part in self.parts)

    @property
    def state(self) -> list[Any]:
        return [part.state for part in self.parts]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def num_sequences(cache: Any) -> int:
    """Of a cache for batches."""
    if isinstance(cache, CacheList):
        return num_sequences(cache.caches[0])
    if isinstance(cache, ArraysCache):
        return int(cache.batch_size)
    return int(cache.offset.size)


def are_of_batch(caches: Sequence[Any]) -> bool:
    """Whether a model's caches are those of a batch, and can be cut."""
    # A state space has one kind of cache for one sequence and for many.
    tells = any(not isinstance(each, ArraysCache) for each in caches)
    return tells and all(map(_is_of_batch, caches))


def _is_of_batch(cache: Any) -> bool:
    if isinstance(cache, HalvedCache):
        return True
    if isinstance(cache, CacheList):
        return all(map(_is_of_batch, cache.caches))
    return isinstance(cache, _OF_BATCHES)


def _rows(cache: Any, rows: list[int]) -> Any:
    """A cache of some of the sequences; the other one stays as it is."""
    taken = copy(cache)
    if isinstance(cache, CacheList):
        taken.caches = tuple(_rows(inner, rows) for inner in cache.caches)
    else:
        taken.filter(rows)
    return taken
