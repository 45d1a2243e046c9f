"""A part of the width of experts: rows of gate and up, columns of down.

In mlx-lm every expert is ``down(activation(up(x), gate(x)))`` with matrices ``[out,
in]``, so that part of the width is

    gate_proj, up_proj, fc1   rows of weight, scales, biases, and of the bias
    down_proj, fc2            columns of weight, scales, biases; the bias whole, once
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from mlx_ep.loading.checkpoint import Checkpoint
from mlx_ep.loading.headers import TensorInfo
from mlx_ep.models import MoESite, expert_tensor, find_moe_sites
from mlx_ep.placement import Part

# What gives the width, and what takes it.
_OUT_NAMES = ("gate_proj", "up_proj", "fc1", "w1", "w3")
_IN_NAMES = ("down_proj", "fc2", "w2")
# Parameters of one number per matrix are no part of a width.
_SHARED = ("global_scale",)

_NAME = re.compile(
    rf"\.({'|'.join(_OUT_NAMES + _IN_NAMES)})\.(weight|scales|biases|bias)$"
)


class Cut(NamedTuple):
    """The columns or rows of one tensor that belong to a part.

    Attributes:
        axis: counted from the end.
        start: the first.
        stop: behind the last.
    """

    axis: int
    start: int
    stop: int

    @property
    def range(self) -> slice:
        return slice(self.start, self.stop)

    def of(self, tensor: mx.array) -> mx.array:
        """The part, with a buffer of its own."""
        index = (..., self.range, *[slice(None)] * (-self.axis - 1))
        return mx.contiguous(tensor[index])


def parameter_cut(projection: str, parameter: str, size: int, part: Part) -> Cut | None:
    """What of a projection's parameter belongs to a part; None: all of it.

    Args:
        projection: such as ``down_proj``.
        parameter: ``weight``, ``scales``, ``biases`` or ``bias``.
        size: of the axis that is cut, in the whole parameter; packed columns are fewer
            than F.

    Raises:
        ValueError: the part is not whole in it.
    """
    if is_whole(projection, parameter):
        return None
    ends = [end * size for end in (part.start, part.stop)]
    if any(end % part.width for end in ends):
        raise ValueError(
            f"{projection}.{parameter} has {size} columns for a width of {part.width}: "
            f"columns {part.start}..{part.stop - 1} are not whole in it."
        )
    start, stop = (end // part.width for end in ends)
    return Cut(cut_axis(projection, parameter), start, stop)


def is_whole(projection: str, parameter: str) -> bool:
    """Whether every part of the width needs all of a parameter."""
    is_bias_of_sum = projection in _IN_NAMES and parameter == "bias"
    return parameter in _SHARED or is_bias_of_sum


def cut_axis(projection: str, parameter: str) -> int:
    """The axis of a parameter, from the end, along which its width lies."""
    return -2 if projection in _OUT_NAMES and parameter != "bias" else -1


def keep_part(site: MoESite, part: Part) -> None:
    """Cut the switch of a site, which holds the whole width, to a part of it."""
    for name, projection in named_projections(site):
        for parameter, value in list(projection.parameters().items()):
            size = value.shape[cut_axis(name, parameter)] if value.ndim > 1 else 0
            cut = parameter_cut(name, parameter, size, part)
            if cut is not None:
                projection[parameter] = cut.of(value)
        if "bias" in projection and is_bias_elsewhere(name, "bias", part):
            del projection["bias"]


def is_bias_elsewhere(projection: str, parameter: str, part: Part) -> bool:
    """Whether it is the bias of a down matrix, and another part counts it."""
    return projection in _IN_NAMES and parameter == "bias" and not part.is_first


def named_projections(site: MoESite) -> Iterable[tuple[str, nn.Module]]:
    """The stacked linear layers of a switch, by name."""
    known = _OUT_NAMES + _IN_NAMES
    return [(name, site.switch[name]) for name in known if name in site.switch]


def tensor_cut(info: TensorInfo, part: Part) -> Cut | None:
    """What of an expert tensor of a checkpoint belongs to a part; None: all of it.

    Only for checkpoints that `holds_parts`.
    """
    match = _NAME.search(info.name)
    assert match is not None
    size = info.shape[cut_axis(match[1], match[2])]
    return parameter_cut(match[1], match[2], size, part)


def is_foreign_bias(info: TensorInfo, part: Part) -> bool:
    """Whether it is the bias of down matrices, and another part counts it."""
    match = _NAME.search(info.name)
    return match is not None and is_bias_elsewhere(match[1], match[2], part)


def holds_parts(checkpoint: Checkpoint, num_experts: int, part: Part) -> bool:
    """Whether parts of the width can be read out of a checkpoint's tensors.

    That is so where gate, up and down are tensors of their own, with names and shapes
    as mlx-lm has them. Fused and otherwise packed experts are read whole, and cut when
    mlx-lm has split them.
    """
    for info in checkpoint.tensors.values():
        found = expert_tensor(info.name, info.shape, num_experts)
        if found is None:
            continue
        match = _NAME.search(info.name)
        if match is None:
            return False
        rank = 1 if match[2] == "bias" else 2
        if len(info.shape) != rank + (found.expert is None):
            return False
        size = info.shape[cut_axis(match[1], match[2])]
        if match[1] in _OUT_NAMES and size != part.width:
            return False
        if match[1] in _IN_NAMES and match[2] != "bias":
            ends = (part.start * size, part.stop * size)
            if any(end % part.width for end in ends):
                return False
    return True


def width_problem(model: nn.Module) -> str:
    """Why the width of a model's experts cannot be shared, or ""."""
    for site in find_moe_sites(model):
        switch = site.switch
        projections = [projection for _, projection in named_projections(site)]
        if type(switch) not in (SwitchGLU, SwitchMLP) or any(
            type(p) not in (SwitchLinear, QuantizedSwitchLinear) for p in projections
        ):
            kinds = sorted({type(m).__name__ for m in (switch, *projections)})
            return f"its experts ({', '.join(kinds)}) do more than their matrices say"
        if not _is_elementwise(switch, len(projections) - 1):
            return f"its activation ({type(switch.activation).__name__}) mixes columns"
    return ""


def _is_elementwise(switch: nn.Module, num_inputs: int) -> bool:
    """Whether the activation of half of the columns is half of the activation."""
    inputs = mx.random.normal((num_inputs, 4, 16), key=mx.random.key(0))
    halves = [switch.activation(*part) for part in mx.split(inputs, 2, axis=-1)]
    together = switch.activation(*inputs)
    # sync: of 64 numbers, before anything is read.
    return bool(mx.allclose(mx.concatenate(halves, -1), together, atol=1e-5).item())
