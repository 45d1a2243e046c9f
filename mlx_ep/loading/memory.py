"""Whether what each rank will hold fits the memory of its host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import psutil

from mlx_ep.comm import Comm, gather_objects, host_id
from mlx_ep.config import EPConfig
from mlx_ep.metrics import format_bytes


class MemoryNeed(NamedTuple):
    """What a rank will hold, on which host, and the most it may."""

    host: str
    num_bytes: int
    limit: int


def memory_limit(limit_gb: float | None) -> int:
    """The bytes of weights that this rank may hold.

    Args:
        limit_gb: what the user allows, in GB (10^9 bytes); None for what Metal
            recommends as its working set, or for the host's available memory.
    """
    if limit_gb is not None:
        return int(limit_gb * 1e9)
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return int(psutil.virtual_memory().available)


def memory_problems(needs: Sequence[MemoryNeed], limit_is_per_rank: bool) -> list[str]:
    """Per rank, why its weights do not fit, or ""; see `shortages`."""
    return [
        shortage
        and f"the weights of rank {rank} do not fit: {shortage}. Use more Macs, a "
        "smaller quantization, or raise --memory-limit-gb (on a Mac: sysctl "
        "iogpu.wired_limit_mb)."
        for rank, shortage in enumerate(shortages(needs, limit_is_per_rank))
    ]


def shortages(needs: Sequence[MemoryNeed], limit_is_per_rank: bool) -> list[str]:
    """Per rank, how much more it needs than there is, or "".

    Ranks on one host share its memory.

    Args:
        needs: of every rank, in rank order.
        limit_is_per_rank: the limits are the user's, for each rank by itself.
    """
    found = []
    for need in needs:
        sharing = [other for other in needs if other.host == need.host]
        if limit_is_per_rank:
            sharing = [need]
        needed = sum(other.num_bytes for other in sharing)
        if needed <= need.limit:
            found.append("")
            continue
        whose = f"{len(sharing)} ranks on this host need" if sharing[1:] else "it needs"
        found.append(
            f"{whose} {format_bytes(needed)}, {format_bytes(need.limit)} are to be had"
        )
    return found


def with_memory(config: EPConfig, comm: Comm) -> EPConfig:
    """The configuration with what each rank may hold, where copies fill the rest.

    What a host offers is shared by the ranks on it. Copies that do not pay are not
    made, so that a host is rarely full of them.
    """
    if config.replica_memory != "auto" or config.memory is not None:
        return config
    offers = gather_objects(comm, (host_id(), memory_limit(config.memory_limit_gb)))
    hosts = [host for host, _ in offers]
    is_own = config.memory_limit_gb is not None  # for each rank by itself
    limits = [
        min(n for other, n in offers if other == host)
        // (1 if is_own else hosts.count(host))
        for host, _ in offers
    ]
    return replace(config, memory=tuple(limit / 1e9 for limit in limits))
