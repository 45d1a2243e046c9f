"""A layer with nothing beside its experts: they, and one sum over the ranks.

In decode a layer of a small model is Python for a good part. Where this rank has all
experts there is nothing to assign or to dispatch, and where nobody looks at the stages
or at what goes through them they need not be there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
from jaxtyping import Float, Float32

from mlx_ep.comm import note_layer
from mlx_ep.exchange import Replicated
from mlx_ep.experts import Runner, run_experts
from mlx_ep.types import CompleteRouting, CompleteRows, Routing

if TYPE_CHECKING:
    from mlx_ep.moe.group import ExpertGroup


def is_bare(group: ExpertGroup) -> bool:
    """Whether nothing in a layer needs its stages, as long as they are not timed."""
    is_whole = group.placement.slots.has_all_in_order(group.comm.rank)
    changes_routing = group.share_routing or group.capacity is not None
    is_watched = group.check_nan or group.observe is not None
    is_cut = bool(group.eval_layers) or group.overlap.wanted != "none"
    return (
        type(group.strategy) is Replicated
        and is_whole
        and not (changes_routing or is_watched or is_cut)
    )


def is_complete(routing: Routing) -> bool:
    """Whether no id of it is -1; its axes may be more than two only then."""
    return isinstance(routing, CompleteRouting)


def bare_sum(
    group: ExpertGroup,
    x: Float[mx.array, "... D"],
    routing: Routing,
    runner: Runner,
) -> Float32[mx.array, "... D"]:
    """`ExpertGroup.weighted_sum` of a group that `is_bare`, where it `is_complete`."""
    note_layer(group.step.layer, "experts")
    partial = run_experts(CompleteRows(x, *routing), runner, group.counters)
    total = group.counted.all_reduce(partial)
    note_layer(group.step.layer, "evaluating up to here")
    return total
