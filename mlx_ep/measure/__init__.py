"""Measurements of this machine, for doctor, calibrate and the benchmarks."""

from mlx_ep.measure.checks import (
    Check,
    Sizes,
    check_collectives,
    check_experts,
    check_kernels,
)

__all__ = [
    "Check",
    "Sizes",
    "check_collectives",
    "check_experts",
    "check_kernels",
]
