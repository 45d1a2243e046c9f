"""How rows are planned, packed and summed inside a rank: by MLX's ops or by kernels.

A strategy decides what is sent; a movement makes the rows that are sent and adds up
what comes back. Which movement runs is decided for each call by `mlx_ep.policy`.
"""

from mlx_ep.movement.base import Job, Movement, RowPlan
from mlx_ep.movement.device import MetalMovement, has_one_rank_per_expert
from mlx_ep.movement.host import OpsMovement
from mlx_ep.movement.mover import (
    MOVEMENTS,
    OPS,
    Mover,
    MovesRows,
    movement_of,
    movement_options,
)

__all__ = [
    "Job",
    "Movement",
    "RowPlan",
    "MetalMovement",
    "has_one_rank_per_expert",
    "OpsMovement",
    "MOVEMENTS",
    "OPS",
    "Mover",
    "MovesRows",
    "movement_of",
    "movement_options",
]
