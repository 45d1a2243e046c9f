"""Matrices of experts as float32 NumPy blocks, a few rows at a time.

A quantized weight is ``scale * q + offset`` with one scale and offset per group of
columns. Two things make unpacking cheaper than `mx.dequantize`, which takes 1.2 to 1.4
ns a weight on one x86 core:

- The offsets are left out of the block and added behind the product:
  ``W x = (scale * q) x + offset (sum of x over the group)``, 1/group_size of the work.
- q is unpacked plane by plane (all low nibbles, then all high ones) into a block whose
  columns are in that order; it is x, which is smaller, that is reordered to fit.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Protocol, runtime_checkable

import mlx.core as mx
import numpy as np
from jaxtyping import Float32, Shaped

from mlx_ep.experts.base import Matrices
from mlx_ep.types import to_host, view_on_host

BLOCK_BYTES = 1 << 20  # of unpacked weights: what stays in a core's own cache

# on host: constants.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def host_view(x: Shaped[mx.array, ...]) -> np.ndarray:
    """The numbers of an array where they are; bfloat16 as its uint16 bits."""
    if x.dtype == mx.bfloat16:
        x = x.view(mx.uint16)
    # sync: NumPy reads the buffer; a parameter has been evaluated long before.
    return view_on_host(x)


def to_float32(view: np.ndarray, dtype: mx.Dtype, out: np.ndarray) -> np.ndarray:
    """Write a `host_view` of floating-point numbers into a float32 array."""
    if dtype == mx.bfloat16:
        np.left_shift(view, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, view, casting="same_kind")
    return out


@runtime_checkable
class Unpacker(Protocol):
    """Reads blocks of the matrices of one projection."""

    def columns(self, x: Float32[np.ndarray, "C m"]) -> Float32[np.ndarray, "C m"]:
        """`x` with its lines in the order of the blocks' columns."""
        ...

    def block(
        self, slot: int, rows: slice, scratch: Float32[np.ndarray, "R C"]
    ) -> Float32[np.ndarray, "R C"]:
        """Rows of a slot's matrix, in `scratch` or where they are; without offsets."""
        ...

    def offsets(
        self, slot: int, x: Float32[np.ndarray, "C m"]
    ) -> Float32[np.ndarray, "rows m"] | None:
        """What `block` left out: to be added to the product; x as it came."""
        ...


def unpacker(matrices: Matrices) -> Unpacker:
    """The fastest that there is for a packing."""
    if not matrices.packing.is_packed:
        return DenseUnpacker(matrices)
    if matrices.packing.mode == "affine":
        return PlaneUnpacker(matrices)
    if (
        matrices.packing.mode in ("mxfp4", "mxfp8", "nvfp4")
        and matrices.global_scale is None
    ):
        return TableUnpacker(matrices)
    return MlxUnpacker(matrices)


class _InOrder:
    """Columns as in the checkpoint, nothing left out."""

    def columns(self, x: Float32[np.ndarray, "C m"]) -> Float32[np.ndarray, "C m"]:
        return x

    def offsets(
        self, slot: int, x: Float32[np.ndarray, "C m"]
    ) -> Float32[np.ndarray, "rows m"] | None:
        return None


class DenseUnpacker(_InOrder):
    """float32 is used where it is, the 16-bit types are converted."""

    def __init__(self, matrices: Matrices) -> None:
        self.dtype = matrices.weight.dtype
        self.weight = host_view(matrices.weight)

    def block(self, slot: int, rows: slice, scratch: np.ndarray) -> np.ndarray:
        view = self.weight[slot, rows]
        if self.dtype == mx.float32:
            return view
        return to_float32(view, self.dtype, scratch)


