"""Every rank gets all tokens, computes its slots, and the sums are reduce-scattered."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float

from mlx_ep.exchange.base import (
    Collective,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
    beside_collectives,
    depends_on,
    padded,
)
from mlx_ep.rows import (
    Mover,
    RowForm,
    join_rows,
    pad_routing,
    routing_from_words,
    routing_words,
    serving_local_slots,
    split_rows,
)
from mlx_ep.types import Rows

# Up to here tokens and their routing travel in one buffer, which saves a collective and
# costs a copy; above, they travel in two.
JOIN_BYTES = 1 << 18


def gather_rows(
    x: Float[mx.array, "T D"],
    request: ExchangeRequest,
    padded_tokens: int,
    form: RowForm,
) -> Rows:
    """All tokens of all ranks as rows (M = P*C), padding included.

        rank 0: t0 t1    rank 1: t0 --   ->   (r0,t0) (r0,t1) (r1,t0) (r1,--)

    A row of padding has no slot. So has a token that needs no expert of this rank.

    Args:
        padded_tokens: C, to which every rank pads its tokens.
        form: in which the tokens travel; this rank's own take it too.
    """
    comm = request.comm
    sent = padded(form.leave(x), padded_tokens)
    routing = pad_routing(request.routing, padded_tokens)
    if sent.nbytes <= JOIN_BYTES:
        rows = comm.all_gather(join_rows(sent, routing))
        everyone, routing = split_rows(rows, sent.shape[1], sent.dtype)
    else:
        words = comm.all_gather(routing_words(routing))
        # Collectives run in the order of the graph: this one has to come second.
        everyone = comm.all_gather(mx.depends(sent, words))
        routing = routing_from_words(words)
    everyone = form.arrive(everyone, x.shape[1], x.dtype)
    placement, levels = request.placement, request.levels_rows
    ids = routing.expert_ids
    slot_ids = serving_local_slots(ids, placement, comm.rank, levels)
    return depends_on(Rows(everyone, slot_ids, routing.gates), everyone)


def gather_traffic(shape: ExchangeShape, padded_tokens: int) -> list[Collective]:
    """The collectives of `gather_rows`."""
    x = padded_tokens * shape.row_bytes
    words = padded_tokens * shape.top_k * 8  # an int32 id and a float32 gate
    sizes = [x + words] if x <= JOIN_BYTES else [words, x]
    return [Collective("all_gather", size) for size in sizes]


@dataclass(frozen=True)
class GatheredExchange:
    """All tokens come, sums go back to where their tokens are.

    Attributes:
        request: what was asked for.
        padded_tokens: C, to which every rank pads its tokens.
        form: in which tokens travel.
    """

    request: ExchangeRequest
    padded_tokens: int
    form: RowForm

    @beside_collectives
    def dispatch(self, x: Float[mx.array, "T D"]) -> Rows:
        """See `gather_rows`."""
        return gather_rows(x, self.request, self.padded_tokens, self.form)

    @beside_collectives
    def combine(self, partial: Float[mx.array, "M D"]) -> Float[mx.array, "T D"]:
        """See `Exchange.combine`."""
        total = self.request.comm.reduce_scatter(partial)
        return total[: self.request.num_tokens]


class Gathered:
    """Strategy `gathered`: all_gather of tokens, reduce_scatter of sums.

    Static shapes and no host sync once the ranks agree on T. Sums are added by the
    transport, so they travel in float32: in the model's dtype every addition on the
    way would round.

    Args:
        round_tokens: see `Strategy`.
        mover: makes tokens ready where they travel in 8 bits a value. Nothing else is
            moved here: the transport adds.
    """

    is_sharded = True
    needs_tokens = True
    honours_dispatch_dtype = True

    def __init__(
        self, round_tokens: int | None = None, mover: Mover | None = None
    ) -> None:
        self.round_tokens = round_tokens
        # Not `mover`, by which strategies are known that pack and add rows.
        self.format_mover = mover or Mover()

    def exchange(self, request: ExchangeRequest) -> GatheredExchange:
        """See `Strategy.exchange`."""
        largest = request.agreed_tokens.largest
        form = RowForm.of(request.dispatch_dtype, self.format_mover, largest)
        return GatheredExchange(request, largest, form)

    def traffic(self, shape: ExchangeShape) -> ExchangeTraffic:
        """See `Strategy.traffic`."""
        num_ranks, largest = shape.num_ranks, shape.tokens.largest
        sums = Collective("reduce_scatter", 4 * num_ranks * largest * shape.width)
        rows = shape.tokens.per_rank[shape.rank] * num_ranks
        return ExchangeTraffic((*gather_traffic(shape, largest), sums), rows)
