"""Where all parts meet: a model becomes expert-parallel."""

from mlx_ep.api.alone import has_routed_experts, run_alone, runner_problem
from mlx_ep.api.calls import load, parallelize
from mlx_ep.api.install import ExpertParallel
from mlx_ep.api.prepared import PreparedModel, prepare
from mlx_ep.config import RunnerName

__all__ = [
    "ExpertParallel",
    "PreparedModel",
    "RunnerName",
    "has_routed_experts",
    "load",
    "parallelize",
    "prepare",
    "run_alone",
    "runner_problem",
]
