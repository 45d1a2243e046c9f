"""What a model's KV caches hold after a prompt, from shapes alone.

The model's own caches are filled as a real prompt fills them, with arrays that have
shapes and are never evaluated: first one short forward pass shows what the model hands
to each cache, then the caches take it for the whole prompt, in the steps that mlx-lm's
prefill makes. So windows that rotate, states that do not grow, latent attention and
caches that are allocated in blocks are all counted as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import ArraysCache, CacheList
from mlx_lm.models.cache import make_prompt_cache as make_caches

from mlx_ep.models import find_moe_sites

PREFILL_STEP = 2048  # mlx-lm's
# Two lengths: what differs between them grows in another way than by what it is handed.
_PROBE_TOKENS = (16, 48)
_CACHE_STEP = 256  # tokens by which mlx-lm's KVCache grows


@dataclass(frozen=True)
class CacheQuantization:
    """How mlx-lm quantizes caches, where it does: as its flags of the same names."""

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0

    def apply(self, caches: list[Any]) -> None:
        """As mlx-lm does behind every step.

        Raises:
            ValueError: a cache of the model cannot be quantized.
        """
        try:
            maybe_quantize_kv_cache(
                caches, self.quantized_kv_start, self.kv_group_size, self.kv_bits
            )
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                f"A cache of this model cannot be quantized with --kv-bits "
                f"{self.kv_bits} --kv-group-size {self.kv_group_size} ({error}). Use "
                "others, or leave --kv-bits out."
            ) from None


def cache_bytes(
    model: nn.Module,
    num_tokens: int,
    quantization: CacheQuantization = CacheQuantization(),
    step: int = PREFILL_STEP,
) -> int:
    """Bytes of one sequence's caches behind a prompt; nothing is evaluated.

    Args:
        model: its shapes and dtypes count, not its numbers.
        num_tokens: of the prompt.
        quantization: of the caches.
        step: tokens of a step of prefill.

    Raises:
        ValueError: the model's caches cannot be filled without running it.
    """
    if num_tokens <= max(_PROBE_TOKENS):  # what does not grow may not be full yet
        return _by_running(model, num_tokens, quantization, step)
    probes = [_probe(model, count) for count in _PROBE_TOKENS]
    if any(probe is None for probe in probes) or probes[0] != probes[1]:
        return _by_running(model, num_tokens, quantization, step)
    caches = make_caches(model)
    for count in _steps(num_tokens, step):
        for leaf, (_, calls) in zip(leaf_caches(caches), probes[0] or (), strict=True):
            for call in calls:
                call.repeat(leaf, count)
            _forget_numbers(leaf)
        quantization.apply(caches)
    held = zip(leaf_caches(caches), probes[0] or (), strict=True)
    return sum(leaf.nbytes if calls else fixed for leaf, (fixed, calls) in held)


def cache_growth(
    model: nn.Module,
    num_tokens: int,
    quantization: CacheQuantization = CacheQuantization(),
    step: int = PREFILL_STEP,
) -> float:
    """Bytes by which one sequence's caches grow with each token, behind so many.

    Counted over a whole step of prefill, since caches are allocated in blocks. Raises
    as `cache_bytes` does.
    """
    first = -(-num_tokens // step) * step
    before, after = (
        cache_bytes(model, count, quantization, step) for count in (first, first + step)
    )
    return (after - before) / step


class _Update(NamedTuple):
    """What the model hands to a cache in one call, beside the number of tokens."""

    key_shape: tuple[int, int, int]
    value_shape: tuple[int, int, int]
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype

    def repeat(self, cache: Any, num_tokens: int) -> None:
        if hasattr(cache, "maybe_trim_front"):  # as the model does before each call
            cache.maybe_trim_front()
        arrays = (
            mx.zeros((*shape[:2], num_tokens, shape[2]), dtype)
            for shape, dtype in (
                (self.key_shape, self.key_dtype),
                (self.value_shape, self.value_dtype),
            )
        )
        cache.update_and_fetch(*arrays)


# Of one cache: its bytes if it does not grow, and what it is handed if it does.
_Habit = tuple[int, tuple[_Update, ...]]


def _probe(model: nn.Module, num_tokens: int) -> list[_Habit] | None:
    """What each cache gets in a forward pass; None where that is not all it does."""
    caches = make_caches(model)
    leaves = list(leaf_caches(caches))
    seen: list[list[tuple[mx.array, mx.array]]] = [[] for _ in leaves]
    for leaf, arrays in zip(leaves, seen, strict=True):
        if hasattr(leaf, "update_and_fetch"):
            leaf.update_and_fetch = _recording(leaf.update_and_fetch, arrays)
        elif not isinstance(leaf, ArraysCache):
            return None
    run_shapes(model, num_tokens, caches)
    habits: list[_Habit] = []
    for leaf, handed in zip(leaves, seen, strict=True):
        if any(array.shape[2] != num_tokens for pair in handed for array in pair):
            return None
        updates = tuple(
            _Update(_without_tokens(k), _without_tokens(v), k.dtype, v.dtype)
            for k, v in handed
        )
        habits.append((0 if updates else leaf.nbytes, updates))
    return habits


def _recording(
    update: Callable[..., Any], arrays: list[tuple[mx.array, mx.array]]
) -> Callable[..., Any]:
    def record(keys: mx.array, values: mx.array) -> Any:
        arrays.append((keys, values))
        return update(keys, values)

    return record


def _without_tokens(array: mx.array) -> tuple[int, int, int]:
    batch, heads, _, width = array.shape
    return batch, heads, width


def _steps(num_tokens: int, step: int) -> Iterator[int]:
    """Tokens of each call of the model: the prompt but its last token, then that."""
    left = num_tokens - 1
    while left > 0:
        yield min(step, left)
        left -= step
    yield 1


SwitchCall = Callable[[nn.Module, mx.array, mx.array], mx.array]


def run_shapes(
    model: nn.Module, num_tokens: int, caches: list[Any], call: SwitchCall | None = None
) -> Any:
    """What the model gives in a forward pass that is not evaluated, without experts.

    Args:
        call: in the place of every switch; None: one that returns zeros.

    Raises:
        ValueError: the model's code needs what is not here, such as a Metal kernel.
    """
    try:
        with _experts_replaced(model, call or _no_experts):
            return model(mx.zeros((1, num_tokens), mx.int32), cache=caches)
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__module__} does not run here, so that its caches are not "
            f"known: {error}"
        ) from None


@contextmanager
def _experts_replaced(model: nn.Module, call: SwitchCall) -> Iterator[None]:
    """`call` in the place of every switch: a rank may hold none to run."""
    switches = [site.switch for site in find_moe_sites(model)]
    own = [type(switch) for switch in switches]
    for switch, kind in zip(switches, own, strict=True):
        switch.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    try:
        yield
    finally:
        for switch, kind in zip(switches, own, strict=True):
            switch.__class__ = kind


def _no_experts(switch: nn.Module, x: mx.array, ids: mx.array) -> mx.array:
    return mx.zeros((*ids.shape, x.shape[-1]), x.dtype)


def _by_running(
    model: nn.Module, num_tokens: int, quantization: CacheQuantization, step: int
) -> int:
    """By the whole model, where a cache does more than taking what it is handed."""
    caches = make_caches(model)
    for count in _steps(num_tokens, step):
        run_shapes(model, count, caches)
        quantization.apply(caches)
        for cache in caches:
            _forget_numbers(cache)
    return sum(leaf.nbytes for leaf in leaf_caches(caches))


def leaf_caches(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches inside lists of caches."""
    for cache in caches:
        inner = getattr(cache, "caches", None)
        if inner is None:
            yield cache
        else:
            yield from leaf_caches(inner)


