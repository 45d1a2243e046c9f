"""What weights take of a device's memory, and how many KV blocks are left."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_ep.simulate.fields import Fields
from mlx_ep.simulate.model import ModelSizes
from mlx_ep.simulate.settings import EngineSettings

GIB = 1 << 30


@dataclass(frozen=True)
class KvPool:
    """The KV blocks of one instance.

    Attributes:
        num_blocks: of `block_size` tokens.
        pool_bytes: that they take of one device.
        weight_bytes: of one device.
        utilization: part of the memory that both may take.
    """

    num_blocks: int
    block_size: int
    block_bytes: float | int
    pool_bytes: float | int
    weight_bytes: int
    utilization: float | int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def used_bytes(self, blocks: int) -> float:
        """Of one device, with so many blocks in use."""
        return float(self.weight_bytes + blocks * self.block_bytes)

    def describe(self, index: int) -> str:
        return (
            f"Instance [{index}] : {self.num_tokens} tokens / {self.num_blocks} blocks "
            f"({self.pool_bytes / GIB:.2f} GiB/rank at util {self.utilization:.2f})"
        )


def kv_pool(
    fields: Fields,
    model: ModelSizes,
    settings: EngineSettings,
    memory: float | int,
    tp: int,
    pp: int,
    ep: int,
    slots: int | None = None,
) -> KvPool:
    """The pool of an instance whose devices have `memory` GiB.

    Args:
        slots: experts of a layer on the fullest device; None: E / ep.

    Raises:
        ValueError: the weights do not fit, or no block does.
    """
    weights = model.weight_bytes(tp, ep, pp, settings.itemsize, slots)
    limit = memory * GIB * settings.memory_utilization
    if weights >= limit:
        raise fields.fail(
            "npu_mem.mem_size",
            f"Model size {weights / GIB:.2f}GB exceeds total NPU memory "
            f"{limit / GIB:.2f}GB (of one device, at a utilization of "
            f"{settings.memory_utilization:g}); use more devices or memory",
        )
    split = model.kv_split(tp) * pp
    token_bytes = model.kv_token_bytes(settings.kv_itemsize) / split
    try:
        return kv_blocks(
            limit, weights, token_bytes, settings, settings.memory_utilization
        )
    except ValueError as error:
        raise fields.fail("npu_mem.mem_size", str(error)) from error


def kv_blocks(
    limit: float | int,
    weights: int,
    token_bytes: float | int,
    settings: EngineSettings,
    utilization: float | int,
) -> KvPool:
    """The pool beside the weights of a device that may hold `limit` bytes.

    Raises:
        ValueError: not one block fits.
    """
    block_bytes = token_bytes * settings.block_size
    blocks = int((limit - weights) // block_bytes)
    if blocks < 1:
        raise ValueError(
            f"leaves no KV block beside the weights' {weights / GIB:.2f} GiB; use "
            "more memory"
        )
    return KvPool(
        num_blocks=blocks,
        block_size=settings.block_size,
        block_bytes=block_bytes,
        pool_bytes=limit - weights,
        weight_bytes=weights,
        utilization=utilization,
    )
