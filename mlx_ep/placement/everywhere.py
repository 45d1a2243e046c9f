"""Every expert on every rank, for ranks that compute their tokens alone."""

from __future__ import annotations

from mlx_ep.placement.placement import Placement


def everywhere(num_experts: int, num_ranks: int) -> Placement:
    """Every expert on every rank, in the slot of its number."""
    return Placement((tuple(range(num_experts)),) * num_ranks)


def check_everywhere(placement: Placement) -> None:
    """Raises:
    ValueError: a rank lacks experts, which strategy `local` cannot do without.
    """
    if placement.is_everywhere:
        return
    held = [len(set(experts)) for experts in placement.rank_experts]
    parts = ", and of these a part of the width" * (placement.parts is not None)
    raise ValueError(
        f"strategy local needs all {placement.num_experts} experts on every rank; "
        f"they have {', '.join(map(str, held))}{parts}. Use --replica-memory all, or "
        "another strategy."
    )
