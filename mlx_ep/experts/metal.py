"""Runner `metal`: the package's own kernels for decode, with no host sync.

For few tokens: every token reads the matrices of its slots, up to 8 tokens at once.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Float32, Int32
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import SwiGLU

from mlx_ep.experts.base import ExpertWeights, Matrices, expert_weights
from mlx_ep.kernels import Activation, Projection, metal
from mlx_ep.kernels.ops import CLAMP_LIMIT, CLAMP_SLOPE
from mlx_ep.metrics import Counters
from mlx_ep.rows import Backend
from mlx_ep.types import Rows


class MetalRunner:
    """expert_glu and expert_down. Sums in the order of k, in float32."""

    def __init__(self, switch: nn.Module) -> None:
        weights = expert_weights(switch)
        assert weights is not None and weights.gate is not None
        self.gate = _projection(weights.gate)
        self.up = _projection(weights.up)
        self.down = _projection(weights.down)
        activation = _activation(weights)
        assert activation is not None
        self.activation: Activation = activation

    @staticmethod
    def why_not(switch: nn.Module, backend: Backend) -> str:
        """See `RunnerType`."""
        weights = expert_weights(switch)
        if weights is None or weights.gate is None:
            return f"{type(switch).__name__} is of a form that it does not know"
        if _activation(weights) is None:
            return f"it has no {type(weights.activation).__name__}"
        if weights.gate.packing != weights.up.packing:
            return f"gate is {weights.gate.packing}, but up {weights.up.packing}"
        if min(weights.up.rows, weights.up.columns) < metal.MIN_WIDTH:
            return f"widths are below {metal.MIN_WIDTH}"
        for matrices in weights.matrices:
            try:
                _projection(matrices)
            except ValueError as error:
                return str(error).rstrip(".")
        return ""

    def partial_sum(self, rows: Rows, counters: Counters) -> Float32[mx.array, "M D"]:
        """See `ExpertRunner`. No host sync, also for counting."""
        counters.count_pairs(rows.slot_ids)
        slot_ids = rows.slot_ids.astype(mx.int32)
        hidden = metal.expert_glu(rows.x, slot_ids, self.gate, self.up, self.activation)
        total = metal.expert_down(hidden, slot_ids, rows.gates, self.down)
        # Without slots or rows no kernel has read the ids. What was received is tied to
        # them, and the peers wait until this rank has taken part in it.
        return mx.depends(total, slot_ids)

    def slot_outputs(
        self, rows: Float[mx.array, "N D"], slots: Int32[mx.array, " N"]
    ) -> Float[mx.array, "N D"]:
        """See `ExpertRunner`."""
        gates = mx.ones((rows.shape[0], 1), mx.float32)
        counters = Counters()  # the caller counts pairs
        outputs = self.partial_sum(Rows(rows, slots[:, None], gates), counters)
        return outputs.astype(rows.dtype)


def _projection(matrices: Matrices) -> Projection:
    if not matrices.packing.is_packed:
        return Projection(weight=matrices.weight, bias=matrices.bias)
    if matrices.packing.mode not in ("affine", "mxfp4"):
        raise ValueError(f"it has no {matrices.packing.mode} weights")
    return Projection(
        weight=matrices.weight,
        scales=matrices.scales,
        offsets=matrices.offsets,
        bias=matrices.bias,
        bits=matrices.packing.bits,
        group_size=matrices.packing.group_size,
    )


def _activation(weights: ExpertWeights) -> Activation | None:
    activation = weights.activation
    if type(activation) is SwiGLU:
        return "swiglu"
    if type(activation) is not SwigluOAI:
        return None
    limits = (activation._alpha, activation._limit)
    return "clamped_swiglu" if limits == (CLAMP_SLOPE, CLAMP_LIMIT) else None
