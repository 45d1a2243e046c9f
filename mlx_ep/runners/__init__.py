"""Ways to run this rank's experts, and the switch that has a choice of them.

`gather` is MLX's own, `blas` NumPy's on the CPU, `metal` the package's kernels for
decode. All of them give each row's gate-weighted sum over this rank's slots.
"""

from mlx_ep.backend import Backend, Option, uses_metal
from mlx_ep.runners.base import (
    ExpertRunner,
    ExpertWeights,
    Matrices,
    expert_weights,
)
from mlx_ep.runners.switch import SwitchRunner, switch_runner
from mlx_ep.runners.table import RUNNERS, options
from mlx_ep.runners.threads import blas_threads, limit_blas_threads

__all__ = [
    "Backend",
    "ExpertRunner",
    "ExpertWeights",
    "Matrices",
    "expert_weights",
    "uses_metal",
    "SwitchRunner",
    "switch_runner",
    "RUNNERS",
    "Option",
    "options",
    "blas_threads",
    "limit_blas_threads",
]
