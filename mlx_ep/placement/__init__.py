"""Where each expert lives."""

from mlx_ep.placement.balance import rebalance_experts
from mlx_ep.placement.choice import DECODE_TOKENS, ReplicaChoice
from mlx_ep.placement.file import read_placement, write_placement
from mlx_ep.placement.placement import Part, Placement, runs
from mlx_ep.placement.shares import ExpertSizes, apportion, place

__all__ = [
    "DECODE_TOKENS",
    "ExpertSizes",
    "Part",
    "Placement",
    "ReplicaChoice",
    "apportion",
    "place",
    "read_placement",
    "rebalance_experts",
    "runs",
    "write_placement",
]
