"""How the dense part of a model runs: what each rank knows of it, what all decide."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ep.comm import Comm, gather_objects
from mlx_ep.config import EPConfig
from mlx_ep.cost.attention import (
    ASSUMED,
    AttentionChoice,
    Speeds,
    choose_attention,
    cluster_speeds,
)
from mlx_ep.cost.plausible import implausible
from mlx_ep.cost.profile import Profile, find_profile, shipped_profiles
from mlx_ep.cost.profile_store import find_calibrated
from mlx_ep.loading.memory import MemoryNeed, memory_problems
from mlx_ep.models.tensor_parallel import DenseSplit, plan_split, split_dense
from mlx_ep.rows import uses_metal
from mlx_ep.tune.cache import cache_folder
from mlx_ep.types import LMHead

# What one token has in a collective: 8192 numbers of 16 bits, more than most models.
_TOKEN_BYTES = 16384


class DensePart(NamedTuple):
    """What one rank knows of the dense part before a weight is read.

    Attributes:
        problem: why it cannot be split, or "".
        whole_bytes: of the weights that would be split.
        kept_bytes: what this rank would keep of them.
        collectives: that a step would have beside those of the MoE layers.
        speeds: of this rank, as `Speeds`.
        has_metal: whether it computes on Metal.
    """

    problem: str = ""
    whole_bytes: int = 0
    kept_bytes: int = 0
    collectives: int = 0
    speeds: Speeds = ASSUMED
    has_metal: bool = False


def dense_part(
    config: EPConfig,
    comm: Comm,
    outline: Callable[[], nn.Module],
    chips: Sequence[str],
) -> DensePart:
    """What this rank knows of the dense part; nothing where nobody asks for it.

    Args:
        outline: the model with this rank's experts; nothing of it is evaluated, and it
            stays as it is.
        chips: of every rank, see `cluster_chips`.
    """
    if config.attention == "replicated":
        return DensePart()
    if config.strategy != "replicated":
        return DensePart(
            f"--attention tensor needs the same tokens on all ranks, and --strategy "
            f"{config.strategy} is for tokens of their own"
        )
    # Of "auto" only all ranks together know what it means; whole is the most bytes.
    lm_head: LMHead = "split" if config.lm_head == "split" else "whole"
    plan = plan_split(outline(), comm.size, comm.rank, lm_head)
    return DensePart(
        plan.problem,
        plan.whole_bytes,
        plan.kept_bytes,
        plan.collectives,
        known_speeds(chips, comm.rank, comm.transport),
        uses_metal(),
    )


def cluster_chips(config: EPConfig, comm: Comm) -> list[str]:
    """The chip of every rank, as MLX calls it; none where nobody asks for it.

    Every rank must call it.
    """
    if config.attention == "replicated":
        return []
    mine = str(mx.device_info().get("device_name", platform.machine()))
    return gather_objects(comm, mine)


def known_speeds(chips: Sequence[str], rank: int, transport: str) -> Speeds:
    """What is known of a rank in a cluster: measured, published, or assumed.

    Args:
        chips: of every rank, as MLX calls the devices.
        rank: the one that asks.

    Raises:
        ValueError: the profile that `mlx_ep.calibrate` left here is not in order.
    """
    num_ranks, chip = len(chips), chips[rank]
    profile = find_calibrated(cache_folder(), num_ranks, transport, chips)
    if profile is not None:
        return _speeds(profile, transport, num_ranks)
    name = chip.removeprefix("Apple ").lower().replace(" ", "-")
    if name in shipped_profiles():
        return _speeds(find_profile(name), transport, num_ranks)
    return ASSUMED


def _speeds(profile: Profile, transport: str, num_ranks: int) -> Speeds:
    source = f"{profile.kind}: {profile.name}"
    if problems := implausible(profile):
        source += f", implausible: {problems[0]}"
    links = [link for link in profile.links.values() if link.transport == transport]
    latency = ASSUMED.latency
    if links:
        latency = links[0].seconds("all_reduce", _TOKEN_BYTES, num_ranks)
        latency += links[0].crossing_seconds
    else:
        source += f", its latency over {transport} assumed"
    is_measured = profile.kind == "measured"
    return Speeds(profile.memory_bandwidth, latency, source, is_measured)


def decide(
    config: EPConfig, parts: Sequence[DensePart], needs: Sequence[MemoryNeed]
) -> tuple[AttentionChoice, list[MemoryNeed]]:
    """How the dense part runs on all ranks, and what they need then.

    Args:
        parts: of every rank, in rank order.
        needs: likewise, with the dense part whole.

    Raises:
        ValueError: it is to be split and cannot be.
    """
    split = [
        need._replace(num_bytes=need.num_bytes - part.whole_bytes + part.kept_bytes)
        for need, part in zip(needs, parts, strict=True)
    ]
    is_per_rank = config.memory_limit_gb is not None
    choice = choose_attention(
        config.attention,
        num_ranks=len(parts),
        problem=next((part.problem for part in parts if part.problem), ""),
        split_bytes=max(part.whole_bytes for part in parts),
        collectives=parts[0].collectives,
        fits_replicated=not any(memory_problems(needs, is_per_rank)),
        fits_tensor=not any(memory_problems(split, is_per_rank)),
        speeds=cluster_speeds([Speeds(*part.speeds) for part in parts]),
    )
    if choice.attention != "tensor":
        return choice, list(needs)
    # Nobody has timed whether reading a part of it is worth a collective on Metal.
    stays = config.lm_head == "auto" and any(part.has_metal for part in parts)
    return replace(choice, lm_head="whole" if stays else config.lm_head), split


def agree_attention(model: nn.Module, comm: Comm, config: EPConfig) -> AttentionChoice:
    """How the dense part of a model in memory runs, on all ranks alike.

    Raises:
        ValueError: on every rank: it is to be split and cannot be.
    """
    chips = cluster_chips(config, comm)
    part = dense_part(config, comm, lambda: model, chips)
    if config.attention == "replicated":
        return decide(config, [part], [MemoryNeed("", 0, 0)])[0]
    parts = [DensePart(*other) for other in gather_objects(comm, part)]
    # What is in memory fits it.
    return decide(config, parts, [MemoryNeed("", 0, 0)] * len(parts))[0]


class Splitter:
    """Splits the dense part of one model, where that is chosen.

    Attributes:
        choice: whether it does.
        made: what came of it.
    """

    def __init__(self, choice: AttentionChoice, comm: Comm) -> None:
        self.choice = choice
        self._comm = comm
        self.made = DenseSplit()

    @property
    def change(self) -> Callable[[nn.Module], None] | None:
        """What is to be done to a model before its dense part is evaluated."""
        return self._split if self.choice.attention == "tensor" else None

    def _split(self, model: nn.Module) -> None:
        self.made = split_dense(
            model, self._comm.size, self._comm.rank, self.choice.lm_head
        )

    def evaluated(self, model: nn.Module) -> None:
        """Split a model in memory, and free what this rank does not keep."""
        if self.change is not None:
            self.change(model)
            for parameter in dict(tree_flatten(model.parameters())).values():
                # sync: one parameter at a time, so that one at most is held twice.
                mx.eval(parameter)
