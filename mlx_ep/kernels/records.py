"""The records that kernels take and return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int32, UInt8, UInt32

# silu(gate) * up, or the clamped form of gpt-oss.
Activation = Literal["swiglu", "clamped_swiglu"]

GROUP_SIZES = (32, 64, 128)
BITS = (4, 8)
MXFP4_GROUP_SIZE = 32

# A form of 8 bits a value, in which rows travel. int8: a float32 scale for 128 values.
# mxfp8: e4m3, a power of two for 32 values.
RowFormat = Literal["int8", "mxfp8"]
FORMAT_VALUES = 128  # whose scales are one word, in both


def format_words(width: int) -> int:
    """Words (uint32) of a row of D values in a `RowFormat`.

        (4 codes) (4 codes) .. (scales of 128 values) ..

    From the low end of a word on; the last of each kind is filled up with zeros. An
    int8 scale is the bits of a float32, the 4 bytes of mxfp8 are exponents plus 127.

    >>> format_words(2048) * 4 / 2048
    1.03125
    """
    return -(-width // 4) - (-width // FORMAT_VALUES)


class ReplicaTables(NamedTuple):
    """The copies of experts, as `choose_replicas` takes them.

    Attributes:
        order: the experts, those with the same holders side by side.
        class_masks: the holders of each such run, one bit a rank.
        class_starts: where in `order` each run starts; the last is E.
        slots: the slot of each expert on each rank; any where it has none.
    """

    order: Int32[mx.array, " E"]
    class_masks: Int32[mx.array, " C"]
    class_starts: Int32[mx.array, " C+1"]
    slots: Int32[mx.array, "P E"]


class RouteTables(NamedTuple):
    """Where every (token, expert) pair and every (token, rank) row goes.

    A row is one token on one rank, however many of its experts live there. R is
    ``T * min(K, P)``, the most rows there can be. Two tokens with experts (2, 0) and
    (2, -1), experts 0, 1 on rank 0 and 2, 3 on rank 1, each in the slot of its number:

        pairs  (t0,s2) (t0,s0) (t1,s2)  token-major  ->  (t0,s0) (t0,s2) (t1,s2)
        rows   (r0,t0) (r1,t0) (r1,t1)                   slot-major, rank-major

    Attributes:
        slot_counts: pairs of each slot; here 1 0 2 0.
        slot_offsets: where its pairs start; the last is how many there are; 0 1 1 3 3.
        positions: the place of each pair, -1 without an expert; (1, 0), (2, -1).
        rank_counts: rows of each rank; 1 2.
        rank_offsets: where its rows start; the last is how many there are; 0 1 3.
        row_tokens: the token of each row, -1 past the last row; 0 0 1 -1.
        token_rows: the row of each token on each rank, or -1; (0, 1), (-1, 2).
    """

    slot_counts: Int32[mx.array, " S"]
    slot_offsets: Int32[mx.array, " S+1"]
    positions: Int32[mx.array, "T K"]
    rank_counts: Int32[mx.array, " P"]
    rank_offsets: Int32[mx.array, " P+1"]
    row_tokens: Int32[mx.array, " R"]
    token_rows: Int32[mx.array, "T P"]

    @staticmethod
    def shapes(
        shape: tuple[int, ...], num_slots: int, num_ranks: int
    ) -> dict[str, tuple[int, ...]]:
        """The shape of each field, for ids of the given [T, K]."""
        num_tokens, per_token = shape
        return {
            "slot_counts": (num_slots,),
            "slot_offsets": (num_slots + 1,),
            "positions": (num_tokens, per_token),
            "rank_counts": (num_ranks,),
            "rank_offsets": (num_ranks + 1,),
            "row_tokens": (num_tokens * min(per_token, num_ranks),),
            "token_rows": (num_tokens, num_ranks),
        }

    @classmethod
    def of_nothing(
        cls, shape: tuple[int, ...], num_slots: int, num_ranks: int
    ) -> RouteTables:
        """The plan of no pairs, with ids of the given [T, K] where T or K is 0."""
        shapes = cls.shapes(shape, num_slots, num_ranks)
        fields = {name: mx.zeros(size, mx.int32) for name, size in shapes.items()}
        return cls(**fields)._replace(
            token_rows=mx.full(shapes["token_rows"], -1, dtype=mx.int32)
        )


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One linear map per slot of this rank: ``y = weight[slot] @ x + bias[slot]``.

    Attributes:
        weight: ``[L, rows, columns]``, or words of ``32 / bits`` columns when packed.
        scales: of a packed weight, one per ``group_size`` columns; bytes in mxfp4.
        offsets: those that MLX's affine mode calls biases; None in mxfp4.
        bias: the bias of the layer.
        bits: of a packed weight, 4 or 8.
        group_size: columns with the same scale: 32, 64 or 128; 32 in mxfp4.

    Raises:
        ValueError: the parts do not make one of the packings dense, affine, mxfp4.
    """

    weight: Float[mx.array, "L rows columns"] | UInt32[mx.array, "L rows words"]
    scales: Float[mx.array, "L rows G"] | UInt8[mx.array, "L rows G"] | None = None
    offsets: Float[mx.array, "L rows G"] | None = None
    bias: Float[mx.array, "L rows"] | None = None
    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.mode == "dense":
            if self.weight.dtype == mx.uint32 or self.offsets is not None:
                raise ValueError("A packed weight needs scales; got none.")
            return
        allowed = (4,) if self.mode == "mxfp4" else BITS
        sizes = (MXFP4_GROUP_SIZE,) if self.mode == "mxfp4" else GROUP_SIZES
        if self.bits not in allowed or self.group_size not in sizes:
            raise ValueError(
                f"{self.mode} weights must have bits in {allowed} and a group size in "
                f"{sizes}; got {self.bits} bits, groups of {self.group_size}."
            )
        assert self.scales is not None
        words = self.scales.shape[-1] * self.group_size * self.bits // 32
        if self.weight.dtype != mx.uint32 or self.weight.shape[-1] != words:
            raise ValueError(
                f"{self.bits}-bit weights with {self.scales.shape[-1]} groups of "
                f"{self.group_size} must have {words} words of uint32 a row; got "
                f"{self.weight.shape[-1]} of {self.weight.dtype}."
            )
        if self.offsets is not None and self.offsets.dtype != self.scales.dtype:
            raise ValueError(
                "Scales and offsets must have one dtype; got "
                f"{self.scales.dtype} and {self.offsets.dtype}."
            )

    @property
    def mode(self) -> Literal["dense", "affine", "mxfp4"]:
        if self.scales is None:
            return "dense"
        return "mxfp4" if self.scales.dtype == mx.uint8 else "affine"

    @property
    def num_slots(self) -> int:
        return self.weight.shape[0]

    @property
    def rows(self) -> int:
        return self.weight.shape[1]

    @property
    def columns(self) -> int:
        if self.scales is None:
            return self.weight.shape[2]
        return self.scales.shape[2] * self.group_size
