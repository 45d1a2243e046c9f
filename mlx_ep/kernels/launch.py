"""What the launching functions of all kernels share."""

from __future__ import annotations

# MLX passes arrays of fewer elements in another address space.
MIN_WIDTH = 8

LANE = "thread_index_in_simdgroup"
POSITION = "thread_position_in_grid"
THREADS = (
    f"{LANE}, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, "
    "threadgroup_position_in_grid"
)


def checked_width(width: int) -> int:
    """Raises:
    ValueError: rows of this width are too narrow for the kernels.
    """
    if width < MIN_WIDTH:
        raise ValueError(
            f"The kernels need a model and an expert width of at least {MIN_WIDTH}; "
            f"got {width}. Use mlx_ep.kernels.ops."
        )
    return width
