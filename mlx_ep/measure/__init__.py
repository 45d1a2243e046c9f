"""Measurements of this machine, for doctor, calibrate and the benchmarks."""

from mlx_ep.measure.checks import (
    Check,
    CheckedLayer,
    check_collectives,
    check_experts,
    check_kernels,
)

__all__ = [
    "Check",
    "CheckedLayer",
    "check_collectives",
    "check_experts",
    "check_kernels",
]
