"""Random weights for an architecture, from its config.json alone.

The numbers depend on a parameter's path and expert, not on the rank, so that a model
with dummy weights is the same model on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ep.loading.local import build_model, drop_placeholder, shrink_switches
from mlx_ep.models import find_moe_sites
from mlx_ep.placement import Placement


def build_dummy(config: dict[str, Any], placement: Placement, rank: int) -> nn.Module:
    """The model of a config.json with the experts of `rank`; nothing is evaluated.

    It is quantized as config.json's `quantization` says. `fill_dummy` gives it numbers.
    """
    model = build_model(config)
    shrink_switches(model, placement, rank)
    if (quantization := config.get("quantization")) is not None:
        _quantize(model, quantization)
    drop_placeholder(model, placement, rank)
    model.eval()
    return model


def _quantize(model: nn.Module, quantization: dict[str, Any]) -> None:
    """Quantize as config.json says: one setting, and exceptions by path."""
    group_size = quantization["group_size"]
    predicate = getattr(model, "quant_predicate", None)

    def setting(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        if path in quantization:
            return quantization[path]
        if module.weight.shape[-1] % group_size:
            return False
        return True if predicate is None else predicate(path, module)

    nn.quantize(
        model,
        group_size,
        quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=setting,
    )


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters; known without evaluating them."""
    return sum(p.nbytes for p in dict(tree_flatten(model.parameters())).values())


def fill_dummy(model: nn.Module, placement: Placement, rank: int) -> None:
    """Give every parameter of a model from `build_dummy` its random numbers."""
    # MLX's CPU backend multiplies gathered matrices in float32 only.
    dtype = mx.bfloat16 if mx.metal.is_available() else mx.float32
    experts = placement.rank_experts[rank]
    stacked = {id(p) for site in find_moe_sites(model) for p in site.projections}
    for path, module in model.named_modules():
        # Not what a module derives for itself (names with an underscore) or counts.
        own = {
            name: array
            for name, array in module.items()
            if isinstance(array, mx.array)
            and not name.startswith("_")
            and ("scales" in module or mx.issubdtype(array.dtype, mx.floating))
        }
        ids = experts if id(module) in stacked else None
        if "scales" in own:
            own = _random_quantized(path, module, own, ids, dtype)
        else:
            own = {
                name: _each(f"{path}.{name}", array, ids, _random_float(name, dtype))
                for name, array in own.items()
            }
        module.update(own)
        mx.eval(list(own.values()))  # sync: loading


Draw = Callable[[mx.array, tuple[int, ...]], mx.array]


def _each(
    path: str, like: mx.array, experts: Sequence[int] | None, draw: Draw
) -> mx.array:
    """One draw of the shape of `like`, or one per expert along axis 0."""
    if experts is None:
        return draw(_key(path), like.shape)
    if not experts:
        return like
    return mx.stack([draw(_key(f"{path}:{e}"), like.shape[1:]) for e in experts])


def _key(name: str) -> mx.array:
    return mx.random.key(crc32(name.encode()))


def _random_float(name: str, dtype: mx.Dtype) -> Draw:
    def draw(key: mx.array, shape: tuple[int, ...]) -> mx.array:
        if len(shape) < 2:  # zeros for biases, ones for norms and other scales
            return (mx.zeros if "bias" in name else mx.ones)(shape, dtype)
        return (mx.random.normal(shape, key=key) * shape[-1] ** -0.5).astype(dtype)

    return draw


def _random_quantized(
    path: str,
    module: nn.Module,
    own: dict[str, mx.array],
    experts: Sequence[int] | None,
    dtype: mx.Dtype,
) -> dict[str, mx.array]:
    """Random numbers of variance 1 / input width, packed as the module has them."""
    width = own["scales"].shape[-1] * module.group_size
    names = [name for name in ("weight", "scales", "biases") if name in own]

    def packed(part: int) -> Draw:
        def draw(key: mx.array, shape: tuple[int, ...]) -> mx.array:
            first = 0 if experts is None else 1
            full = (*own["weight"].shape[first:-1], width)
            numbers = mx.random.normal(full, key=key) * width**-0.5
            return mx.quantize(
                numbers.astype(dtype), module.group_size, module.bits, module.mode
            )[part]

        return draw

    # One key for all parts: they are the parts of one random matrix.
    filled: dict[str, mx.array] = {
        name: _each(path, own[name], experts, packed(part))
        for part, name in enumerate(names)
    }
    if "bias" in own:
        filled["bias"] = mx.zeros(own["bias"].shape, dtype)
    return filled
