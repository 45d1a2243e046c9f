"""The caches of a prompt's second half, while the first one is still on its way.

Both halves go through the same caches, the first one a layer ahead. A model looks at
some of its caches when its pass begins, to make masks, and the second pass begins when
the first one has been in the first layers only. So what the second half is given says
of each cache what it will be behind the first half, until that has been there. All else
is the cache itself.
"""

from __future__ import annotations

from copy import copy
from functools import cache as cached
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

# What counts the tokens that a cache has taken, by its class.
_POSITIONS: dict[type, str] = {
    KVCache: "offset",
    RotatingKVCache: "offset",
    BatchKVCache: "_idx",
    BatchRotatingKVCache: "_offset",
}


def has_second_half(cache: Any) -> bool:
    """Whether `second_half` knows a cache."""
    if isinstance(cache, CacheList):
        return all(map(has_second_half, cache.caches))
    return type(cache) in _POSITIONS or isinstance(cache, ArraysCache)


def second_half(cache: Any, num_sequences: int, first: int) -> Any:
    """A cache for tokens behind `first` tokens that it has not taken yet.

    Args:
        num_sequences: B.
        first: tokens of each.
    """
    if isinstance(cache, CacheList):
        made = copy(cache)
        made.caches = tuple(
            second_half(inner, num_sequences, first) for inner in cache.caches
        )
        return made
    name = _POSITIONS.get(type(cache), "")
    kind: Any = type(cache)
    later: Any = object.__new__(_later_class(kind))
    later.__dict__ = cache.__dict__  # one state for both
    ahead = _ahead(cache, num_sequences, first)
    later._behind_first = (ahead, name, getattr(cache, name, None))
    return later


def _ahead(cache: Any, num_sequences: int, first: int) -> Any:
    """What the cache will say of its tokens; without keys, which nobody asks for."""
    made = copy(cache)
    for name, value in vars(made).items():
        if isinstance(value, mx.array):  # caches write into their arrays
            setattr(made, name, mx.stop_gradient(value))
    if isinstance(cache, ArraysCache):
        made.cache = list(cache.cache)
        made.advance(first)
        made.cache = [None] * len(made.cache)
        return made
    heads, widths = 1, (1, 1)
    dtype = mx.float32
    if made.keys is not None:
        heads, dtype = made.keys.shape[1], made.keys.dtype
        widths = made.keys.shape[3], made.values.shape[3]
    # Nothing of it is ever computed.
    made.update_and_fetch(
        *(mx.zeros((num_sequences, heads, first, width), dtype) for width in widths)
    )
    made.keys = made.values = None
    return made


@cached
def _later_class(cache_class: type) -> type:
    def make_mask(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._behind_first[0].make_mask(*args, **kwargs)

    def offset(self: Any) -> Any:
        ahead, name, start = self._behind_first
        has_first = self.__dict__[name] != start
        return self.__dict__["offset"] if has_first else ahead.offset

    def set_offset(self: Any, value: Any) -> None:
        self.__dict__["offset"] = value

    body: dict[str, Any] = {"__slots__": ("_behind_first",), "make_mask": make_mask}
    if cache_class in _POSITIONS:
        body["offset"] = property(offset, set_offset)
    return type(cache_class.__name__, (cache_class,), body)
