"""mlx-lm's KV caches: what they hold, and what may be copied of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlx_ep.loading.caches import leaf_caches
from mlx_ep.server.sizes import KvSizes


def kv_sizes(caches: Sequence[Any]) -> KvSizes:
    """The sizes of a model's caches, as it has filled them.

    Args:
        caches: of one sequence, behind a forward pass.

    Raises:
        ValueError: a cache is of a kind whose size is not known.
    """
    per_token = fixed = 0
    windows: dict[int, int] = {}
    for cache in leaf_caches(caches):
        if isinstance(cache, ArraysCache):
            fixed += cache.nbytes
        elif hasattr(cache, "keys") and cache.keys is None:
            continue  # a layer that shares another's
        elif isinstance(cache, RotatingKVCache):
            size = cache.nbytes // cache.keys.shape[2]
            windows[cache.max_size] = windows.get(cache.max_size, 0) + size
        elif isinstance(cache, KVCache):
            per_token += cache.nbytes // cache.keys.shape[2]
        else:
            raise ValueError(
                f"A KV cache of the kind {type(cache).__name__} cannot be served: how "
                "it grows is not known. Use mlx_ep.generate with this model."
            )
    return KvSizes(per_token, tuple(sorted(windows.items())), fixed)


def why_not_shared(caches: Sequence[Any]) -> str:
    """Why prefixes of these caches cannot serve another request, or ""."""
    others = sorted({type(c).__name__ for c in caches if type(c) is not KVCache})
    if not others:
        return ""
    return f"a prefix cannot be cut out of a cache of the kind {', '.join(others)}"


def kept_prefix(caches: Sequence[KVCache], num_tokens: int) -> list[KVCache]:
    """A copy of the first tokens that holds no more memory than they need."""
    kept = []
    for cache in caches:
        copy = KVCache()
        copy.keys = mx.contiguous(cache.keys[..., :num_tokens, :])
        copy.values = mx.contiguous(cache.values[..., :num_tokens, :])
        copy.offset = num_tokens
        kept.append(copy)
    # Else the copies would hold on to the whole batch.
    mx.async_eval([(cache.keys, cache.values) for cache in kept])
    return kept


def begin_with(caches: Sequence[KVCache], num_tokens: int) -> list[KVCache]:
    """Caches that begin with the first tokens of others, which stay as they are."""
    begun = []
    for cache in caches:
        copy = KVCache()
        # A slice is an array of its own: what is written into it is not seen outside.
        copy.keys = cache.keys[..., :num_tokens, :]
        copy.values = cache.values[..., :num_tokens, :]
        copy.offset = num_tokens
        begun.append(copy)
    return begun
