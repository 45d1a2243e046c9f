"""Strategy `auto`: the same choice on every rank, from numbers that all ranks know."""

from __future__ import annotations

import sys

from mlx_ep.comm import CAPABILITIES
from mlx_ep.config import EPConfig
from mlx_ep.exchange.base import (
    Exchange,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
    Strategy,
    expected_share,
)
from mlx_ep.exchange.gathered import Gathered
from mlx_ep.exchange.local import Local
from mlx_ep.exchange.low_latency import LowLatency
from mlx_ep.exchange.normal import Normal
from mlx_ep.placement import Placement
from mlx_ep.rows import Mover
from mlx_ep.types import TokenCounts

_TITLES = {
    "local": "local",
    "gathered": "gathered",
    "low_latency": "low_latency",
    "dense": "low_latency with all tokens",
    "normal": "normal",
}
_EVERYWHERE = "every rank has every expert, and an exchange costs more than it saves"
_SHARE = "(a token needs a given rank with probability {share:.2g} at K={top_k})"
_SMALL = "no rank has more than {limit} tokens"
_DENSE = f"nearly every token needs both ranks {_SHARE}"
_PARTLY = f"there are more than {{limit}} tokens, and not all need both ranks {_SHARE}"
_MOST = f"a token needs at least half of the ranks {_SHARE}"
_FIXED = "{transport} moves buffers of fixed shapes only"
_SPARSE = f"a token needs less than half of the ranks {_SHARE}"


class Auto:
    """Strategy `auto`, for ranks with tokens of their own.

    - Every rank has every expert: `local`. Of rows that were spread, ranks would still
      read nearly as many experts each, and all of them are busy with rows anyway. A
      caller that knows better of a pass says so (`Step.is_shared`).
    - 2 ranks: an all-to-all is one collective that moves nothing unwanted.
      `low_latency` where no rank has more than `low_latency_tokens` tokens; above, in
      rounds of `round_tokens`, the same with all tokens where nearly every token
      needs both ranks (K of 4 and more: picking out the others costs more than moving
      them), else `normal`.
    - More ranks: there, an all-to-all is point-to-point transfers one by one, or a
      gather of everything. `gathered`, unless a token needs less than half of the
      ranks, the transport can move exact rows and there are enough tokens for that to
      matter (above `low_latency_tokens`): then `normal`.

    T is the largest of all ranks, so that all choose alike, also a rank without tokens.
    """

    is_sharded = True
    needs_tokens = True
    can_share = True  # it reads `ExchangeRequest.is_shared`
    honours_dispatch_dtype = True

    def __init__(
        self, config: EPConfig | None = None, mover: Mover | None = None
    ) -> None:
        config, mover = config or EPConfig(), mover or Mover()
        self.round_tokens: int | None = config.round_tokens
        self.mover = mover
        self.local = Local()
        self.gathered = Gathered(config.round_tokens, mover)
        self.low_latency = LowLatency(config.low_latency_tokens, mover)
        # Agreed counts fix its shapes, and rounds bound them: no capacity is needed.
        self.dense = LowLatency(sys.maxsize, mover)
        self.normal = Normal(config.round_tokens, mover)

    def sends_nothing(self, placement: Placement) -> bool:
        """Whether no rank waits for another in a layer that is placed so."""
        return placement.num_ranks > 1 and placement.is_everywhere

    def choose(self, tokens: TokenCounts, top_k: int, transport: str) -> Strategy:
        """The strategy for these numbers, where a rank lacks experts."""
        chosen: Strategy = getattr(self, self._rule(tokens, top_k, transport)[0])
        return chosen

    @property
    def options(self) -> dict[str, Strategy]:
        """What it chooses from; low_latency without a limit to the tokens."""
        return {
            "gathered": self.gathered,
            "low_latency": self.dense,
            "normal": self.normal,
        }

    def explain(
        self,
        tokens: TokenCounts,
        top_k: int,
        transport: str,
        placement: Placement | None = None,
    ) -> str:
        """The choice and its reason, for a person."""
        name, why = self._rule(tokens, top_k, transport)
        if placement is not None and self.sends_nothing(placement):
            name, why = "local", _EVERYWHERE
        return f"{_TITLES[name]}, because " + why.format(
            limit=self.low_latency.capacity,
            share=expected_share(top_k, len(tokens.per_rank)),
            top_k=top_k,
            transport=transport,
        )

    def _rule(self, tokens: TokenCounts, top_k: int, transport: str) -> tuple[str, str]:
        """The attribute that holds the strategy, and the reason's template."""
        num_ranks = len(tokens.per_rank)
        is_small = tokens.largest <= self.low_latency.capacity
        if num_ranks <= 2:
            if is_small:
                return "low_latency", _SMALL
            if expected_share(top_k, num_ranks) > 0.9:
                return "dense", _DENSE
            return "normal", _PARTLY
        if expected_share(top_k, num_ranks) >= 0.5:
            return "gathered", _MOST
        if CAPABILITIES[transport].is_fixed_shape:
            return "gathered", _FIXED
        return ("gathered", _SMALL) if is_small else ("normal", _SPARSE)

    def exchange(self, request: ExchangeRequest) -> Exchange:
        """See `Strategy.exchange`: that of the strategy that is chosen."""
        if self.sends_nothing(request.placement) and not request.is_shared:
            return self.local.exchange(request)
        assert request.tokens is not None
        top_k = request.routing.gates.shape[1]
        chosen = self.choose(request.tokens, top_k, request.comm.transport)
        return chosen.exchange(request)

    def traffic(self, shape: ExchangeShape) -> ExchangeTraffic:
        """See `Strategy.traffic`."""
        chosen = self.choose(shape.tokens, shape.top_k, shape.transport)
        return chosen.traffic(shape)
