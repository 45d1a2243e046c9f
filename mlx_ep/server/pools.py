"""How much memory KV caches may take: of running sequences, and kept for others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import psutil

from mlx_ep.comm import Comm, gather_objects, host_id
from mlx_ep.loading import memory_limit
from mlx_ep.metrics import format_bytes
from mlx_ep.server.sizes import KvSizes


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine serves.

    Attributes:
        max_num_seqs: sequences at once, of all ranks together.
        max_waiting: requests that may wait for a place.
        prefill_step: tokens of prompts that are processed beside a decoded token. A
            running answer stands still for so long; mlx-lm's 2048 are seconds of it,
            and from some hundred on an expert's weights are read for many tokens.
        max_kv_memory: bytes of a rank for the KV caches of running sequences; None: of
            `kv_fraction`, what the prefix cache leaves.
        kv_fraction: of the memory that is free behind the weights, what KV caches and
            the prefix cache may take together.
        prefix_cache_memory: bytes of a rank for KV caches of earlier requests; 0 keeps
            none. None: a quarter of `kv_fraction`.
        context: most tokens of a prompt and its answer; None: the model's.
        seed: of what requests without one draw; None: a random one.
        look_ahead: whether a pass begins before the tokens that it takes are read, so
            that the host's work is done meanwhile.

    Raises:
        ValueError: a number is not possible.
    """

    max_num_seqs: int = 32
    max_waiting: int = 128
    prefill_step: int = 512
    max_kv_memory: int | None = None
    kv_fraction: float = 0.8
    prefix_cache_memory: int | None = None
    context: int | None = None
    seed: int | None = None
    look_ahead: bool = True

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_waiting", 0),
            ("prefill_step", 1),
            ("max_kv_memory", 1),
            ("prefix_cache_memory", 0),
            ("context", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more; got {value}.")
        if not 0 < self.kv_fraction <= 1:
            raise ValueError(
                f"kv_fraction must be above 0, at most 1; got {self.kv_fraction}."
            )


@dataclass(frozen=True)
class Pools:
    """Bytes of each rank.

    Attributes:
        running: for the KV caches of running sequences.
        kept: for the prefix cache.
    """

    running: list[int]
    kept: list[int]

    def describe(self, sizes: KvSizes) -> str:
        """For a person, one line a rank."""
        return "\n".join(
            f"rank {rank}: KV caches {format_bytes(running)} (one of "
            f"{running // max(sizes.held(1), 1)} tokens), prefix cache "
            f"{format_bytes(kept)}"
            for rank, (running, kept) in enumerate(zip(self.running, self.kept))
        )


def share_memory(options: EngineOptions, comm: Comm, can_keep: bool) -> Pools:
    """The pools of all ranks; every rank must call it.

    Args:
        can_keep: whether the model's caches can serve a prefix cache.

    Raises:
        ValueError: on every rank: one has no memory left.
    """
    offers: list[tuple[str, int]] = gather_objects(comm, (host_id(), _free_bytes()))
    hosts = [host for host, _ in offers]
    running, kept = [], []
    for host, free in offers:
        budget = int(free / hosts.count(host) * options.kv_fraction)
        keep = options.prefix_cache_memory
        keep = budget // 4 if keep is None else keep
        keep = keep if can_keep else 0
        most = options.max_kv_memory
        running.append(budget - keep if most is None else most)
        kept.append(keep)
    if short := [rank for rank, size in enumerate(running) if size <= 0]:
        raise ValueError(
            f"Rank {short[0]} must have memory for KV caches; {offers[short[0]][1]} "
            "bytes are free. Use more Macs or a smaller prefix cache."
        )
    return Pools(running, kept)


def options_facts(options: EngineOptions) -> dict[str, Any]:
    """What must be alike on all ranks."""
    return {name: str(value) for name, value in asdict(options).items()}


def resident_bytes() -> int:
    """Of this process, now."""
    return int(_this_process().memory_info().rss)


@cache
def _this_process() -> psutil.Process:
    return psutil.Process()


def _free_bytes() -> int:
    """Behind the weights: of the working set on Metal, else of the host."""
    used = mx.get_active_memory() if mx.metal.is_available() else 0
    return max(0, memory_limit(None) - used)
