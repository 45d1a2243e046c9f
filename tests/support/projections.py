"""Random expert weights in every packing."""

from __future__ import annotations

import mlx.core as mx

from mlx_ep.kernels import Projection

# name: mode, bits, group size, dtype of the weights or of their scales
PACKINGS = {
    "float32": ("dense", 4, 64, mx.float32),
    "float16": ("dense", 4, 64, mx.float16),
    "bfloat16": ("dense", 4, 64, mx.bfloat16),
    "affine4-32": ("affine", 4, 32, mx.bfloat16),
    "affine4-64": ("affine", 4, 64, mx.bfloat16),
    "affine4-128": ("affine", 4, 128, mx.float16),
    "affine8-32": ("affine", 8, 32, mx.float32),
    "affine8-64": ("affine", 8, 64, mx.bfloat16),
    "affine8-128": ("affine", 8, 128, mx.float16),
    "mxfp4": ("mxfp4", 4, 32, mx.bfloat16),
}


def group_size(packing: str) -> int:
    """What the columns must divide by: 1 for a dense packing."""
    mode, _, size, _ = PACKINGS[packing]
    return 1 if mode == "dense" else size


def projection(
    packing: str, num_slots: int, rows: int, columns: int, *, bias: bool, seed: int = 0
) -> Projection:
    """Weights of about 1 / sqrt(columns), and biases of about 1."""
    mode, bits, size, dtype = PACKINGS[packing]
    keys = mx.random.split(mx.random.key(seed))
    weight = mx.random.normal((num_slots, rows, columns), key=keys[0]) * columns**-0.5
    weight = weight.astype(dtype)
    added = mx.random.normal((num_slots, rows), key=keys[1]).astype(dtype)
    vector = added if bias else None
    if mode == "dense":
        return Projection(weight=weight, bias=vector)
    packed, scales, *offsets = mx.quantize(weight, size, bits, mode=mode)
    return Projection(
        weight=packed,
        scales=scales,
        offsets=offsets[0] if offsets else None,
        bias=vector,
        bits=bits,
        group_size=size,
    )
