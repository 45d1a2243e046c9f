"""Random packed experts: the same numbers for every arm, each rank with its share.

The numbers of an expert depend on its number alone. They are drawn as packed words, all
of which are equally likely; quantizing random numbers would take minutes for large
shapes and give weights that take just as long to multiply with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import shard_inplace
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from mlx_ep.benchmark.shapes import LayerShape, NumberFormat
from mlx_ep.types import to_host

# How mlx-lm's `shard()` splits the projections of a MoE layer.
SHARDING = {
    "gate_proj": "all-to-sharded",
    "up_proj": "all-to-sharded",
    "down_proj": "sharded-to-all",
}
CHUNK = 16  # experts that are drawn, and held whole, at once


def random_switch(
    shape: LayerShape,
    weights: NumberFormat,
    experts: Sequence[int],
    shard_over: Any = None,
) -> SwitchGLU:
    """mlx-lm's SwitchGLU with random experts.

    Args:
        experts: their numbers, in the order of the slots.
        shard_over: keep this rank's share of each of them, cut by MLX as mlx-lm's
            `shard()` does; a group of ranks, which it asks for `rank()` and `size()`.
    """
    switch = SwitchGLU(shape.width, shape.expert_width, 1)
    for name, sharding in SHARDING.items():
        is_down = name == "down_proj"
        columns = shape.expert_width if is_down else shape.width
        rows = shape.width if is_down else shape.expert_width
        linear = QuantizedSwitchLinear(
            columns,
            rows,
            1,
            bias=False,
            group_size=weights.packing.group_size,
            bits=weights.packing.bits,
            mode=weights.packing.mode,
        )
        parts = []
        for start in range(0, len(experts), CHUNK):
            chunk = experts[start : start + CHUNK]
            part = _module(_packed(name, chunk, rows, columns, weights))
            if shard_over is not None:
                shard_inplace(part, sharding, group=shard_over)
            # sync: a chunk is whole no longer than it takes to cut it.
            mx.eval(part.parameters())
            parts.append(part)
        # A rank without experts has arrays without rows.
        some = parts or [_module(_packed(name, [0], rows, columns, weights))]
        for field in some[0]:
            stacked = mx.concatenate([part[field] for part in some])
            linear[field] = stacked if parts else stacked[:0]
        # sync: one projection at a time, so that one at most is held twice.
        mx.eval(linear.parameters())
        switch[name] = linear
    switch.eval()
    return switch


def alias_of(switch: SwitchGLU) -> SwitchGLU:
    """Another switch with the same weights, which may have a runner of its own."""
    other = SwitchGLU(1, 1, 1)
    for name in SHARDING:
        other[name] = switch[name]
    return other


def weight_bytes(switch: nn.Module) -> int:
    """Bytes of a switch's weights."""
    return sum(
        array.nbytes
        for name in SHARDING
        for array in switch[name].values()
        if isinstance(array, mx.array)
    )


def _module(arrays: dict[str, mx.array]) -> nn.Module:
    module = nn.Module()
    for name, array in arrays.items():
        module[name] = array
    return module


def _packed(
    name: str, experts: Sequence[int], rows: int, columns: int, weights: NumberFormat
) -> dict[str, mx.array]:
    """Random matrices of variance 1 / columns."""
    words = (rows, columns * weights.packing.bits // 32)
    draws = [
        np.random.default_rng(crc32(f"{name}:{expert}".encode())).integers(
            1 << 32, size=words, dtype=np.uint32
        )
        for expert in experts
    ]
    packed = mx.array(np.stack(draws))
    groups = (len(experts), rows, columns // weights.packing.group_size)
    if weights.packing.mode != "affine":
        if weights.packing.mode == "mxfp8":
            packed = packed & 0xFEFEFEFE  # no byte is NaN
        power = round(math.log2(columns**-0.5 / _deviation(weights)))
        return {"weight": packed, "scales": mx.full(groups, 127 + power, mx.uint8)}
    most = 2**weights.packing.bits - 1
    scale = columns**-0.5 / _deviation(weights)
    return {
        "weight": packed,
        "scales": mx.full(groups, scale, weights.mlx_dtype),
        "biases": mx.full(groups, -scale * most / 2, weights.mlx_dtype),
    }


def _deviation(weights: NumberFormat) -> float:
    """The standard deviation of what random bits stand for, where the scale is 1."""
    if weights.packing.mode == "affine":
        return math.sqrt((4**weights.packing.bits - 1) / 12)
    if weights.packing.mode == "mxfp4":
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # on host
    else:
        with mx.stream(mx.cpu):
            codes = mx.arange(0, 256, 2).astype(mx.uint8)
            # sync: on the CPU, of 128 numbers.
            values = to_host(mx.from_fp8(codes, mx.float32))
    return float(np.sqrt(np.square(values).mean()))
