"""Running the experts of a shape, as a `Problem`.

A few slots of the layer's own weights stand for all of them: what counts is how many
rows visit a slot. So it takes a fraction of a second for any number of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float32

from mlx_ep.experts import (
    RUNNERS,
    ExpertWeights,
    Matrices,
    expert_weights,
    options,
)
from mlx_ep.metrics import Counters
from mlx_ep.rows import Option
from mlx_ep.tune.choose import default_option
from mlx_ep.tune.problem import Solver
from mlx_ep.types import CompleteRows, Rows, dtype_name, to_host

ROWS_PER_SLOT = (1, 4, 16, 64)
# Layers in a row, up to so many rows per slot. An option that waits for the device in
# each of them is dearer than one call of it: others leave all waiting to the end.
CALLS_IN_A_ROW, ROWS_IN_A_ROW = 4, 4
MAX_WEIGHTS = 20_000_000  # of all slots that are visited
# Of the largest output, for rows of this dtype: a few hundred roundings.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}


@dataclass(frozen=True)
class Layer:
    """A switch and what its router gives it.

    Attributes:
        dtype: of the rows.
        top_k: K.
    """

    switch: nn.Module
    dtype: mx.Dtype
    top_k: int

    @property
    def shape(self) -> dict[str, Any]:
        """What layers with the same policy have in common, on all ranks."""
        weights = expert_weights(self.switch)
        shape: dict[str, Any] = {"rows": dtype_name(self.dtype), "top_k": self.top_k}
        if weights is None:
            return {"form": type(self.switch).__name__, **shape}
        return {
            "form": type(weights.activation).__name__,
            "width": weights.up.columns,
            "expert_width": weights.up.rows,
            "packings": [str(matrices.packing) for matrices in weights.matrices],
            "bias": weights.up.bias is not None,
            **shape,
        }

    @property
    def title(self) -> str:
        """The shape, for a person."""
        shape = self.shape
        if "width" not in shape:
            return f"{shape['form']}, {shape['rows']} rows"
        packings = " / ".join(dict.fromkeys(shape["packings"]))
        return (
            f"{shape['width']} x {shape['expert_width']}, {packings}, {shape['form']}, "
            f"{shape['rows']} rows, top {shape['top_k']}"
        )

    @property
    def moved_as(self) -> str:
        """What layers have in common whose rows are moved alike; "" if not known."""
        shape = self.shape
        if "width" not in shape:
            return ""
        return f"{shape['width']} {shape['rows']} {self.top_k}"


@dataclass(frozen=True)
class ExpertsProblem:
    """A `Problem`: each row's gate-weighted sum over the slots of a rank.

    Attributes:
        layer: the first one of the shape.
        num_experts: E, of all ranks.
        num_ranks: P.
        runner: that the configuration forces, or ``"auto"``.
    """

    layer: Layer
    num_experts: int
    num_ranks: int
    runner: str = "auto"
    unit: str = "row"
    part: str = "slot"

    @property
    def title(self) -> str:
        return f"Experts {self.layer.title}"

    @property
    def task(self) -> str:
        return f"run the experts of {self.layer.title}"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.layer.dtype]

    @property
    def is_held(self) -> bool:
        return self._weights is None or self._weights.num_slots > 0

    @property
    def key(self) -> Mapping[str, Any]:
        return {
            **self.layer.shape,
            "slots": self.case_parts,
            "complete": self.is_complete,
        }

    @property
    def is_complete(self) -> bool:
        """Whether all choices of a row live here: nothing has to be looked up then."""
        return self.num_ranks == 1

    def options(self) -> Mapping[Option, str]:
        """See `Problem`."""
        return options(self.layer.switch)

    def is_worth_checking(self, possible: Sequence[Option]) -> bool:
        """Also one option alone: it may be wrong."""
        return self._weights is not None and bool(possible)

    @cached_property
    def case_parts(self) -> int:
        """Slots that are visited, and that each row visits."""
        if self._weights is None:
            return 1
        # With more ranks one choice of each row lives elsewhere, if it has several.
        return min(
            self._weights.num_slots,
            max(1, self.layer.top_k - (not self.is_complete)),
            max(1, MAX_WEIGHTS // self._weights.weights_per_slot),
        )

    def reference(self) -> Mapping[int, list[np.ndarray]]:
        """By rows per slot."""
        assert self._weights is not None
        sums = reference(self._weights, self.case_parts, self._rows)
        return {size: [sums[:size]] for size in ROWS_PER_SLOT}

    def solver(self, option: Option) -> Solver:
        """See `Problem`."""
        runner = RUNNERS[option.runner](self.layer.switch)

        def solve(size: int) -> list[mx.array]:
            rows = type(self._rows)(*(part[:size] for part in self._rows))
            total = runner.partial_sum(rows, Counters())
            for _ in range(self.case_calls(size) - 1):
                later = rows._replace(x=mx.depends(rows.x, total))
                total = runner.partial_sum(later, Counters())
            return [total]

        return solve

    def case_calls(self, size: int) -> int:
        """See `Problem`. More ranks have a collective between layers anyway."""
        return CALLS_IN_A_ROW if self.is_complete and size <= ROWS_IN_A_ROW else 1

    def parts(self, num_tokens: int) -> tuple[float, float]:
        """The slots visited on a rank with E/P experts, all equally often chosen."""
        slots = self.num_experts / self.num_ranks
        share = min(1.0, self.layer.top_k / self.num_experts)
        visited = slots * (1 - (1 - share) ** num_tokens)
        rows = num_tokens * self.layer.top_k / self.num_ranks
        return visited, rows / visited if visited else 0.0

    def default(self, num_tokens: int, possible: Sequence[Option]) -> Option:
        """See `default_option`."""
        width = self._weights.up.columns if self._weights else 0
        return default_option(num_tokens, self.layer.dtype.size * width, possible)

    @cached_property
    def _weights(self) -> ExpertWeights | None:
        return expert_weights(self.layer.switch)

    @cached_property
    def _rows(self) -> Rows:
        assert self._weights is not None
        rows = _rows(
            max(ROWS_PER_SLOT),
            self._weights.up.columns,
            self.case_parts,
            self.layer.top_k,
            self.layer.dtype,
            CompleteRows if self.is_complete else Rows,
        )
        # sync: what is timed must not include making its arguments.
        mx.eval(rows)
        return rows


def _rows(
    num_rows: int,
    width: int,
    num_slots: int,
    top_k: int,
    dtype: mx.Dtype,
    kind: type[Rows],
) -> Rows:
    """Rows that visit the first slots, each in its own order and with its own gates."""
    top_k = num_slots if kind is CompleteRows else top_k
    key = mx.random.key(0)  # the model's own random state stays as it is
    x = mx.random.normal((num_rows, width), key=key).astype(dtype)
    slots = np.full((num_rows, top_k), -1, np.int32)
    slots[:, :num_slots] = np.arange(num_slots)
    for row in range(num_rows):
        slots[row] = np.roll(slots[row], row)
    gates = mx.random.uniform(0.5, 1.5, slots.shape, key=key) / num_slots
    return kind(x, mx.array(slots), gates)


def reference(
    weights: ExpertWeights, num_slots: int, rows: Rows
) -> Float32[np.ndarray, "M D"]:
    """Each row's gate-weighted sum in float32: MLX unpacks, NumPy multiplies.

    One matrix is held unpacked at a time.

    Args:
        num_slots: the first so many slots, each of which every row visits once.
        rows: the rows.
    """
    with mx.stream(mx.cpu):
        # sync: at warm-up.
        x, gates = to_host(rows.x.astype(mx.float32)), to_host(rows.gates)
        # sync: at warm-up.
        slots = to_host(rows.slot_ids)
        total = np.zeros(x.shape, np.float32)
        for slot in range(num_slots):
            parts = [weights.up] + ([weights.gate] if weights.gate else [])
            hidden = [mx.array(_apply(m, slot, x)) for m in parts]
            # sync: at warm-up.
            between = to_host(weights.activation(*hidden).astype(mx.float32))
            gate = np.where(slots == slot, gates, 0).sum(axis=1, keepdims=True)
            total += gate * _apply(weights.down, slot, between)
    return total


def _apply(matrices: Matrices, slot: int, rows: np.ndarray) -> np.ndarray:
    weight = matrices.weight[slot]
    if matrices.scales is not None:
        scales, offsets = matrices.scales[slot], None
        if matrices.offsets is not None:  # MLX rounds to the dtype of the scales
            scales = scales.astype(mx.float32)
            offsets = matrices.offsets[slot].astype(mx.float32)
        scale = matrices.global_scale
        weight = mx.dequantize(
            weight,
            scales,
            offsets,
            group_size=matrices.packing.group_size,
            bits=matrices.packing.bits,
            mode=matrices.packing.mode,
            global_scale=None if scale is None else scale[slot],
            dtype=mx.float32,
        )
    # sync: at warm-up.
    outputs = rows @ to_host(weight.astype(mx.float32)).T
    if matrices.bias is not None:
        # sync: at warm-up.
        outputs += to_host(matrices.bias[slot].astype(mx.float32))
    return outputs
