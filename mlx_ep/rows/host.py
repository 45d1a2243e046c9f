"""Movement `ops`: plans by NumPy on the host, everything else by MLX's own ops."""

from __future__ import annotations

from itertools import accumulate

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32, Shaped, UInt32

from mlx_ep.kernels import RowFormat, ops
from mlx_ep.placement import Placement
from mlx_ep.rows.movement import RowRoutes
from mlx_ep.rows.pack import RowOrder, pack, tokens_in_ranks
from mlx_ep.rows.sums import add_to, weighted_sum
from mlx_ep.rows.words import with_zeros
from mlx_ep.types import TokenCounts, to_host


class OpsMovement:
    """Works with every placement, width and dtype, wherever MLX computes."""

    def plan_rows(
        self,
        expert_ids: Int32[mx.array, "N K"],
        placement: Placement,
        rank: int,
        tokens: TokenCounts,
    ) -> RowRoutes:
        """See `Movement.plan_rows`."""
        num_ranks = len(tokens.per_rank)
        # sync: how many rows go where decides the shapes of what is exchanged.
        needed = to_host(tokens_in_ranks(expert_ids, placement))
        by_home = needed.reshape(num_ranks, tokens.largest, num_ranks)
        leaving = by_home[rank, : tokens.per_rank[rank]].copy()
        leaving[:, rank] = False
        arriving = by_home[:, :, rank].copy()
        arriving[rank] = False
        packing = pack(leaving)
        return RowRoutes(
            send_counts=packing.counts,
            recv_counts=tuple(arriving.sum(axis=1).tolist()),  # on host
            arriving=mx.array(np.flatnonzero(arriving.reshape(-1)).astype(np.int32)),
            own=packing,
        )

    def pack(
        self, x: Shaped[mx.array, "T D"], plan: RowRoutes, num_rows: int
    ) -> Shaped[mx.array, "M D"]:
        """See `Movement.pack`."""
        packing: RowOrder = plan.own
        if not num_rows or not len(x):
            return mx.zeros((num_rows, x.shape[1]), x.dtype)
        tokens = packing.tokens
        if len(tokens) < num_rows:
            tokens = np.zeros(num_rows, np.int32)  # any row will do behind the others
            tokens[: len(packing.tokens)] = packing.tokens
        return x[mx.array(tokens)]

    def add_rows(
        self,
        own: Float32[mx.array, "T D"],
        back: Float[mx.array, "M D"],
        plan: RowRoutes,
        rank: int,
    ) -> Float32[mx.array, "T D"]:
        """See `Movement.add_rows`."""
        packing: RowOrder = plan.own
        total: mx.array | None = None
        bounds = list(accumulate(plan.send_counts))[:-1]
        for peer, chunk in enumerate(mx.split(back, bounds)):
            term = own if peer == rank else _by_token(chunk, packing.positions[peer])
            total = term if total is None else add_to(total, term)
        assert total is not None
        return total.astype(mx.float32)

    def add_ranks(
        self,
        partial: Float32[mx.array, "M D"],
        back: Float[mx.array, "R D"],
        rank: int,
        num_ranks: int,
    ) -> Float32[mx.array, "C D"]:
        """See `Movement.add_ranks`."""
        num_tokens = partial.shape[0] // num_ranks
        chunks: list[mx.array] = [back] * 2
        if num_ranks != 2:
            chunks = list(mx.split(back, num_ranks))
        # Not rounded: it did not travel.
        chunks[rank] = partial[rank * num_tokens : (rank + 1) * num_tokens]
        total = chunks[0]
        for chunk in chunks[1:]:
            total = add_to(total, chunk)
        return total.astype(mx.float32)

    def sum_pairs(
        self,
        outputs: Float[mx.array, "N D"],
        pair_ids: Int32[mx.array, "M C"],
        gates: Float32[mx.array, "M C"],
    ) -> Float32[mx.array, "M D"]:
        """See `Movement.sum_pairs`."""
        return weighted_sum(outputs, pair_ids, gates)

    def to_format(
        self, x: Float[mx.array, "T D"], form: RowFormat
    ) -> UInt32[mx.array, "T W"]:
        """See `Movement.to_format`."""
        return ops.quantize_rows(x, form)

    def from_format(
        self,
        words: UInt32[mx.array, "M W"],
        form: RowFormat,
        width: int,
        dtype: mx.Dtype,
    ) -> Float[mx.array, "M D"]:
        """See `Movement.from_format`."""
        return ops.dequantize_rows(words, form, width, dtype)


def _by_token(
    rows: Float[mx.array, "N D"], positions: Int32[np.ndarray, " T"]
) -> Float[mx.array, "T D"]:
    """The row of each token, zeros where it has none (position -1)."""
    if len(positions) == len(rows):
        return rows
    if not len(rows):
        return mx.zeros((len(positions), rows.shape[1]), rows.dtype)
    # As an index, -1 is the last row.
    return with_zeros(rows, 1)[mx.array(positions)]
