"""Layers that are split over ranks and communicate through a `Comm`.

Subclasses of what mlx-lm's ``shard()`` makes: paths, parameter names and `isinstance`
stay. `comm` is set by `mlx_ep.models.tensor_parallel.connect`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from mlx_lm.models.minimax import ShardedRMSNorm
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_ep.comm import Comm


class ReducingLinear(ShardedToAllLinear):
    """A linear layer of part of its inputs; all_sum of the products, then the bias."""

    comm: Comm

    def __call__(self, x: mx.array) -> mx.array:
        return _with_bias(self, self.comm.all_reduce(x @ self["weight"].T))


class ReducingQuantizedLinear(QuantizedShardedToAllLinear):
    """`ReducingLinear` of packed weights."""

    comm: Comm

    def __call__(self, x: mx.array) -> mx.array:
        product = mx.quantized_matmul(
            x,
            self["weight"],
            scales=self["scales"],
            biases=self.get("biases"),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return _with_bias(self, self.comm.all_reduce(product))


class GatheringLinear(AllToShardedLinear):
    """A linear layer of part of its outputs, which are gathered in rank order."""

    comm: Comm

    def __call__(self, x: mx.array) -> mx.array:
        return _gather_outputs(super().__call__(x), self.comm)


class GatheringQuantizedLinear(QuantizedAllToShardedLinear):
    """`GatheringLinear` of packed weights."""

    comm: Comm

    def __call__(self, x: mx.array) -> mx.array:
        return _gather_outputs(super().__call__(x), self.comm)


class ReducingRMSNorm(ShardedRMSNorm):
    """An RMS norm over a width that is split; all_sum of the squares, in float32."""

    comm: Comm

    def __call__(self, x: mx.array) -> mx.array:
        values = x.astype(mx.float32)
        squares = self.comm.all_reduce(values.square().sum(-1, keepdims=True))
        norm = mx.rsqrt(squares / (x.shape[-1] * self.comm.size) + self.eps)
        return (values * norm * self["weight"]).astype(x.dtype)


COLLECTIVE_LAYERS = (
    ReducingLinear,
    ReducingQuantizedLinear,
    GatheringLinear,
    GatheringQuantizedLinear,
    ReducingRMSNorm,
)
# Layers whose weight is all that they are: a part of it does a part of the work.
PLAIN_LAYERS = (
    nn.Linear,
    nn.QuantizedLinear,
    nn.Conv1d,
    nn.RMSNorm,
    MultiLinear,
    QuantizedMultiLinear,
    SwitchLinear,
    QuantizedSwitchLinear,
)
# What shard() makes that communicates -> the class that does it through a Comm.
THROUGH_COMM: dict[type, type] = {
    ShardedToAllLinear: ReducingLinear,
    QuantizedShardedToAllLinear: ReducingQuantizedLinear,
    ShardedRMSNorm: ReducingRMSNorm,
}
# Layers that shard() splits where they are, whose owner sums or gathers their output.
SUMMED_BY_OWNER: dict[type, type] = {
    nn.Linear: ReducingLinear,
    nn.QuantizedLinear: ReducingQuantizedLinear,
}
GATHERED_BY_OWNER: dict[type, type] = {
    AllToShardedLinear: GatheringLinear,
    QuantizedAllToShardedLinear: GatheringQuantizedLinear,
}


def _with_bias(module: nn.Module, total: mx.array) -> mx.array:
    return total + module["bias"] if "bias" in module else total


def _gather_outputs(part: mx.array, comm: Comm) -> mx.array:
    """(rank 0: rows of o) (rank 1: rows of o)  ->  rows of (rank 0's o, rank 1's o)"""
    rows = part.reshape(-1, part.shape[-1])
    parts = comm.all_gather(rows).reshape(comm.size, *rows.shape)
    return parts.transpose(1, 0, 2).reshape(*part.shape[:-1], -1)
