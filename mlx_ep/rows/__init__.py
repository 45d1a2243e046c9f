"""Rows inside a rank: which ones leave, packing them, adding what comes back.

Nothing here communicates. A strategy (`mlx_ep.exchange`) decides what is sent; a
movement makes the rows that are sent and adds up what comes back, by MLX's ops or by
kernels. Which movement runs is decided for each call by `mlx_ep.tune`.
"""

from mlx_ep.rows.device import MetalMovement, has_one_rank_per_expert
from mlx_ep.rows.form import RowForm, row_bytes, row_format
from mlx_ep.rows.host import OpsMovement
from mlx_ep.rows.movement import Job, Movement, RowRoutes
from mlx_ep.rows.mover import (
    MOVEMENTS,
    OPS,
    Mover,
    MovesRows,
    movement_of,
    movement_options,
)
from mlx_ep.rows.option import Backend, Option, uses_metal
from mlx_ep.rows.pack import (
    get_dispatch_layout,
    join_rows,
    limit_to_capacity,
    pack,
    pad_routing,
    routing_from_words,
    routing_words,
    split_rows,
)
from mlx_ep.rows.serve import serving_local_slots, serving_slots
from mlx_ep.rows.sums import weighted_slots, with_zero_row
from mlx_ep.rows.words import join, with_zeros

__all__ = [
    "Backend",
    "Option",
    "uses_metal",
    "Job",
    "Movement",
    "RowRoutes",
    "MetalMovement",
    "has_one_rank_per_expert",
    "OpsMovement",
    "RowForm",
    "row_bytes",
    "row_format",
    "MOVEMENTS",
    "OPS",
    "Mover",
    "MovesRows",
    "movement_of",
    "movement_options",
    "get_dispatch_layout",
    "join",
    "join_rows",
    "limit_to_capacity",
    "pack",
    "pad_routing",
    "routing_from_words",
    "routing_words",
    "serving_local_slots",
    "serving_slots",
    "split_rows",
    "weighted_slots",
    "with_zero_row",
    "with_zeros",
]
