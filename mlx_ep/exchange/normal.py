"""All-to-all of exactly the rows that are needed: the routing first, then the rows."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
from jaxtyping import Float, Float32, Int32

from mlx_ep.comm import Comm
from mlx_ep.config import EPConfig
from mlx_ep.exchange.base import (
    Collective,
    ExchangeShape,
    Traffic,
    check_tokens,
    depends_on,
    expected_rows,
    swap_with_peer,
)
from mlx_ep.placement import Placement
from mlx_ep.rows import (
    Movement,
    Mover,
    RowPlan,
    pad_routing,
    routing_from_words,
    routing_words,
)
from mlx_ep.types import Routing, Rows, TokenCounts


@dataclass(frozen=True)
class NormalPlan:
    """Which rows leave and arrive, known on every rank.

    Attributes:
        rows: those that leave and those that arrive.
        movement: what made `rows`, packs them and sums them.
        slot_ids: of the rows of this rank: its own T tokens, then the rows that
            arrive, rank 0's first.
        gates: likewise.
        num_tokens: T.
    """

    rows: RowPlan
    movement: Movement
    slot_ids: Int32[mx.array, "M K"]
    gates: Float32[mx.array, "M K"]
    num_tokens: int


class Normal:
    """Mode `normal` of strategy `all_to_all`.

    The plan gathers everybody's routing, 8 * K bytes a token (0.4% of a row at K=8,
    D=7168, bfloat16): all counts follow from it, and so do the slot ids and gates of
    the rows that arrive. Then exactly the rows that a rank needs travel to it. Tokens
    that need their own rank are not moved. On 2 ranks both directions are padded to the
    longer one, which both know: a cable is as busy as its busier direction anyway.

    Sums travel back in the dtype of the tokens, as in mode `low_latency`.
    """

    is_sharded = True
    needs_tokens = True

    def __init__(
        self, config: EPConfig | None = None, mover: Mover | None = None
    ) -> None:
        self.round_tokens: int | None = (config or EPConfig()).round_tokens
        self.mover = mover or Mover()

    def plan(
        self,
        routing: Routing,
        placement: Placement,
        comm: Comm,
        tokens: TokenCounts | None,
    ) -> NormalPlan:
        """See `Strategy.plan`. One collective and one host sync."""
        assert tokens is not None
        num_tokens, rank = routing.gates.shape[0], comm.rank
        check_tokens(tokens, num_tokens, comm)
        words = comm.all_gather(routing_words(pad_routing(routing, tokens.largest)))
        everyone = routing_from_words(words)  # [P*C K]
        movement = self.mover("rows", tokens.largest)
        leaving = movement.plan_rows(everyone.expert_ids, placement, rank, tokens)
        lines = leaving.arriving
        expert_ids = mx.concatenate([routing.expert_ids, everyone.expert_ids[lines]])
        return NormalPlan(
            rows=leaving,
            movement=movement,
            slot_ids=placement.local_slots(expert_ids, rank),
            gates=mx.concatenate([routing.gates, everyone.gates[lines]]),
            num_tokens=num_tokens,
        )

    def dispatch(self, x: Float[mx.array, "T D"], plan: NormalPlan, comm: Comm) -> Rows:
        """This rank's tokens, then the rows that arrive.

        (t0) (t1) (t2)  ->  (t0) (t1) (t2) (r1,t0) (r1,t3) (r2,t1)   on rank 0
        """
        counts = plan.rows.send_counts
        if comm.size == 2:
            # What both send is padded to the longer of the two.
            arrived = plan.movement.pack(x, plan.rows, plan.rows.widest)
            if plan.rows.widest:
                received = plan.rows.recv_counts[1 - comm.rank]
                arrived = swap_with_peer(arrived, comm)[:received]
        else:
            sent = plan.movement.pack(x, plan.rows, sum(counts))
            arrived = comm.all_to_all_v(sent, counts, plan.rows.recv_counts)
        rows = Rows(mx.concatenate([x, arrived]), plan.slot_ids, plan.gates)
        return depends_on(rows, arrived)

    def combine(
        self,
        partial: Float32[mx.array, "M D"],
        plan: NormalPlan,
        comm: Comm,
        dtype: mx.Dtype,
    ) -> Float32[mx.array, "T D"]:
        """See `Strategy.combine`; sums are added in rank order."""
        own, counts = partial[: plan.num_tokens], plan.rows.send_counts
        widest = plan.rows.widest
        if comm.size == 2 and not widest:
            return own
        if comm.size == 2:
            # The last rows are those that the peer waits for; in front of them, rows
            # of this rank's own tokens serve as padding.
            sent = partial[partial.shape[0] - widest :].astype(dtype)
            back = swap_with_peer(sent, comm)
            back = back[widest - counts[1 - comm.rank] :]
        else:
            others = partial[plan.num_tokens :].astype(dtype)
            back = comm.all_to_all_v(others, plan.rows.recv_counts, counts)
        total = plan.movement.add_rows(own, back, plan.rows, comm.rank)
        # Also a rank that gets no sums back has to join in sending them.
        return mx.depends(total, back)

    def traffic(self, shape: ExchangeShape) -> Traffic:
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
        return Traffic(tuple(collectives), num_rows, host_syncs=1)


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
