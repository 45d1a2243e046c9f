"""A layer without its stages: experts, and one sum where strategy `replicated` has it.

In decode Python is a good part of a layer, and slow, since the weights have gone
through the caches. Where nobody looks at the stages or at what goes through them, or
stops between them, they need not be there; where this rank has all experts nothing has
to be assigned, and where it has tokens of its own beside (`local`) nothing is summed.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Float32

from mlx_ep.comm import note_layer
from mlx_ep.exchange import CountedComm
from mlx_ep.experts import Runner, run_experts
from mlx_ep.placement import Placement
from mlx_ep.rows import serving_local_slots
from mlx_ep.types import CompleteRouting, CompleteRows, Routing, Rows


class BareLayer(NamedTuple):
    """What such a layer takes of its `ExpertGroup`, where `counted` has the counters.

    Attributes:
        has_all: whether this rank serves every expert, in the slot of its number.
        is_apart: whether no rank waits for another, and each has all experts.
        levels_rows: among copies of experts, see `serving_slots`.
    """

    placement: Placement
    counted: CountedComm
    has_all: bool
    is_apart: bool
    levels_rows: bool

    def weighted_sum(
        self,
        x: Float[mx.array, "... D"],
        routing: Routing,
        runner: Runner,
        extra: Float[mx.array, "T D"] | None,
        layer: int,
    ) -> Float32[mx.array, "... D"]:
        """As `ExpertGroup.weighted_sum`; `layer` is its number in the model."""
        counted, (ids, gates) = self.counted, routing
        if self.has_all and isinstance(routing, CompleteRouting):
            rows: Rows = CompleteRows(x, ids, gates)
        elif self.is_apart:
            rows = Rows(x, ids, gates)
        else:
            note_layer(layer, "assign")
            placement, levels = self.placement, self.levels_rows
            of_ids = serving_local_slots(ids, placement, counted.rank, levels, [gates])
            rows = Rows(x, of_ids, gates)
        note_layer(layer, "experts")
        partial = run_experts(rows, runner, counted.counters)
        if self.is_apart:
            assert extra is None, "a part of a sum over ranks that have other tokens"
            total = partial
        else:
            note_layer(layer, "combine")
            total = counted.all_reduce(partial if extra is None else partial + extra)
        note_layer(layer, "evaluating up to here")
        return total
