"""Runner `gather`: the switch of mlx-lm itself, rows sorted by slot."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Float32, Int32

from mlx_ep.experts.base import expert_weights
from mlx_ep.experts.run import FEW_PAIRS, own_pairs, sum_pairs
from mlx_ep.metrics import Counters
from mlx_ep.rows import Backend, Mover, uses_metal, weighted_slots
from mlx_ep.types import CompleteRows, Rows


class GatherRunner:
    """MLX's gather_mm and gather_qmm. Works with every switch.

    Attributes:
        mover: sums the outputs of the pairs.
    """

    def __init__(self, switch: nn.Module, mover: Mover | None = None) -> None:
        self.switch = switch
        self.mover = mover or Mover()

    @staticmethod
    def why_not(switch: nn.Module, backend: Backend) -> str:
        """See `RunnerType`."""
        weights = expert_weights(switch)
        if weights is None or backend == "metal":
            return ""
        for matrices in weights.matrices:
            if matrices.global_scale is not None:
                return "MLX's gather_qmm on a CPU takes no global scale"
            if not matrices.packing.is_packed and matrices.weight.dtype != mx.float32:
                return (
                    f"MLX's gather_mm is float32 only on a CPU, not {matrices.packing}"
                )
        return ""

    def partial_sum(self, rows: Rows, counters: Counters) -> Float32[mx.array, "... D"]:
        """See `ExpertRunner`; sums in slot order, complete rows in the order of k.

        Complete rows go to the switch as they are: no host sync.
        """
        if isinstance(rows, CompleteRows):
            counters.count_pairs(rows.slot_ids, rows.slot_ids.size)
            return weighted_slots(self.switch(rows.x, rows.slot_ids), rows.gates)
        top_k = rows.slot_ids.shape[-1]
        if rows.slot_ids.size == top_k <= FEW_PAIRS and not uses_metal():
            # One row and its own slots are complete: nothing to gather or to look up.
            # Where there is a choice of movements, the one that was measured sums.
            own: Any = own_pairs(rows, counters)
            if not len(own.slots):
                return mx.zeros(rows.x.shape, mx.float32)
            slots, gates = own.slots, own.gates
            for _ in rows.x.shape[:-1]:  # before they are arrays: nothing to compute
                slots, gates = [slots], [gates]
            outputs = self.switch(rows.x, mx.array(slots))
            return weighted_slots(outputs, mx.array(gates))
        movement = self.mover("pairs", rows.slot_ids.shape[0])
        return sum_pairs(rows, self.slot_outputs, counters, movement)

    def slot_outputs(
        self, rows: Float[mx.array, "N D"], slots: Int32[mx.array, " N"]
    ) -> Float[mx.array, "N D"]:
        """See `ExpertRunner`."""
        return self.switch(rows, slots[:, None]).squeeze(1)
