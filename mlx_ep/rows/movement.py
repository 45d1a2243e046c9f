"""What moves rows inside a rank: a protocol. Nothing is sent here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import mlx.core as mx
from jaxtyping import Float, Float32, Int32, Shaped, UInt32

from mlx_ep.kernels import RowFormat
from mlx_ep.placement import Placement
from mlx_ep.types import TokenCounts

# What a movement is asked for; the best one may differ between them.
#   rows   plan, pack and sum the rows of an all-to-all of exactly what is needed
#   ranks  sum what every rank computed for every token
#   pairs  sum the outputs of a rank's (row, slot) pairs
#   format make rows that travel in 8 bits a value ready, and numbers again
Job = Literal["rows", "ranks", "pairs", "format"]


@dataclass(frozen=True)
class RowRoutes:
    """Which rows leave a rank, and which arrive. Its own tokens' rows for itself stay.

    Attributes:
        send_counts: rows that leave for each rank; 0 for this one.
        recv_counts: rows that arrive from each rank; 0 from this one.
        arriving: the line in everybody's routing of each row that arrives, rank 0's
            rows first, tokens in order.
        own: what the movement that made the plan needs to pack and to sum; opaque.
    """

    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    arriving: Int32[mx.array, " R"]
    own: Any

    @property
    def widest(self) -> int:
        """The most rows that go one way; on 2 ranks the same number on both."""
        return max(*self.send_counts, *self.recv_counts)


@runtime_checkable
class Movement(Protocol):
    """One way to plan, pack and sum rows; all of them give the same.

    Sums are float32, the terms in the order of the ranks or columns.
    """

    def plan_rows(
        self,
        expert_ids: Int32[mx.array, "N K"],
        placement: Placement,
        rank: int,
        tokens: TokenCounts,
    ) -> RowRoutes:
        """Which rows leave `rank` and which arrive there. One host sync.

        Args:
            expert_ids: of everybody: rank after rank, each padded with -1 to the T of
                the rank that has most (N is that times P).
            placement: of the experts.
            rank: whose plan it is.
            tokens: T of every rank.
        """
        ...

    def pack(
        self, x: Shaped[mx.array, "T D"], plan: RowRoutes, num_rows: int
    ) -> Shaped[mx.array, "M D"]:
        """The rows that leave, rank-major, then anything: `num_rows` in all."""
        ...

    def add_rows(
        self,
        own: Float32[mx.array, "T D"],
        back: Float[mx.array, "M D"],
        plan: RowRoutes,
        rank: int,
    ) -> Float32[mx.array, "T D"]:
        """Each token's sum over ranks: `own` is this rank's, `back` that of the others.

        Args:
            back: one row for each one that left, in their order.
        """
        ...

    def add_ranks(
        self,
        partial: Float32[mx.array, "M D"],
        back: Float[mx.array, "R D"],
        rank: int,
        num_ranks: int,
    ) -> Float32[mx.array, "C D"]:
        """As `add_rows`, where every rank has sums for every token.

        Args:
            partial: this rank's sums, for the C tokens of each rank (M is C * P).
            back: for this rank's C tokens the sums of every rank, also an own chunk,
                which is not read; on 2 ranks of the other one alone.
        """
        ...

    def sum_pairs(
        self,
        outputs: Float[mx.array, "N D"],
        pair_ids: Int32[mx.array, "M C"],
        gates: Float32[mx.array, "M C"],
    ) -> Float32[mx.array, "M D"]:
        """``sum_c gates[m, c] * outputs[pair_ids[m, c]]``.

        Args:
            pair_ids: the pairs of each row; -1 is "none" and must have gate 0.
        """
        ...

    def to_format(
        self, x: Float[mx.array, "T D"], form: RowFormat
    ) -> UInt32[mx.array, "T W"]:
        """Tokens in 8 bits a value; the layout is that of `format_words`."""
        ...

    def from_format(
        self,
        words: UInt32[mx.array, "M W"],
        form: RowFormat,
        width: int,
        dtype: mx.Dtype,
    ) -> Float[mx.array, "M D"]:
        """The rows of D values that `to_format` was given, as near as it keeps them."""
        ...
