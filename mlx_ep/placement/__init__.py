"""Where each expert lives."""

from mlx_ep.placement.file import read_placement, write_placement
from mlx_ep.placement.placement import Part, Placement, runs
from mlx_ep.placement.shares import ExpertSizes, apportion, place

__all__ = [
    "ExpertSizes",
    "Part",
    "Placement",
    "apportion",
    "place",
    "read_placement",
    "runs",
    "write_placement",
]
