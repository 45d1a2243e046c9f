"""Random weights for an architecture, from its config.json alone.

The numbers depend on a parameter's path and expert, not on the rank, so that a model
with dummy weights is the same model on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ep.loading.local import (
    Change,
    build_model,
    drop_placeholder,
    shrink_switches,
)
from mlx_ep.loading.widths import cut_axis, is_whole, named_projections, parameter_cut
from mlx_ep.models import find_moe_sites, keep_layers, stack_quantization
from mlx_ep.placement import Part, Placement


def build_dummy(config: dict[str, Any], placement: Placement, rank: int) -> nn.Module:
    """The model of a config.json with the experts of `rank`; nothing is evaluated.

    It is quantized as config.json's `quantization` says. `fill_dummy` gives it numbers.
    """
    model = build_model(config)
    model.set_dtype(_dtype())  # sizes decide where experts go, before there are numbers
    shrink_switches(model, placement, rank)
    if (stage := placement.stage) is not None:
        keep_layers(model, stage.start, stage.stop)
    config = config | stack_quantization(type(model), config)
    if (quantization := config.get("quantization")) is not None:
        _quantize(model, quantization)
    drop_placeholder(model, placement, rank)
    model.eval()
    return model


def _dtype() -> mx.Dtype:
    """MLX's CPU backend multiplies gathered matrices in float32 only."""
    return mx.bfloat16 if mx.metal.is_available() else mx.float32


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


def fill_dummy(
    model: nn.Module,
    placement: Placement,
    rank: int,
    change: Change | None = None,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Give every parameter of a model from `build_dummy` its random numbers.

    Args:
        change: what is done to the model before its dense part is evaluated.
        advance: is told of bytes as they are made.
    """
    dtype = _dtype()
    experts = placement.rank_experts[rank]
    stacked = {
        id(projection): _Stack(name, experts, placement.part(rank))
        for site in find_moe_sites(model)
        for name, projection in named_projections(site)
    }
    for path, module in model.named_modules():
        # Not what a module derives for itself (names with an underscore) or counts.
        own = {
            name: array
            for name, array in module.items()
            if isinstance(array, mx.array)
            and not name.startswith("_")
            and ("scales" in module or mx.issubdtype(array.dtype, mx.floating))
        }
        stack = stacked.get(id(module))
        if "scales" in own:
            own = _random_quantized(path, module, own, stack, dtype)
        else:
            own = {
                name: _each(
                    f"{path}.{name}", name, array, stack, _random_float(name, dtype)
                )
                for name, array in own.items()
            }
        module.update(own)
        if change is None or stack is not None:
            mx.eval(list(own.values()))  # sync: loading
        advance(sum(array.nbytes for array in own.values()))
    if change is not None:
        change(model)
        for parameter in dict(tree_flatten(model.parameters())).values():
            mx.eval(parameter)  # sync: loading


class _Stack(NamedTuple):
    """What a stacked projection of this rank holds.

    Attributes:
        projection: its name, such as ``down_proj``.
        experts: in slot order.
        part: of their width; None: all of it.
    """

    projection: str
    experts: Sequence[int]
    part: Part | None

    def full_shape(self, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one expert's parameter with the whole width."""
        if self.part is None or self._is_whole(parameter):
            return shape
        full = list(shape)
        axis = cut_axis(self.projection, parameter)
        full[axis] = full[axis] * self.part.width // self.part.columns
        return tuple(full)

    def cut(self, parameter: str, full: mx.array) -> mx.array:
        """This rank's part of one expert's parameter."""
        if self.part is None or self._is_whole(parameter):
            return full
        size = full.shape[cut_axis(self.projection, parameter)]
        cut = parameter_cut(self.projection, parameter, size, self.part)
        assert cut is not None
        return cut.of(full)

    def _is_whole(self, parameter: str) -> bool:
        return is_whole(self.projection, parameter)


Draw = Callable[[mx.array, tuple[int, ...]], mx.array]


def _each(
    path: str, name: str, like: mx.array, stack: _Stack | None, draw: Draw
) -> mx.array:
    """One draw of the shape of parameter `like`, or one per expert along axis 0."""
    if stack is None:
        return draw(_key(path), like.shape)
    if not stack.experts:
        return like
    full = stack.full_shape(name, like.shape[1:])
    drawn = (draw(_key(f"{path}:{e}"), full) for e in stack.experts)
    return mx.stack([stack.cut(name, one) for one in drawn])


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
    stack: _Stack | None,
    dtype: mx.Dtype,
) -> dict[str, mx.array]:
    """Random numbers of variance 1 / input width, packed as the module has them."""
    names = [name for name in ("weight", "scales", "biases") if name in own]
    scales = own["scales"].shape
    if stack is not None:
        scales = stack.full_shape("scales", scales[1:])
    *lead, groups = scales
    width = groups * module.group_size

    def draw(key: mx.array) -> Sequence[mx.array]:
        """Weights, scales and biases: the parts of one random matrix."""
        numbers = mx.random.normal((*lead, width), key=key) * width**-0.5
        return mx.quantize(
            numbers.astype(dtype), module.group_size, module.bits, module.mode
        )

    filled: dict[str, mx.array]
    if stack is None:
        filled = dict(zip(names, draw(_key(path)), strict=True))
    elif not stack.experts:
        filled = {name: own[name] for name in names}
    else:
        drawn = [draw(_key(f"{path}:{expert}")) for expert in stack.experts]
        filled = {
            name: mx.stack([stack.cut(name, one) for one in parts])
            for name, parts in zip(names, zip(*drawn), strict=True)
        }
    if "bias" in own:
        filled["bias"] = mx.zeros(own["bias"].shape, dtype)
    return filled
