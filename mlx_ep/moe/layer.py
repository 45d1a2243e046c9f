"""One expert-parallel MoE layer: route, assign, dispatch, experts, combine."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.experts import switch_runner
from mlx_ep.moe.group import ExpertGroup
from mlx_ep.moe.router import TopKRouter
from mlx_ep.placement import Placement

_NO_GRADIENT = (
    "MixtureOfExperts has no gradient: its exchange between ranks goes one way. Train "
    "with mlx-lm's own layers on one process, and load the result with mlx_ep."
)


class MixtureOfExperts(nn.Module):
    """A MoE layer whose experts are spread over the ranks of a group.

    1. route     `TopKRouter` chooses K experts per token
    2. assign    `Placement` says on which rank and in which slot each of them lives
    3. dispatch  the strategy brings tokens to the ranks that hold their experts
    4. experts   each rank runs its own SwiGLU experts and sums their outputs
    5. combine   the strategy brings the sums home and adds them

    Each rank holds its experts only, drawn as a single process would draw them: the
    layer computes the same on any number of ranks. `nn.quantize` quantizes it. It has
    no gradient: `mx.grad` through it is a ValueError.

    Args:
        hidden_dims: D.
        expert_dims: F.
        num_experts: E.
        top_k: K.
        group: the ranks; default: ``mx.distributed.init()``.
        config: strategy and its settings.
        placement: of the experts, also with copies; default: every rank has the same
            number, once each.
        **router_options: of `TopKRouter`.

    Raises:
        ValueError: the numbers do not make a layer.
    """

    def __init__(
        self,
        hidden_dims: int,
        expert_dims: int,
        num_experts: int,
        top_k: int,
        *,
        group: mx.distributed.Group | None = None,
        config: EPConfig | None = None,
        placement: Placement | None = None,
        **router_options: object,
    ) -> None:
        super().__init__()
        config = config or EPConfig()
        if (config.runner, config.backend) != ("auto", "auto"):
            warnings.warn(
                f"runner={config.runner!r} and backend={config.backend!r} have no "
                "effect in MixtureOfExperts, which takes MLX's own experts where these "
                "can run and NumPy's BLAS elsewhere; they belong to load() and "
                "parallelize().",
                stacklevel=2,
            )
        comm = GroupComm(group or mx.distributed.init())
        _check_even(config, comm.size)
        placement = placement or Placement.contiguous(num_experts, comm.size)
        given = placement.num_experts, placement.num_ranks
        if given != (num_experts, comm.size) or placement.parts is not None:
            raise ValueError(
                f"placement must be of {num_experts} whole experts on {comm.size} "
                f"ranks; got {given[0]} on {given[1]}"
                f"{', shared in width' * (placement.parts is not None)}."
            )
        self.router = TopKRouter(hidden_dims, num_experts, top_k, **router_options)  # type: ignore[arg-type]
        self.experts = SwitchGLU(hidden_dims, expert_dims, num_experts)
        own = mx.array(placement.rank_experts[comm.rank], mx.int32)
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.experts[name].weight = mx.contiguous(self.experts[name].weight[own])
            # sync: one projection at a time, so that one at most is held whole.
            mx.eval(self.experts[name].weight)
        self._group = ExpertGroup.from_config(comm, placement, config)

    def __call__(self, x: Float[mx.array, "... D"]) -> Float[mx.array, "... D"]:
        tokens = x.flatten(0, -2)
        routing = self.router(tokens)
        runner = switch_runner(self.experts)
        try:
            total = self._group.weighted_sum(tokens, routing, runner)
        except ValueError as error:
            # Strategies that start their exchange at once meet MLX's tracing first.
            if "graph transformation" in str(error):
                raise ValueError(_NO_GRADIENT) from error
            raise
        y: Any = without_gradient(total.astype(x.dtype).reshape(x.shape))
        return y


@mx.custom_function
def without_gradient(y: mx.array) -> mx.array:
    """y; MLX would name a primitive of the exchange, or cut gradients off silently."""
    return y


@without_gradient.vjp
def _refuse_gradient(*_: object) -> mx.array:
    raise ValueError(_NO_GRADIENT)


def _check_even(config: EPConfig, num_ranks: int) -> None:
    """Raises:
    ValueError: the configuration places experts in another way.
    """
    is_whole = config.ep_size in (None, num_ranks)
    has_replicas = config.replica_memory != "0"
    if config.overlap in ("two", "auto"):
        raise ValueError(
            f"overlap={config.overlap!r} is about a model's passes; it is for load() "
            "and parallelize(). MixtureOfExperts takes none or single."
        )
    if config.memory or config.placement_file or not is_whole or has_replicas:
        raise ValueError(
            "MixtureOfExperts gives every rank the same number of whole experts; "
            "memory, replica_memory, placement_file and ep_size are for load() and "
            "parallelize(). Give it a placement instead."
        )
