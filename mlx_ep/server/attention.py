"""`--attention auto` of the server: by what is predicted for as many as may be served.

How a model is split over ranks is decided when it is loaded, so that the choice is for
`max_num_seqs` sequences, once, at the start:

    served       min(max_num_seqs, what the memory holds KV caches for)
    tokens/s     served / predicted seconds of a decode step with so many sequences

The mode with the most tokens per second is taken. A memory that holds few sequences
thus counts against a mode as much as a slow step does.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.comm import Comm, broadcast_object, gather_objects
from mlx_ep.config import EPConfig
from mlx_ep.cost.profile import Profile, find_profile, shipped_profiles, slowest
from mlx_ep.cost.profile_store import find_calibrated
from mlx_ep.cost.shape import ModelShape
from mlx_ep.cost.step import step_cost
from mlx_ep.loading import memory_limit
from mlx_ep.models.tensor_parallel import tensor_problem
from mlx_ep.server.copies import TYPICAL_CONTEXT, CopiesRoom
from mlx_ep.server.pools import EngineOptions
from mlx_ep.tune.cache import cache_folder

Mode = Literal["replicated", "tensor", "data"]
_ARMS: dict[Mode, str] = {
    "replicated": "ep-replicated", "tensor": "ep-tensor", "data": "ep-gathered",
}  # fmt: skip


@dataclass(frozen=True)
class ServingAttention:
    """How the attention of a server runs, and why."""

    mode: Mode
    reason: str

    def __str__(self) -> str:
        return f"attention: {self.mode} ({self.reason})"


def choose_mode(
    shape: ModelShape,
    profile: Profile | None,
    *,
    num_ranks: int,
    sequences: int,
    memory: int,
    context: int = TYPICAL_CONTEXT,
    problems: Mapping[Mode, str],
    copies: CopiesRoom | None = None,
) -> ServingAttention:
    """What every rank takes. Pure.

    Args:
        profile: of the slowest rank; None: nothing is known of the machine.
        sequences: that are served at once at most.
        memory: bytes of the smallest rank, for weights and KV caches.
        context: tokens of a sequence.
        problems: by mode, why it is not possible.
        copies: what it takes that every rank has every expert; None: that is not to
            be.
    """
    if num_ranks == 1:
        return ServingAttention("replicated", "there is one rank")
    if copies is not None and copies.fits:
        return ServingAttention(
            "data",
            "every rank can hold every expert, and then answers its requests alone: "
            "no layer has to wait for another rank",
        )
    modes: list[Mode] = [mode for mode in _ARMS if not problems.get(mode)]
    fits = {m: _held(shape, m, num_ranks, memory, context) for m in modes}
    served = {mode: min(sequences, fits[mode]) for mode in modes}
    if profile is None:
        # The first of those that serve the most: the fewest collectives.
        mode = max(modes, key=lambda m: (served[m], -modes.index(m)))
        numbers = ", ".join(f"{m} {served[m]}" for m in modes)
        return ServingAttention(
            mode,
            f"no profile of this machine is known; of {sequences} sequences with "
            f"{context} tokens the memory holds: {numbers}",
        )
    speeds: dict[Mode, float] = {}
    for mode in modes:
        speeds[mode] = 0.0
        if served[mode]:
            cost = step_cost(
                profile, shape, _ARMS[mode], tokens=served[mode], phase="decode",
                num_ranks=num_ranks, context=context,
            )  # fmt: skip
            speeds[mode] = cost.tokens_per_second
    mode = max(modes, key=lambda m: (speeds[m], -modes.index(m)))
    numbers = ", ".join(
        f"{m} {speeds[m]:.0f} tokens/s with {served[m]} sequences" for m in modes
    )
    left_out = "; ".join(f"not {m}: {p}" for m, p in problems.items() if p)
    return ServingAttention(
        mode,
        f"predicted for {sequences} sequences with {context} tokens: {numbers}; "
        f"{profile.kind}: {profile.name}" + (f"; {left_out}" if left_out else ""),
    )


def choose_config(
    config: EPConfig,
    comm: Comm,
    options: EngineOptions,
    shape: ModelShape,
    outline: nn.Module,
    copies: CopiesRoom | None = None,
) -> tuple[EPConfig, ServingAttention]:
    """The configuration of `--attention auto`; every rank must call it.

    Rank 0 decides, all follow.

    Args:
        config: with strategy ``replicated`` and attention ``auto``.
        outline: the model with its shapes; nothing of it is evaluated.
        copies: see `choose_mode`.
    """
    chip = str(mx.device_info().get("device_name", platform.machine()))
    facts: list[tuple[str, int]] = gather_objects(
        comm, (chip, memory_limit(config.memory_limit_gb))
    )
    chips = [name for name, _ in facts]
    choice = choose_mode(
        shape,
        _known_profile(chips, comm.transport),
        num_ranks=comm.size,
        sequences=options.max_num_seqs,
        memory=int(min(limit for _, limit in facts) * options.kv_fraction),
        context=min(options.context or TYPICAL_CONTEXT, TYPICAL_CONTEXT),
        problems={"tensor": tensor_problem(outline, comm.size)},
        copies=copies,
    )
    mode, reason = broadcast_object(comm, [choice.mode, choice.reason])
    changed: dict[str, dict[str, Any]] = {
        "replicated": {"attention": "replicated"},
        "tensor": {"attention": "tensor"},
        "data": {"attention": "replicated", "strategy": "auto"},
    }
    return replace(config, **changed[mode]), ServingAttention(mode, reason)


def _held(
    shape: ModelShape, mode: Mode, num_ranks: int, memory: int, context: int
) -> int:
    """Sequences of all ranks whose KV caches fit beside the weights."""
    left = memory - shape.held_bytes(_ARMS[mode], num_ranks)
    each = float(shape.cache_bytes(context))
    is_shared = mode == "data" or (mode == "tensor" and shape.kv_is_split)
    return max(0, int(left * (num_ranks if is_shared else 1) / max(each, 1.0)))


def _known_profile(chips: list[str], transport: str) -> Profile | None:
    """What was measured on this cluster, else what is shipped of its slowest chip."""
    found = find_calibrated(cache_folder(), len(chips), transport, chips)
    if found is not None:
        return found
    names = {c.removeprefix("Apple ").lower().replace(" ", "-") for c in chips}
    if not names <= set(shipped_profiles()):
        return None
    return slowest([find_profile(name) for name in sorted(names)])
