"""Every rank has every expert and computes its own tokens: nothing is sent."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Float32, Integer

from mlx_ep.exchange.base import ExchangeRequest, ExchangeShape, ExchangeTraffic
from mlx_ep.placement import Placement, check_everywhere
from mlx_ep.types import CompleteRouting, CompleteRows, Rows


class LocalExchange(NamedTuple):
    """Rows are this rank's tokens, in their order (M = T).

    Attributes:
        slot_ids: of this rank's copies.
        gates: of every token.
        is_complete: rows are `CompleteRows`.
    """

    slot_ids: Integer[mx.array, "T K"]
    gates: Float32[mx.array, "T K"]
    is_complete: bool

    def dispatch(self, x: Float[mx.array, "T D"]) -> Rows:
        """See `Exchange.dispatch`."""
        kind = CompleteRows if self.is_complete else Rows
        return kind(x, self.slot_ids, self.gates)

    def combine(self, partial: Float[mx.array, "T D"]) -> Float[mx.array, "T D"]:
        """See `Exchange.combine`: the sum is whole."""
        return partial


class Local:
    """Strategy `local`, for ranks with tokens of their own that have every expert.

    Plain data parallelism: no rank waits for another, and one without tokens has
    nothing to do in a step.
    """

    is_sharded = True
    needs_tokens = False
    round_tokens: int | None = None

    def sends_nothing(self, placement: Placement) -> bool:
        """Whether no rank waits for another in a layer that is placed so."""
        return True

    def exchange(self, request: ExchangeRequest) -> LocalExchange:
        """See `Strategy.exchange`.

        Raises:
            ValueError: a rank lacks experts.
        """
        placement, routing = request.placement, request.routing
        check_everywhere(placement)
        rank = request.comm.rank
        return LocalExchange(
            placement.own_slots(routing.expert_ids, rank),
            routing.gates,
            isinstance(routing, CompleteRouting) and placement.has_all_in_order(rank),
        )

    def traffic(self, shape: ExchangeShape) -> ExchangeTraffic:
        """See `Strategy.traffic`: none."""
        return ExchangeTraffic((), shape.tokens.per_rank[shape.rank])