class PlaneUnpacker:
    """Affine weights of 2, 3, 4, 5, 6 or 8 bits.

    Weight i of a row is in bits ``i * bits`` and up of its bytes, lowest bits first, so
    that the places of weights in bytes repeat after a period. With 4 bits (two weights
    a byte; with 6 bits it is four in three bytes):

        (c0 c1) (c2 c3) (c4 c5) bytes  ->  c0 c2 c4 | c1 c3 c5  planes
    """

    def __init__(self, matrices: Matrices) -> None:
        assert matrices.scales is not None and matrices.offsets is not None
        self.bits = matrices.packing.bits
        self.num_planes = 8 // gcd(8, self.bits)
        packed = host_view(matrices.weight).view(np.uint8)
        period = self.num_planes * self.bits // 8
        self.bytes = packed.reshape(*packed.shape[:2], -1, period)
        self.dtype = matrices.scales.dtype
        self.scale_view = host_view(matrices.scales)
        self.offset_view = host_view(matrices.offsets)

    def columns(self, x: Float32[np.ndarray, "C m"]) -> Float32[np.ndarray, "C m"]:
        split = x.reshape(-1, self.num_planes, x.shape[1])
        return np.ascontiguousarray(split.transpose(1, 0, 2)).reshape(x.shape)

    def block(self, slot: int, rows: slice, scratch: np.ndarray) -> np.ndarray:
        packed = self.bytes[slot, rows]
        planes = scratch.reshape(len(packed), self.num_planes, packed.shape[1])
        for p in range(self.num_planes):
            self._unpack(packed, p, planes[:, p])
        view = self.scale_view[slot, rows]
        scales = to_float32(view, self.dtype, np.empty(view.shape, np.float32))
        groups = planes.reshape(*planes.shape[:2], view.shape[1], -1)
        np.multiply(groups, scales[:, None, :, None], out=groups)
        return scratch

    def _unpack(self, packed: np.ndarray, p: int, out: np.ndarray) -> None:
        """Weight p of every period, as numbers."""
        index, shift = divmod(p * self.bits, 8)
        found = packed[:, :, index]
        end = shift + self.bits
        if end == 8:  # nothing above it in its byte
            np.right_shift(found, np.uint8(shift), out=out, casting="unsafe")
            return
        if shift:
            found = found >> np.uint8(shift)
        if end > 8:  # the rest of it is in the next byte
            found |= packed[:, :, index + 1] << np.uint8(8 - shift)
        mask = np.uint8((1 << self.bits) - 1)
        np.bitwise_and(found, mask, out=out, casting="unsafe")

    def offsets(
        self, slot: int, x: Float32[np.ndarray, "C m"]
    ) -> Float32[np.ndarray, "rows m"] | None:
        view = self.offset_view[slot]
        offsets = to_float32(view, self.dtype, np.empty(view.shape, np.float32))
        sums = x.reshape(view.shape[1], -1, x.shape[1]).sum(axis=1)
        return offsets @ sums


class TableUnpacker(_InOrder):
    """mxfp4, mxfp8, nvfp4: 16 bits at a time are looked up."""

    def __init__(self, matrices: Matrices) -> None:
        assert matrices.scales is not None
        self.table = _value_table(matrices.packing.bits)
        self.scale_table = _scale_table(matrices.packing.mode)
        self.words = host_view(matrices.weight).view(np.uint16)
        self.scale_view = host_view(matrices.scales)

    def block(self, slot: int, rows: slice, scratch: np.ndarray) -> np.ndarray:
        words = self.words[slot, rows]
        # With another mode NumPy checks the indices first, which takes twice as long.
        np.take(self.table, words, out=scratch.view(self.table.dtype), mode="clip")
        scales = np.take(self.scale_table, self.scale_view[slot, rows], mode="clip")
        groups = scratch.reshape(*scales.shape, -1)
        np.multiply(groups, scales[..., None], out=groups)
        return scratch


class MlxUnpacker(_InOrder):
    """Any packing that MLX knows, by MLX: slower, for nvfp4 with a global scale."""

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices

    def block(self, slot: int, rows: slice, scratch: np.ndarray) -> np.ndarray:
        m = self.matrices
        assert m.scales is not None
        # The CPU's stream: a GPU would have to finish everything before it.
        with mx.stream(mx.cpu):
            scales, offsets = m.scales[slot, rows], None
            if m.offsets is not None:
                # MLX rounds to the dtype of the scales, whatever `dtype` says.
                scales = scales.astype(mx.float32)
                offsets = m.offsets[slot, rows].astype(mx.float32)
            weights = mx.dequantize(
                m.weight[slot, rows],
                scales,
                offsets,
                group_size=m.packing.group_size,
                bits=m.packing.bits,
                mode=m.packing.mode,
                global_scale=None if m.global_scale is None else m.global_scale[slot],
                dtype=mx.float32,
            )
            # sync: on the CPU, of what was just computed there.
            return view_on_host(weights)


@cache
def _value_table(bits: int) -> np.ndarray:
    """What 16 bits hold, 4 or 2 float32 numbers as one item, for all 2^16 of them."""
    codes = np.arange(1 << 16)[:, None] >> np.arange(0, 16, bits)
    values = FP4 if bits == 4 else _fp8_values()
    table = values[codes & ((1 << bits) - 1)].astype(np.float32)
    return table.view(np.complex128 if bits == 4 else np.complex64).reshape(-1)


@cache
def _scale_table(mode: str) -> Float32[np.ndarray, " 256"]:
    """A byte of `scales` as a number: a power of two, in nvfp4 an fp8 number."""
    if mode == "nvfp4":
        return _fp8_values().astype(np.float32)
    powers = np.ldexp(np.float32(1), np.arange(255) - 127)
    return np.append(powers, np.float32("nan"))


def _fp8_values() -> np.ndarray:
    """The 256 numbers of float8 e4m3; 0 for its two NaNs, which no weight is."""
    with mx.stream(mx.cpu):
        values = mx.from_fp8(mx.arange(256).astype(mx.uint8), mx.float32)
        # sync: once per process.
        return np.nan_to_num(to_host(values), nan=0.0).astype(np.float64)
