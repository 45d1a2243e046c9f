"""All-to-all of fixed shapes, for decoding: no counts, no host sync."""

from __future__ import annotations

import mlx.core as mx
from jaxtyping import Float, Float32

from mlx_ep.comm import Comm
from mlx_ep.config import EPConfig
from mlx_ep.exchange.base import (
    Collective,
    ExchangeShape,
    Traffic,
    check_tokens,
    swap_with_peer,
)
from mlx_ep.exchange.gathered import GatherPlan, gather_rows, gather_traffic
from mlx_ep.placement import Placement
from mlx_ep.rows import Mover
from mlx_ep.types import Routing, Rows, TokenCounts


class LowLatency:
    """Mode `low_latency` of strategy `all_to_all`.

    Every rank pads to C tokens: what the ranks agreed on, where the caller knows it,
    else `low_latency_tokens`. Every pair of ranks exchanges C rows, so that all shapes
    follow from C alone. The C rows for one rank are those for any other one, which
    makes the dispatch an all_gather: as many bytes as an all-to-all, on every
    transport one collective.

    Back comes one row per (token, rank), in the dtype of the tokens: the sum over a
    rank's slots is accumulated in float32 and rounded once, and the P rounded sums are
    added in float32, in rank order. In bfloat16 that moves half of what float32 would
    for an error of the size that rounding the result itself makes.
    """

    is_sharded = True
    needs_tokens = False
    round_tokens: int | None = None

    def __init__(
        self,
        config: EPConfig | None = None,
        capacity: int | None = None,
        mover: Mover | None = None,
    ) -> None:
        self.capacity = capacity or (config or EPConfig()).low_latency_tokens
        self.mover = mover or Mover()

    def plan(
        self,
        routing: Routing,
        placement: Placement,
        comm: Comm,
        tokens: TokenCounts | None = None,
    ) -> GatherPlan:
        """See `Strategy.plan`.

        Raises:
            ValueError: a rank has more tokens than `low_latency_tokens`. Where the
                caller gave no `tokens`, only that rank can know.
        """
        num_tokens = routing.gates.shape[0]
        if tokens is not None:
            check_tokens(tokens, num_tokens, comm)
        most = num_tokens if tokens is None else tokens.largest
        if most > self.capacity:
            raise ValueError(
                f"all_to_all in mode low_latency takes at most {self.capacity} tokens "
                f"of a rank (low_latency_tokens={self.capacity}); got {most}. Raise "
                "low_latency_tokens (--low-latency-tokens), or use mode normal or auto."
            )
        return GatherPlan(routing, placement, self.capacity if tokens is None else most)

    def dispatch(self, x: Float[mx.array, "T D"], plan: GatherPlan, comm: Comm) -> Rows:
        """See `gather_rows`."""
        return gather_rows(x, plan, comm)

    def combine(
        self,
        partial: Float32[mx.array, "M D"],
        plan: GatherPlan,
        comm: Comm,
        dtype: mx.Dtype,
    ) -> Float32[mx.array, "T D"]:
        """See `Strategy.combine`.

        (r0,t0) (r0,t1) (r1,t0) (r1,t1)  sums of this rank's slots, by home rank
          ->  (s0,t0) (s0,t1) (s1,t0) (s1,t1)  sums of its own tokens, by slots' rank
        """
        capacity = plan.padded_tokens
        if comm.size == 2:
            first = (1 - comm.rank) * capacity
            sent = partial[first : first + capacity].astype(dtype)
            back = swap_with_peer(sent, comm)
        else:
            back = comm.all_to_all(partial.astype(dtype))
        movement = self.mover("ranks", capacity)
        total = movement.add_ranks(partial, back, comm.rank, comm.size)
        return total[: plan.num_tokens]

    def traffic(self, shape: ExchangeShape) -> Traffic:
        """See `Strategy.traffic`; with `tokens` given to `plan`."""
        largest, num_ranks = shape.tokens.largest, shape.num_ranks
        chunk = largest * shape.sum_bytes
        if num_ranks == 2:
            back = Collective("all_gather", chunk)
        else:
            back = Collective("all_to_all", num_ranks * chunk)
        collectives = [*gather_traffic(shape, largest), back]
        rows = shape.tokens.per_rank[shape.rank] * shape.num_ranks
        return Traffic(tuple(collectives), rows)
