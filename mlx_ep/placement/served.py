"""Which rows of each expert each rank computes, for steps of which counts are known."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from mlx_ep.placement.choice import DECODE_TOKENS
from mlx_ep.placement.placement import Placement


def served_counts(
    placement: Placement, counts: Int[np.ndarray, "steps E"], tokens: int
) -> Int[np.ndarray, "steps P E"]:
    """What `Placement.serve` makes of steps: rows of each expert on each rank.

    Args:
        placement: of whole experts.
        counts: rows of each expert in each step.
        tokens: of a step, which say whether it is decode: an expert is then served by
            one rank.

    Raises:
        ValueError: ranks share the width of experts.
    """
    if placement.parts is not None:
        raise ValueError("The placement must hold whole experts; it has parts of them.")
    num_ranks = placement.num_ranks
    if not placement.has_replicas:
        owner = placement.expert_ranks == np.arange(num_ranks)[:, None]
        return np.asarray(counts[:, None, :] * owner)  # on host
    choice = placement.choice
    served = np.zeros((len(counts), num_ranks, counts.shape[1]), counts.dtype)
    for step, of_step in zip(served, counts):
        if tokens > DECODE_TOKENS:
            step[:] = choice.row_quotas(of_step).T
            continue
        used = np.flatnonzero(of_step).tolist()  # on host
        chosen = choice.experts(used)
        experts, ranks = list(chosen), list(chosen.values())
        step[ranks, experts] = of_step[experts]
    return served
