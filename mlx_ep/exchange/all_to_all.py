"""A row travels to each rank that needs it, and that rank's sum travels back."""

from __future__ import annotations

from mlx_ep.config import EPConfig
from mlx_ep.exchange.base import (
    Exchange,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
    Strategy,
)
from mlx_ep.exchange.low_latency import LowLatency
from mlx_ep.exchange.normal import Normal
from mlx_ep.rows import Mover
from mlx_ep.types import TokenCounts


class AllToAll:
    """Strategy `all_to_all`, in one of two modes or in the one that fits.

    Mode `auto` takes `low_latency` where no rank has more than `low_latency_tokens`
    tokens and else `normal`, in rounds of `round_tokens`.
    """

    is_sharded = True
    honours_dispatch_dtype = True

    def __init__(
        self, config: EPConfig | None = None, mover: Mover | None = None
    ) -> None:
        config, mover = config or EPConfig(), mover or Mover()
        self.mode, self.mover = config.mode, mover
        self.low_latency = LowLatency(config.low_latency_tokens, mover)
        self.normal = Normal(config.round_tokens, mover)
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

    def exchange(self, request: ExchangeRequest) -> Exchange:
        """See `Strategy.exchange`: that of the mode."""
        return self.choose(request.tokens).exchange(request)

    def traffic(self, shape: ExchangeShape) -> ExchangeTraffic:
        """See `Strategy.traffic`."""
        return self.choose(shape.tokens).traffic(shape)
