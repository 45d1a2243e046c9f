"""The MoE layer that is measured: from the command line, checked before it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_ep.cost.shape import NAMED_LAYERS, LayerShape, named_layer
from mlx_ep.types import MXFP4, MXFP8, Packing

MODES = ("affine", "mxfp4", "mxfp8")
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class NumberFormat:
    """How experts and tokens are held.

    Attributes:
        packing: of the experts' matrices.
        dtype: of tokens and, in mode affine, of scales and offsets.
    """

    packing: Packing
    dtype: str

    @property
    def mlx_dtype(self) -> mx.Dtype:
        return DTYPES[self.dtype]


def default_dtype() -> str:
    """What models compute in: bfloat16, and float32 where MLX computes on a CPU."""
    return "bfloat16" if mx.metal.is_available() else "float32"


def make_weights(
    mode: str, bits: int | None, group_size: int | None, dtype: str
) -> NumberFormat:
    """The packing that the flags say.

    Raises:
        ValueError: there is no such packing.
    """
    if mode != "affine":
        fixed = {"mxfp4": MXFP4, "mxfp8": MXFP8}[mode]
        for name, given, must in (
            ("--bits", bits, fixed.bits),
            ("--group-size", group_size, fixed.group_size),
        ):
            if given not in (None, must):
                raise ValueError(
                    f"--quantization {mode} has {name} {must}; got {given}."
                )
        return NumberFormat(fixed, dtype)
    bits, group_size = bits or 4, group_size or 64
    if bits not in AFFINE_BITS or group_size not in AFFINE_GROUPS:
        raise ValueError(
            f"--quantization affine has --bits {_either(AFFINE_BITS)} and --group-size "
            f"{_either(AFFINE_GROUPS)}; got {bits} and {group_size}."
        )
    return NumberFormat(Packing.affine(bits, group_size, dtype), dtype)


def make_shape(name: str, scale: int, weights: NumberFormat) -> LayerShape:
    """The layer that the flags say.

    Args:
        name: in `NAMED_LAYERS`, or E,D,F,K.
        scale: D and F are divided by it.

    Raises:
        ValueError: there is no such layer, or its numbers do not fit one another.
    """
    itemsize = weights.mlx_dtype.size
    shape = named_layer(name, weights.packing, scale=scale, itemsize=itemsize)
    if shape.num_experts > shape.width:
        raise ValueError(
            "The benchmark draws which experts each token visits, for which the "
            f"router needs at least as many dimensions as experts; got D={shape.width} "
            f"and E={shape.num_experts}. Choose a smaller --scale."
        )
    for letter, width in (("D", shape.width), ("F", shape.expert_width)):
        if width * weights.packing.bits % 32:
            raise ValueError(
                f"{letter}={width} weights of {weights.packing.bits} bits must fill "
                "whole words of 32 bits; choose another shape or --bits."
            )
    return shape


def why_no_tensor_parallelism(
    shape: LayerShape, weights: NumberFormat, num_ranks: int
) -> str:
    """Why mlx-lm cannot split the layer over the ranks, or ""."""
    width, share = shape.expert_width, shape.expert_width / num_ranks
    unit = weights.packing.group_size
    if width % num_ranks or share % unit or share * weights.packing.bits % 32:
        return (
            f"tp splits F={width} over {num_ranks} ranks, {share:g} each, which must "
            f"be a multiple of the quantization group of {unit}"
        )
    return ""


def parse_counts(flag: str, text: str) -> list[int]:
    """``1,4,16`` as numbers, ascending.

    Raises:
        ValueError: one of them is not a whole number from 1 on.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ValueError(
            f"{flag} must be whole numbers from 1 on, such as 1,4,16; got {text}."
        )
    return counts


def _either(values: Sequence[int]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


__all__ = [
    "DTYPES",
    "MODES",
    "NAMED_LAYERS",
    "LayerShape",
    "NumberFormat",
    "default_dtype",
    "make_shape",
    "make_weights",
    "parse_counts",
    "why_no_tensor_parallelism",
]
