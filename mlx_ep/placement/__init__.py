"""Where each expert lives."""

from mlx_ep.placement.placement import Placement, runs

__all__ = ["Placement", "runs"]
