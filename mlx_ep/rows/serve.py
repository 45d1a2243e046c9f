"""Which copy of an expert serves a token: from experts to slots."""

from __future__ import annotations

import mlx.core as mx
from jaxtyping import Int32

from mlx_ep.placement import Placement
from mlx_ep.types import to_host


def serving_slots(
    expert_ids: Int32[mx.array, "T K"], placement: Placement
) -> Int32[mx.array, "T K"]:
    """The slots that serve routed experts: ids for ``placement.slots``.

    Where no expert has copies these are the ids themselves, and nothing is computed.

    Args:
        expert_ids: of all tokens that are computed together, the same on every rank
            that asks.
    """
    if not placement.has_replicas:
        return expert_ids
    # sync: which copy serves an expert depends on all the ids of the step.
    return mx.array(placement.serve(to_host(expert_ids)))
