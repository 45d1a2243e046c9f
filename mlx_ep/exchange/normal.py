"""All-to-all of exactly the rows that are needed: the routing first, then the rows."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Float32, Int32

from mlx_ep.exchange.base import (
    Collective,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
    beside_collectives,
    depends_on,
    expected_rows,
    swap_with_peer,
)
from mlx_ep.rows import (
    Movement,
    Mover,
    RowForm,
    RowRoutes,
    join,
    pad_routing,
    routing_from_words,
    routing_words,
    serving_slots,
)
from mlx_ep.types import Rows


@dataclass(frozen=True)
class NormalExchange:
    """Which rows leave and arrive, known on every rank.

    Attributes:
        request: what was asked for.
        rows: those that leave and those that arrive.
        movement: what made `rows`, packs them and sums them.
        form: in which rows travel.
        slot_ids: of the rows of this rank: its own T tokens, then the rows that
            arrive, rank 0's first.
        gates: likewise.
    """

    request: ExchangeRequest
    rows: RowRoutes
    movement: Movement
    form: RowForm
    slot_ids: Int32[mx.array, "M K"]
    gates: Float32[mx.array, "M K"]

    @beside_collectives
    def dispatch(self, x: Float[mx.array, "T D"]) -> Rows:
        """This rank's tokens, then the rows that arrive.

        (t0) (t1) (t2)  ->  (t0) (t1) (t2) (r1,t0) (r1,t3) (r2,t1)   on rank 0

        Rows that stay take the form in which others travel, too: what a token's sum
        is does not depend on where its experts are.
        """
        comm, counts = self.request.comm, self.rows.send_counts
        ready = self.form.leave(x)
        if comm.size == 2:
            # What both send is padded to the longer of the two.
            arrived = self.movement.pack(ready, self.rows, self.rows.widest)
            if self.rows.widest:
                received = self.rows.recv_counts[1 - comm.rank]
                arrived = swap_with_peer(arrived, comm)[:received]
        else:
            sent = self.movement.pack(ready, self.rows, sum(counts))
            arrived = comm.all_to_all_v(sent, counts, self.rows.recv_counts)
        everyone = self.form.arrive(join([ready, arrived]), x.shape[1], x.dtype)
        rows = Rows(everyone, self.slot_ids, self.gates)
        return depends_on(rows, arrived)

    @beside_collectives
    def combine(self, partial: Float32[mx.array, "M D"]) -> Float32[mx.array, "T D"]:
        """See `Exchange.combine`; sums are added in rank order."""
        comm, dtype = self.request.comm, self.request.sum_dtype
        num_tokens = self.request.num_tokens
        own, counts = partial[:num_tokens], self.rows.send_counts
        widest = self.rows.widest
        if comm.size == 2 and not widest:
            return own
        if comm.size == 2:
            # The last rows are those that the peer waits for; in front of them, rows
            # of this rank's own tokens serve as padding.
            sent = partial[partial.shape[0] - widest :].astype(dtype)
            back = swap_with_peer(sent, comm)
            back = back[widest - counts[1 - comm.rank] :]
        else:
            others = partial[num_tokens:].astype(dtype)
            back = comm.all_to_all_v(others, self.rows.recv_counts, counts)
        total = self.movement.add_rows(own, back, self.rows, comm.rank)
        # Also a rank that gets no sums back has to join in sending them.
        return mx.depends(total, back)


class Normal:
    """Mode `normal` of strategy `all_to_all`.

    An exchange begins by gathering everybody's routing, 8 * K bytes a token (0.4% of a
    row at K=8, D=7168, bfloat16): all counts follow from it, and so do the slot ids and
    gates of the rows that arrive. Then exactly the rows that a rank needs travel to it.
    Tokens that need their own rank are not moved. On 2 ranks both directions are padded
    to the longer one, which both know: a cable is as busy as its busier direction
    anyway.

    Sums travel back in the dtype of the tokens, as in mode `low_latency`.

    Args:
        round_tokens: see `Strategy`.
        mover: packs rows and adds up sums.
    """

    is_sharded = True
    needs_tokens = True
    honours_dispatch_dtype = True

    def __init__(self, round_tokens: int | None, mover: Mover) -> None:
        self.round_tokens = round_tokens
        self.mover = mover

    def exchange(self, request: ExchangeRequest) -> NormalExchange:
        """See `Strategy.exchange`. One collective and one host sync."""
        tokens, routing = request.agreed_tokens, request.routing
        comm, placement = request.comm, request.placement
        movement = self.mover("rows", tokens.largest)
        form = RowForm.of(request.dispatch_dtype, self.mover, tokens.largest)
        with comm.beside():
            words = routing_words(pad_routing(routing, tokens.largest))
            everyone = routing_from_words(comm.all_gather(words))  # [P*C K]
            levels = request.levels_rows
            served = serving_slots(everyone.expert_ids, placement, levels)
            rows = movement.plan_rows(served, placement.slots, comm.rank, tokens)
            lines, first = rows.arriving, comm.rank * tokens.largest
            own = served[first : first + request.num_tokens]
            slots = mx.concatenate([own, served[lines]])
            return NormalExchange(
                request=request,
                rows=rows,
                movement=movement,
                form=form,
                slot_ids=placement.slots.local_slots(slots, comm.rank),
                gates=mx.concatenate([routing.gates, everyone.gates[lines]]),
            )

    def traffic(self, shape: ExchangeShape) -> ExchangeTraffic:
        """See `Strategy.traffic`."""
        sent, received = _rows(shape)
        collectives = [Collective("all_gather", 8 * shape.top_k * shape.tokens.largest)]
        if shape.num_ranks != 2:
            collectives.append(Collective("all_to_all_v", shape.row_bytes * sent))
            collectives.append(Collective("all_to_all_v", shape.sum_bytes * received))
        elif widest := max(sent, received):
            collectives.append(Collective("all_gather", shape.row_bytes * widest))
            collectives.append(Collective("all_gather", shape.sum_bytes * widest))
        num_rows = shape.tokens.per_rank[shape.rank] + sent
        return ExchangeTraffic(tuple(collectives), num_rows, host_syncs=1)


def _rows(shape: ExchangeShape) -> tuple[int, int]:
    """Rows that leave the rank and rows that arrive."""
    per_rank, rank = shape.tokens.per_rank, shape.rank
    others = [peer for peer in range(shape.num_ranks) if peer != rank]

    def expected(num_tokens: int) -> int:
        return expected_rows(num_tokens, shape.top_k, shape.num_ranks)

    if shape.rows_to is None:
        sent = len(others) * expected(per_rank[rank])
    else:
        sent = sum(shape.rows_to[peer] for peer in others)
    if shape.rows_from is None:
        received = sum(expected(per_rank[peer]) for peer in others)
    else:
        received = sum(shape.rows_from[peer] for peer in others)
    return sent, received
