"""Every rank holds the same tokens: no dispatch, and one all_sum completes the sum."""

from __future__ import annotations

import mlx.core as mx
from jaxtyping import Float, Float32

from mlx_ep.comm import Comm
from mlx_ep.config import EPConfig
from mlx_ep.exchange.base import Collective, ExchangeShape, Traffic
from mlx_ep.placement import Placement
from mlx_ep.types import Routing, Rows, TokenCounts


class Replicated:
    """Strategy `replicated`: rows are the tokens themselves, in their order (M = T).

    Moves ``4 * T * D`` bytes of partial sums per layer in one all_sum.
    """

    is_sharded = False
    needs_tokens = False
    round_tokens: int | None = None

    def __init__(self, config: EPConfig | None = None) -> None:
        pass

    def plan(
        self,
        routing: Routing,
        placement: Placement,
        comm: Comm,
        tokens: TokenCounts | None = None,
    ) -> Routing:
        """This rank's slots of every token, in the place of the expert ids."""
        slot_ids = placement.local_slots(routing.expert_ids, comm.rank)
        return Routing(slot_ids, routing.gates)

    def dispatch(self, x: Float[mx.array, "T D"], plan: Routing, comm: Comm) -> Rows:
        """See `Strategy.dispatch`."""
        return Rows(x, plan.expert_ids, plan.gates)

    def combine(
        self,
        partial: Float32[mx.array, "T D"],
        plan: Routing,
        comm: Comm,
        dtype: mx.Dtype = mx.float32,
    ) -> Float32[mx.array, "T D"]:
        """See `Strategy.combine`."""
        return comm.all_reduce(partial)

    def traffic(self, shape: ExchangeShape) -> Traffic:
        """See `Strategy.traffic`."""
        num_tokens = shape.tokens.per_rank[shape.rank]
        reduced = Collective("all_reduce", 4 * num_tokens * shape.width)
        return Traffic((reduced,), num_tokens)
