"""A row travels to each rank that needs it, and that rank's sum travels back."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
from jaxtyping import Float, Float32

from mlx_ep.comm import Comm
from mlx_ep.config import EPConfig
from mlx_ep.exchange.base import ExchangeShape, Strategy, Traffic
from mlx_ep.exchange.low_latency import LowLatency
from mlx_ep.exchange.normal import Normal
from mlx_ep.placement import Placement
from mlx_ep.rows import Mover
from mlx_ep.types import Routing, Rows, TokenCounts


class ChosenPlan(NamedTuple):
    """A plan, and the strategy that made it."""

    strategy: Strategy
    plan: Any


class ByChoice:
    """The steps behind a `ChosenPlan`: those of the strategy that was chosen."""

    def dispatch(self, x: Float[mx.array, "T D"], plan: ChosenPlan, comm: Comm) -> Rows:
        """See `Strategy.dispatch`."""
        return plan.strategy.dispatch(x, plan.plan, comm)

    def combine(
        self,
        partial: Float32[mx.array, "M D"],
        plan: ChosenPlan,
        comm: Comm,
        dtype: mx.Dtype,
    ) -> Float32[mx.array, "T D"]:
        """See `Strategy.combine`."""
        return plan.strategy.combine(partial, plan.plan, comm, dtype)


class AllToAll(ByChoice):
    """Strategy `all_to_all`, in one of two modes or in the one that fits.

    Mode `auto` takes `low_latency` where no rank has more than `low_latency_tokens`
    tokens and else `normal`, in rounds of `round_tokens`.
    """

    is_sharded = True

    def __init__(
        self, config: EPConfig | None = None, mover: Mover | None = None
    ) -> None:
        config = config or EPConfig()
        self.mode = config.mode
        self.mover = mover or Mover()
        self.low_latency = LowLatency(config, mover=self.mover)
        self.normal = Normal(config, self.mover)
        self.needs_tokens = self.mode != "low_latency"
        is_fixed = self.mode == "low_latency"
        self.round_tokens = None if is_fixed else config.round_tokens

    def choose(self, tokens: TokenCounts | None) -> Strategy:
        """The mode for these tokens: the same on every rank."""
        if self.mode == "low_latency":
            return self.low_latency
        assert tokens is not None
        is_small = tokens.largest <= self.low_latency.capacity
        return self.low_latency if self.mode == "auto" and is_small else self.normal

    def plan(
        self,
        routing: Routing,
        placement: Placement,
        comm: Comm,
        tokens: TokenCounts | None,
    ) -> ChosenPlan:
        """See `Strategy.plan`."""
        strategy = self.choose(tokens)
        return ChosenPlan(strategy, strategy.plan(routing, placement, comm, tokens))

    def traffic(self, shape: ExchangeShape) -> Traffic:
        """See `Strategy.traffic`."""
        return self.choose(shape.tokens).traffic(shape)
