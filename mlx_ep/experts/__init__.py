"""What computes a rank's experts, and the switch that has a choice of it.

`run_experts` gives each row's gate-weighted sum over this rank's slots. One runner a
file: `gather` is MLX's own, `blas` NumPy's on the CPU, `metal` the package's kernels
for decode.
"""

from mlx_ep.experts.base import (
    ExpertRunner,
    ExpertWeights,
    Matrices,
    expert_weights,
)
from mlx_ep.experts.blas import HostMatrices
from mlx_ep.experts.run import Runner, group_by_slot, run_experts, run_slots
from mlx_ep.experts.switch import SwitchRunner, install_runner, switch_runner
from mlx_ep.experts.table import RUNNERS, options
from mlx_ep.experts.threads import blas_threads, limit_blas_threads

__all__ = [
    "ExpertRunner",
    "ExpertWeights",
    "Matrices",
    "expert_weights",
    "HostMatrices",
    "Runner",
    "group_by_slot",
    "run_experts",
    "run_slots",
    "SwitchRunner",
    "install_runner",
    "switch_runner",
    "RUNNERS",
    "options",
    "blas_threads",
    "limit_blas_threads",
]
