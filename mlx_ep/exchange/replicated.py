"""Every rank holds the same tokens: no dispatch, and one all_sum completes the sum."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Float32, Integer

from mlx_ep.comm import Comm
from mlx_ep.exchange.base import (
    Collective,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
)
from mlx_ep.rows import serving_local_slots
from mlx_ep.types import CompleteRouting, CompleteRows, Rows


class ReplicatedExchange(NamedTuple):
    """Rows are the tokens themselves, in their order (M = T).

    Attributes:
        slot_ids: this rank's slots of every token.
        gates: of every token.
        is_complete: rows are `CompleteRows`.
    """

    slot_ids: Integer[mx.array, "T K"]
    gates: Float32[mx.array, "T K"]
    is_complete: bool
    comm: Comm

    def dispatch(self, x: Float[mx.array, "T D"]) -> Rows:
        """See `Exchange.dispatch`."""
        kind = CompleteRows if self.is_complete else Rows
        return kind(x, self.slot_ids, self.gates)

    def combine(self, partial: Float[mx.array, "T D"]) -> Float[mx.array, "T D"]:
        """See `Exchange.combine`."""
        return self.comm.all_reduce(partial)


class Replicated:
    """Strategy `replicated`.

    Moves ``4 * T * D`` bytes of partial sums per layer in one all_sum.
    """

    is_sharded = False
    needs_tokens = False
    round_tokens: int | None = None

    def exchange(self, request: ExchangeRequest) -> ReplicatedExchange:
        """See `Strategy.exchange`."""
        placement, comm, routing = request.placement, request.comm, request.routing
        is_complete = isinstance(routing, CompleteRouting)
        slots, levels = placement.slots, request.levels_rows
        ids, gates = routing.expert_ids, routing.gates
        return ReplicatedExchange(
            serving_local_slots(ids, placement, comm.rank, levels, read_too=[gates]),
            gates,
            is_complete and slots.has_all_in_order(comm.rank),
            comm,
        )

    def traffic(self, shape: ExchangeShape) -> ExchangeTraffic:
        """See `Strategy.traffic`."""
        num_tokens = shape.tokens.per_rank[shape.rank]
        reduced = Collective("all_reduce", 4 * num_tokens * shape.width)
        return ExchangeTraffic((reduced,), num_tokens)
