"""All-to-all of fixed shapes, for decoding: no counts, no host sync."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Float32

from mlx_ep.exchange.base import (
    Collective,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
    beside_collectives,
    swap_with_peer,
)
from mlx_ep.exchange.gathered import gather_rows, gather_traffic
from mlx_ep.rows import Movement, Mover, RowForm
from mlx_ep.types import Rows


@dataclass(frozen=True)
class LowLatencyExchange:
    """Every pair of ranks exchanges C rows.

    Attributes:
        request: what was asked for.
        padded_tokens: C, to which every rank pads its tokens.
        movement: what adds up sums at home.
        form: in which tokens travel.
    """

    request: ExchangeRequest
    padded_tokens: int
    movement: Movement
    form: RowForm

    @beside_collectives
    def dispatch(self, x: Float[mx.array, "T D"]) -> Rows:
        """See `gather_rows`."""
        return gather_rows(x, self.request, self.padded_tokens, self.form)

    @beside_collectives
    def combine(self, partial: Float32[mx.array, "M D"]) -> Float32[mx.array, "T D"]:
        """See `Exchange.combine`.

        (r0,t0) (r0,t1) (r1,t0) (r1,t1)  sums of this rank's slots, by home rank
          ->  (s0,t0) (s0,t1) (s1,t0) (s1,t1)  sums of its own tokens, by slots' rank
        """
        comm, dtype = self.request.comm, self.request.sum_dtype
        if comm.size == 2:
            first = (1 - comm.rank) * self.padded_tokens
            sent = partial[first : first + self.padded_tokens].astype(dtype)
            back = swap_with_peer(sent, comm)
        else:
            back = comm.all_to_all(partial.astype(dtype))
        total = self.movement.add_ranks(partial, back, comm.rank, comm.size)
        return total[: self.request.num_tokens]


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

    Args:
        capacity: the most tokens of a rank.
        mover: adds up sums at home.
    """

    is_sharded = True
    needs_tokens = False
    honours_dispatch_dtype = True
    round_tokens: int | None = None

    def __init__(self, capacity: int, mover: Mover) -> None:
        self.capacity = capacity
        self.mover = mover

    def exchange(self, request: ExchangeRequest) -> LowLatencyExchange:
        """See `Strategy.exchange`.

        Raises:
            ValueError: a rank has more tokens than the capacity. Where the caller gave
                no `tokens`, only that rank can know.
        """
        if request.tokens is None:
            most, padded_tokens = request.num_tokens, self.capacity
        else:
            most = padded_tokens = request.agreed_tokens.largest
        if most > self.capacity:
            raise ValueError(
                f"all_to_all in mode low_latency takes at most {self.capacity} tokens "
                f"of a rank (low_latency_tokens={self.capacity}); got {most}. Raise "
                "low_latency_tokens (--low-latency-tokens), or use mode normal or auto."
            )
        # The tokens that the mover is asked with are those that all ranks know.
        movement = self.mover("ranks", padded_tokens)
        form = RowForm.of(request.dispatch_dtype, self.mover, padded_tokens)
        return LowLatencyExchange(request, padded_tokens, movement, form)

    def traffic(self, shape: ExchangeShape) -> ExchangeTraffic:
        """See `Strategy.traffic`; for ranks that agreed on T."""
        largest, num_ranks = shape.tokens.largest, shape.num_ranks
        chunk = largest * shape.sum_bytes
        if num_ranks == 2:
            back = Collective("all_gather", chunk)
        else:
            back = Collective("all_to_all", num_ranks * chunk)
        collectives = [*gather_traffic(shape, largest), back]
        rows = shape.tokens.per_rank[shape.rank] * shape.num_ranks
        return ExchangeTraffic(tuple(collectives), rows)
