"""What a rank will read and hold, known from the headers before a byte is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import psutil

from mlx_ep.loading.checkpoint import Checkpoint
from mlx_ep.loading.headers import quoted
from mlx_ep.metrics import format_bytes
from mlx_ep.models import expert_tensor
from mlx_ep.placement import Placement


@dataclass(frozen=True)
class LoadPlan:
    """The bytes of one rank.

    Attributes:
        dense_bytes: tensors that every rank holds.
        expert_bytes: this rank's experts.
        total_bytes: the whole checkpoint.
    """

    dense_bytes: int
    expert_bytes: int
    total_bytes: int

    @property
    def rank_bytes(self) -> int:
        return self.dense_bytes + self.expert_bytes


def plan_load(checkpoint: Checkpoint, placement: Placement, rank: int) -> LoadPlan:
    """How many bytes of `checkpoint` belong to `rank`.

    Raises:
        ValueError: no tensor of the checkpoint holds an expert, or experts are missing.
    """
    own = set(placement.rank_experts[rank])
    dense = expert = 0
    seen: set[int] = set()
    for info in checkpoint.tensors.values():
        found = expert_tensor(info.name, info.shape, placement.num_experts)
        if found is None:
            dense += info.num_bytes
        elif found.expert is None:
            expert += len(own) * (info.num_bytes // placement.num_experts)
            seen.update(range(placement.num_experts))
        elif found.expert >= placement.num_experts:
            raise ValueError(
                f"{info.file}: tensor {quoted(info.name)} is of expert {found.expert}; "
                f"config.json says that there are {placement.num_experts}, from 0 on."
            )
        else:
            seen.add(found.expert)
            expert += info.num_bytes if found.expert in own else 0
    if missing := sorted(set(range(placement.num_experts)) - seen):
        raise ValueError(
            f"{checkpoint.path} must hold {placement.num_experts} experts per layer, "
            f"as its config.json says; {len(missing)} of them, from expert "
            f"{missing[0]} on, have no tensor under a name that is known. Convert it "
            "with mlx_lm.convert."
        )
    total = sum(info.num_bytes for info in checkpoint.tensors.values())
    return LoadPlan(dense, expert, total)


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
    """Per rank, why its weights do not fit, or ""; ranks on one host share its memory.

    Args:
        needs: of every rank, in rank order.
        limit_is_per_rank: the limits are the user's, for each rank by itself.
    """
    problems = []
    for rank, need in enumerate(needs):
        sharing = [other for other in needs if other.host == need.host]
        if limit_is_per_rank:
            sharing = [need]
        needed = sum(other.num_bytes for other in sharing)
        if needed <= need.limit:
            problems.append("")
            continue
        whose = f"{len(sharing)} ranks on this host need" if sharing[1:] else "it needs"
        problems.append(
            f"the weights of rank {rank} do not fit: {whose} {format_bytes(needed)}, "
            f"{format_bytes(need.limit)} are to be had. Use more Macs, a smaller "
            "quantization, or raise --memory-limit-gb (on a Mac: "
            "sysctl iogpu.wired_limit_mb)."
        )
    return problems
