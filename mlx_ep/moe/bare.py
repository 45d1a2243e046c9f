"""A layer without its stages: experts, and one sum where strategy `replicated` has it.

In decode Python is a good part of a layer, and slow, since the weights have gone
through the caches. Where nobody looks at the stages or at what goes through them they
need not be there; where this rank has all experts nothing has to be assigned, and where
it has tokens of its own beside (`local`) nothing is summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
from jaxtyping import Float, Float32

from mlx_ep.comm import note_layer
from mlx_ep.exchange import Replicated
from mlx_ep.experts import Runner, run_experts
from mlx_ep.rows import serving_local_slots
from mlx_ep.types import CompleteRouting, CompleteRows, Routing, Rows

if TYPE_CHECKING:
    from mlx_ep.moe.group import ExpertGroup


def is_bare(group: ExpertGroup) -> bool:
    """Whether nothing in a layer needs its stages, as long as they are not timed."""
    changes_routing = group.share_routing or group.capacity is not None
    is_watched = group.check_nan or group.observe is not None
    is_cut = bool(group.eval_layers) or group.overlap.wanted != "none"
    is_plain = type(group.strategy) is Replicated or (group.is_apart and group.has_all)
    return is_plain and not (changes_routing or is_watched or is_cut)


def bare_sum(
    group: ExpertGroup,
    x: Float[mx.array, "... D"],
    routing: Routing,
    runner: Runner,
    extra: Float[mx.array, "T D"] | None,
) -> Float32[mx.array, "... D"]:
    """`ExpertGroup.weighted_sum` of a group that `is_bare`."""
    layer, (ids, gates) = group.step.layer, routing
    if group.has_all and isinstance(routing, CompleteRouting):
        rows: Rows = CompleteRows(x, ids, gates)
    elif group.is_apart:
        rows = Rows(x, ids, gates)
    else:
        note_layer(layer, "assign")
        placement, levels = group.placement, group.levels_rows
        of_ids = serving_local_slots(ids, placement, group.comm.rank, levels, [gates])
        rows = Rows(x, of_ids, gates)
    note_layer(layer, "experts")
    partial = run_experts(rows, runner, group.counters)
    if group.is_apart:
        assert extra is None, "a part of a sum over ranks that have other tokens"
        total = partial
    else:
        note_layer(layer, "combine")
        total = group.counted.all_reduce(partial if extra is None else partial + extra)
    note_layer(layer, "evaluating up to here")
    return total
