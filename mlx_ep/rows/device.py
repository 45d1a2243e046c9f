"""Movement `metal`: the kernels route_plan, pack_rows and unpack_sum."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32, Shaped, UInt32

from mlx_ep.kernels import RowFormat, metal
from mlx_ep.placement import Placement
from mlx_ep.rows.movement import RowRoutes
from mlx_ep.types import TokenCounts, to_host


class DeviceRows(NamedTuple):
    """What stays on the device between plan, pack and sum.

    Attributes:
        tokens: the token of each row that leaves, rank-major.
        row_ids: of each token and rank the row that comes back, -1 where none does;
            behind the rows that come back, the token's own sum.
    """

    tokens: Int32[mx.array, " M"]
    row_ids: Int32[mx.array, "T P"]


class MetalMovement:
    """Only the counts come to the host, P * P numbers; ids and rows stay on the GPU."""

    def __init__(self) -> None:
        self._placement: Placement | None = None
        self._maps: tuple[mx.array, mx.array] | None = None

    @staticmethod
    def why_not(width: int, placement: Placement) -> str:
        """Why the kernels cannot move such rows between these ranks, or ""."""
        if width < metal.MIN_WIDTH:
            return f"rows are narrower than {metal.MIN_WIDTH}"
        if placement.num_ranks > metal.MAX_RANKS:
            return f"there are more than {metal.MAX_RANKS} ranks"
        if not has_one_rank_per_expert(placement):
            return "an expert lives on several ranks, and route_plan sends to one"
        return ""

    def plan_rows(
        self,
        expert_ids: Int32[mx.array, "N K"],
        placement: Placement,
        rank: int,
        tokens: TokenCounts,
    ) -> RowRoutes:
        """See `Movement.plan_rows`.

        Raises:
            ValueError: the placement is not one that `why_not` allows.
        """
        num_ranks, largest = len(tokens.per_rank), tokens.largest
        ranks, slots = self._maps_of(placement)
        plan = metal.route_plan(
            expert_ids, ranks, slots, num_ranks=num_ranks, num_slots=1
        )
        visits = (plan.token_rows >= 0).reshape(num_ranks, largest, num_ranks)
        # sync: how many rows go where decides the shapes of what is exchanged.
        counts = to_host(visits.astype(mx.int32).sum(axis=1))  # [home, rank]
        # Rows are numbered by rank, then home, then token: where each run starts.
        starts = np.cumsum(counts.T).reshape(counts.T.shape).T - counts
        others = [peer for peer in range(num_ranks) if peer != rank]

        def runs(pairs: list[tuple[int, int]]) -> mx.array:
            parts = [
                plan.row_tokens[int(starts[p]) : int(starts[p] + counts[p])]
                for p in pairs
            ]
            if not parts:
                return mx.zeros((0,), mx.int32)
            return mx.concatenate(parts)

        leaving = np.where(np.arange(num_ranks) == rank, 0, counts[rank])
        coming = np.where(np.arange(num_ranks) == rank, 0, counts[:, rank])
        # From a row's number in the plan to its place among those that leave.
        shifts = np.cumsum(leaving) - leaving - starts[rank]
        own_lines = slice(rank * largest, rank * largest + tokens.per_rank[rank])
        token_rows = plan.token_rows[own_lines]
        row_ids = mx.where(
            token_rows >= 0, token_rows + mx.array(shifts.astype(np.int32)), -1
        )
        own_sums = int(leaving.sum()) + mx.arange(tokens.per_rank[rank])[:, None]
        is_own = mx.array(np.arange(num_ranks) == rank)
        return RowRoutes(
            send_counts=tuple(leaving.tolist()),  # on host
            recv_counts=tuple(coming.tolist()),  # on host
            arriving=runs([(peer, rank) for peer in others]),
            own=DeviceRows(
                tokens=runs([(rank, peer) for peer in others]) - rank * largest,
                row_ids=mx.where(is_own, own_sums, row_ids).astype(mx.int32),
            ),
        )

    def pack(
        self, x: Shaped[mx.array, "T D"], plan: RowRoutes, num_rows: int
    ) -> Shaped[mx.array, "M D"]:
        """See `Movement.pack`."""
        rows: DeviceRows = plan.own
        count = rows.tokens.shape[0]
        if not count:
            return mx.zeros((num_rows, x.shape[1]), x.dtype)
        tokens = rows.tokens
        if count < num_rows:
            tokens = mx.pad(tokens, (0, num_rows - count), constant_values=-1)
        return metal.pack_rows(x, tokens, mx.array([count], mx.int32))

    def add_rows(
        self,
        own: Float32[mx.array, "T D"],
        back: Float[mx.array, "M D"],
        plan: RowRoutes,
        rank: int,
    ) -> Float32[mx.array, "T D"]:
        """See `Movement.add_rows`; `own` and `back` are read where they are."""
        rows: DeviceRows = plan.own
        if not back.shape[0]:
            return own
        gates = mx.ones(rows.row_ids.shape)
        return metal.unpack_sum(back, rows.row_ids, gates, own, dtype=mx.float32)

    def add_ranks(
        self,
        partial: Float32[mx.array, "M D"],
        back: Float[mx.array, "R D"],
        rank: int,
        num_ranks: int,
    ) -> Float32[mx.array, "C D"]:
        """See `Movement.add_ranks`; `partial` and `back` are read where they are."""
        num_tokens = partial.shape[0] // num_ranks
        row_ids, gates = _rank_ids(num_tokens, rank, num_ranks)
        return metal.unpack_sum(back, row_ids, gates, partial, dtype=mx.float32)

    def sum_pairs(
        self,
        outputs: Float[mx.array, "N D"],
        pair_ids: Int32[mx.array, "M C"],
        gates: Float32[mx.array, "M C"],
    ) -> Float32[mx.array, "M D"]:
        """See `Movement.sum_pairs`."""
        return metal.unpack_sum(outputs, pair_ids, gates, dtype=mx.float32)

    def to_format(
        self, x: Float[mx.array, "T D"], form: RowFormat
    ) -> UInt32[mx.array, "T W"]:
        """See `Movement.to_format`."""
        return metal.quantize_rows(x, form)

    def from_format(
        self,
        words: UInt32[mx.array, "M W"],
        form: RowFormat,
        width: int,
        dtype: mx.Dtype,
    ) -> Float[mx.array, "M D"]:
        """See `Movement.from_format`."""
        return metal.dequantize_rows(words, form, width, dtype)

    def _maps_of(self, placement: Placement) -> tuple[mx.array, mx.array]:
        """The rank of each expert for the kernel, and one slot for all.

        What is planned here are rows, which belong to ranks. Planning slots as well
        would have one more SIMD group per slot walk over everybody's ids.
        """
        if self._maps is None or self._placement is not placement:
            if not has_one_rank_per_expert(placement):
                raise ValueError(
                    "The kernel route_plan sends a token to one rank for each expert; "
                    "got a placement with experts on several. Use movement `ops`."
                )
            ranks = mx.array(placement.expert_ranks)[:, None]
            self._maps = ranks, mx.zeros_like(ranks)
            self._placement = placement
        return self._maps


def has_one_rank_per_expert(placement: Placement) -> bool:
    """Whether all of each expert is on one rank, and on no other one."""
    held = sum(placement.num_slots(rank) for rank in range(placement.num_ranks))
    return held == placement.num_experts


@lru_cache(maxsize=16)  # steps differ in their tokens, layers do not
def _rank_ids(
    num_tokens: int, rank: int, num_ranks: int
) -> tuple[Int32[mx.array, "C P"], Float32[mx.array, "C P"]]:
    """Where in `back`, and behind it in `partial`, each token's sums are; and ones."""
    peers = 1 if num_ranks == 2 else num_ranks
    chunk = np.zeros(num_ranks, np.int32) if num_ranks == 2 else np.arange(num_ranks)
    chunk[rank] = peers + rank
    ids = chunk * num_tokens + np.arange(num_tokens)[:, None]
    return mx.array(ids.astype(np.int32)), mx.array(np.ones(ids.shape, np.float32))
