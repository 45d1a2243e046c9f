"""What a step of prefill needs beside weights and caches: an estimate."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.loading.caches import make_caches, run_shapes
from mlx_ep.models import find_moe_sites
from mlx_ep.placement import Part

_TRIED_TOKENS = 16
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes that the arrays of one layer take.

    Attributes:
        fixed: whatever experts the rank has.
        all_experts: what comes on top for a rank that has all of them.
    """

    fixed: int
    all_experts: int

    def of(self, num_slots: int, num_experts: int) -> int:
        """Of a rank with so many of the experts, if all are chosen alike."""
        return self.fixed + -(-self.all_experts * num_slots // num_experts)


def working_memory(
    model: nn.Module, num_tokens: int, part: Part | None = None
) -> WorkingMemory:
    """An estimate for one step of prefill, from shapes.

        T * ((4 H + 2 W) * itemsize + 4 D)    fixed
        T * K * (2 D + 3 F) * itemsize        all_experts

    T tokens of the step; K experts per token, D and F the width of their rows and their
    expert width (on this rank); H the model's width and W the widest output of a dense
    layer. These are the arrays of one layer: rows and outputs of the experts, gate, up
    and their product; float32 sums; four arrays of the tokens, input and output of the
    widest layer. Left out are attention scores, which Metal's kernel does not write
    down, and what MLX keeps for reuse.

    Args:
        model: with a rank's experts; nothing of it is evaluated.
        num_tokens: T.
        part: what the rank holds of their width; None: all of it, or as the model.
    """
    seen = switch_input(model)
    up = find_moe_sites(model)[0].projections[-2]
    width = up.output_dims if part is None else part.columns
    hidden, widest = _dense_widths(model)
    fixed = (4 * hidden + 2 * widest) * seen.itemsize + 4 * seen.width
    experts = seen.top_k * (2 * seen.width + 3 * width) * seen.itemsize
    return WorkingMemory(num_tokens * fixed, num_tokens * experts)


@dataclass
class SwitchInput:
    """What a switch is called with.

    Attributes:
        top_k: K, its last axis of ids.
        width: of its rows, D.
        itemsize: bytes of their numbers.
    """

    top_k: int = 0
    width: int = 0
    itemsize: int = 0


def switch_input(model: nn.Module) -> SwitchInput:
    """K, D and the itemsize of rows, seen in a forward pass that is not evaluated."""
    seen = SwitchInput()

    def call(self: nn.Module, x: mx.array, ids: mx.array) -> mx.array:
        seen.top_k, seen.width, seen.itemsize = ids.shape[-1], x.shape[-1], x.itemsize
        return mx.zeros((*ids.shape, x.shape[-1]), x.dtype)

    run_shapes(model, _TRIED_TOKENS, make_caches(model), call)
    return seen


def _dense_widths(model: nn.Module) -> tuple[int, int]:
    """The model's width, and the widest output of a matrix inside of a layer."""
    layers = {id(m) for layer in model.layers for m in layer.modules()}
    stacked = {id(p) for site in find_moe_sites(model) for p in site.projections}
    widest = max(
        module.weight.shape[0]
        for module in model.modules()
        if id(module) in layers - stacked
        and "weight" in module
        and module.weight.ndim == 2
    )
    embedding = next(m for m in model.modules() if isinstance(m, _EMBEDDINGS))
    scales = embedding.get("scales")
    if scales is not None:
        return scales.shape[-1] * embedding.group_size, widest
    return embedding.weight.shape[-1], widest
