"""A model that each rank runs by itself, with this package's runners of its experts."""

from __future__ import annotations

from dataclasses import replace

import mlx.nn as nn

from mlx_ep.api.install import install_experts
from mlx_ep.comm.alone import AloneComm
from mlx_ep.config import EPConfig, RunnerName
from mlx_ep.experts import options
from mlx_ep.loading import Splitter, agree_attention
from mlx_ep.models import find_moe_sites, stack_experts
from mlx_ep.placement import Placement


def has_routed_experts(model: nn.Module) -> bool:
    """Whether a model, as mlx-lm makes it, has experts that `run_alone` can run."""
    return bool(find_moe_sites(stack_experts(model)))


def runner_problem(model: nn.Module, runner: RunnerName) -> str:
    """Why `run_alone` could not run a model's experts with a runner here, or "".

    Args:
        model: as mlx-lm makes it, with routed experts; its weights need not be read.
    """
    if runner == "auto":
        return ""
    for site in find_moe_sites(stack_experts(model)):
        found = options(site.switch)
        reasons = [why for option, why in found.items() if option.runner == runner]
        if all(reasons):
            # The most telling one is that of the processor it would run on.
            return reasons[-1]
    return ""


def run_alone(model: nn.Module, runner: RunnerName) -> nn.Module:
    """Let a runner compute a model's experts, all of them, on this rank; in place.

    No collective is started: ranks may call it, and the model, as they like.

    Args:
        model: as mlx-lm loads it, with routed experts.
        runner: see `EPConfig.runner`.

    Raises:
        ValueError: the model has no routed experts, or the runner cannot run them.
    """
    comm, config = AloneComm(), replace(EPConfig(), runner=runner)
    sites = find_moe_sites(stack_experts(model))
    if not sites:
        raise ValueError(
            f"A runner is for routed experts, and {type(model).__module__} has none."
        )
    placement = Placement.contiguous(sites[0].num_experts, 1)
    splitter = Splitter(agree_attention(model, comm, config), comm)
    return install_experts(model, comm, placement, config, splitter)