def _forget_numbers(value: Any) -> Any:
    """Put arrays without a history in the place of a cache's, which frees it."""
    if isinstance(value, mx.array):
        return mx.zeros(value.shape, value.dtype)
    if isinstance(value, (list, tuple, dict)):
        return tree_map(_forget_numbers, value, is_leaf=_is_cache)
    if _is_cache(value):
        for name, held in vars(value).items():
            setattr(value, name, _forget_numbers(held))
    return value


def _is_cache(value: Any) -> bool:
    return hasattr(value, "nbytes") and not isinstance(value, mx.array)


class CacheShapes:
    """What the caches of one sequence hold, per token and at all.

    Attributes:
        growing: bytes for each token.
        windowed: bytes for each of the last `window` tokens.
        fixed: bytes whatever the context.
        layers: that have keys; `window_layers`: those of them with the window.
    """

    def __init__(self, model: nn.Module, itemsize: int, index_topk: int) -> None:
        """Of a model's caches, from shapes alone.

        Args:
            itemsize: bytes of a floating-point number, whatever the model's dtype.
            index_topk: of the keys that DeepSeek's sparse attention chooses; else 0.
        """
        self.growing = self.windowed = self.fixed = 0
        self.layers = self.window_layers = self.window = 0
        few, more = (_filled(model, count * _CACHE_STEP) for count in (1, 2))
        for before, after in zip(few, more, strict=True):
            sizes = [_state_bytes(cache, itemsize) for cache in (before, after)]
            per_token = (sizes[1] - sizes[0]) // _CACHE_STEP
            self.fixed += sizes[0] - _CACHE_STEP * per_token
            if not per_token:
                continue
            self.layers += 1
            if window := getattr(before, "max_size", 0):
                self.window, self.windowed = window, self.windowed + per_token
                self.window_layers += 1
            elif index_topk and isinstance(before, CacheList):
                # Of the chosen keys and values the latents are read, of all the index.
                chosen = [_state_bytes(c.caches[0], itemsize) for c in (before, after)]
                latents = (chosen[1] - chosen[0]) // _CACHE_STEP
                self.window, self.windowed = index_topk, self.windowed + latents
                self.growing += per_token - latents
            else:
                self.growing += per_token


def _filled(model: nn.Module, num_tokens: int) -> list[Any]:
    caches: list[Any] = make_caches(model)
    run_shapes(model, num_tokens, caches)
    return caches


def _state_bytes(cache: Any, itemsize: int) -> int:
    arrays = dict(tree_flatten(cache.state)).values()
    return sum(
        array.size * itemsize
        if mx.issubdtype(array.dtype, mx.floating)
        else array.nbytes
        for array in arrays
        if isinstance(array, mx.array)
    )
