"""DBRX: mlx-lm keeps its experts in a Python list and runs them token by token.

mlx-lm   ffn.experts.{e}.w1, v1, w2       nn.Linear each
hub      ffn.experts.mlp.w1, v1, w2       [E * F, D] each, w2 transposed
here     ffn.switch_mlp.gate_proj, up_proj, down_proj     one SwitchGLU
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.dbrx import SparseMoeBlock
from mlx_lm.models.switch_layers import SwitchGLU

_PROJECTIONS = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}

_SETTING = ("group_size", "bits", "mode")
_LISTED = re.compile(r"^(.*\.ffn)\.experts\.(\d+)\.(w1|v1|w2)(?:\.(\w+))?$")
_FUSED = re.compile(r"^(.*\.ffn)\.experts\.mlp\.(w1|v1|w2)$")


class StackedMoeBlock(SparseMoeBlock):
    """mlx-lm's block with a `SwitchGLU`, all tokens at once and without a host sync."""

    def __call__(self, x: mx.array) -> mx.array:
        top_k = self.num_experts_per_tok
        gates = mx.softmax(self.router(x).astype(mx.float32), axis=-1)
        ids = mx.argpartition(-gates, kth=top_k - 1, axis=-1)[..., :top_k]
        scores = mx.take_along_axis(gates, ids, axis=-1)
        scores = scores / mx.linalg.norm(scores, ord=1, axis=-1, keepdims=True)
        outputs = self.switch_mlp(x, ids)
        return (outputs * scores.astype(x.dtype)[..., None]).sum(axis=-2)


def stack_experts(model: nn.Module) -> None:
    """See `Family`."""
    for layer in model.layers:
        block = layer.ffn
        if type(block) is not SparseMoeBlock:
            continue
        listed = block.experts
        switch = SwitchGLU(block.d_model, block.ffn_dim, len(listed))
        for name, projection in _PROJECTIONS.items():
            switch[projection] = _stacked([expert[name] for expert in listed])
        switch.train(block.training)
        block.switch_mlp = switch
        del block.experts
        block.__class__ = StackedMoeBlock


def _stacked(layers: list[nn.Module]) -> nn.Module:
    """One stacked layer from the experts' linear layers, quantized alike or not."""
    first = layers[0]
    rows, columns = first.weight.shape
    if isinstance(first, nn.QuantizedLinear):
        settings = {(e.group_size, e.bits, e.mode) for e in layers}
        if len(settings) > 1:
            raise ValueError(_mixed_experts("the experts of a layer", settings))
        columns = first.scales.shape[-1] * first.group_size
    switch = SwitchGLU(columns, rows, 1).up_proj
    if isinstance(first, nn.QuantizedLinear):
        switch = switch.to_quantized(first.group_size, first.bits, first.mode)
    for name, parameter in first.parameters().items():
        if isinstance(parameter, mx.array):
            switch[name] = mx.stack([expert[name] for expert in layers])
    return switch


def stack_shape(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[int, ...]:
    """See `Family`: ``[E * F, D] -> [E, F, D]`` for the hub's names."""
    if not _FUSED.match(name):
        return shape
    num_experts = config["ffn_config"]["moe_num_experts"]
    if shape[0] % num_experts:
        return shape
    return (num_experts, shape[0] // num_experts, *shape[1:])


def stack_tensors(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """See `Family`."""
    stacked: dict[str, mx.array] = {}
    listed: dict[str, dict[int, mx.array]] = {}
    for name, tensor in tensors.items():
        if found := _FUSED.match(name):
            path = f"{found[1]}.switch_mlp.{_PROJECTIONS[found[2]]}.weight"
            # [E, F, D]; w2 is kept as [F, D] too, and used as [D, F].
            is_down = found[2] == "w2"
            turned = mx.contiguous(tensor.swapaxes(1, 2)) if is_down else tensor
            stacked[path] = turned
        elif found := _LISTED.match(name):
            path = f"{found[1]}.switch_mlp.{_PROJECTIONS[found[3]]}.{found[4]}"
            listed.setdefault(path, {})[int(found[2])] = tensor
        else:
            stacked[name] = tensor
    for path, experts in listed.items():
        stacked[path] = mx.stack([experts[slot] for slot in sorted(experts)])
    return stacked


def stack_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `Family`.

    Raises:
        ValueError: experts of one layer have different settings.
    """
    quantization = config["quantization"]
    default = {k: v for k, v in quantization.items() if k in _SETTING}
    stacked: dict[str, Any] = {}
    listed: dict[str, dict[int, Any]] = {}
    for path, setting in quantization.items():
        if found := _LISTED.match(path):
            path = f"{found[1]}.switch_mlp.{_PROJECTIONS[found[3]]}"
            listed.setdefault(path, {})[int(found[2])] = setting
        else:
            stacked[path] = setting
    for path, experts in listed.items():
        settings = list(experts.values())
        if len(experts) < config["ffn_config"]["moe_num_experts"]:
            settings.append(default)
        if any(_full(setting) != _full(settings[0]) for setting in settings):
            raise ValueError(_mixed_experts(path, settings))
        stacked[path] = settings[0]
    return stacked


def _full(setting: Any) -> Any:
    return {"mode": "affine", **setting} if isinstance(setting, dict) else setting


def _mixed_experts(where: str, settings: Iterable[Any]) -> str:
    different = dict.fromkeys(map(str, settings))
    return (
        f"All experts of a layer must be quantized alike; {where} have "
        f"{', '.join(different)}. Convert the model again with mlx_lm.convert."
    )
