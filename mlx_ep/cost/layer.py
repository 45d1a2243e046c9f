"""What a MoE layer takes, from a profile and a shape. Pure.

A part costs what has to move or to be computed, whichever takes longer; parts follow
one another. The formulas are explained in docs/cost-model.md.

Tokens choose K of E experts uniformly, and the rank that takes longest counts
(`mlx_ep.cost.expected`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from mlx_ep.config import EPConfig
from mlx_ep.cost.expected import (
    counts_of_ranks,
    expected_distinct,
    expected_pairs,
)
from mlx_ep.cost.profile import OWN_BLOCK, Profile, cost_key
from mlx_ep.cost.records import Link, MatrixCost, Number
from mlx_ep.cost.shape import LayerShape, MatrixTotal
from mlx_ep.exchange import STRATEGIES, Collective, ExchangeShape, layer_traffic
from mlx_ep.placement import Placement
from mlx_ep.types import Packing, TokenCounts

Arm = Literal[
    "single", "tp", "ep-replicated", "ep-tensor", "ep-gathered", "ep-all-to-all"
]
ARMS: tuple[Arm, ...] = get_args(Arm)
# What exchanges the tokens of the MoE layers, by arm.
STRATEGY = {
    "ep-replicated": "replicated",
    "ep-tensor": "replicated",
    "ep-gathered": "gathered",
    "ep-all-to-all": "all_to_all",
}

# MLX's gather_qmm on Metal multiplies rows sorted by expert in tiles of so many rows,
# from so many rows per expert on (mlx/backend/metal/quantized.cpp, gather_qmm_rhs).
TILE_ROWS, SORTED_ROWS = 16, 4


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one MoE layer on the slowest rank, by what they go into.

    Attributes:
        experts: routed experts.
        shared: shared experts.
        route: router and choice of experts.
        fixed: whatever is computed.
        communication: collectives, with what crossing to the CPU costs.
        combine: of `communication`, the last collective.
        crossing: of `communication`, what each collective costs the device
            itself, s of one: nothing runs there meanwhile.
        copies: packing and adding what travels.
        collectives: how many.
        collective_bytes: what a rank hands to them.
        distinct_experts: that the busiest rank uses.
        pairs: (row, expert) pairs of the busiest rank.
        runner: of the experts; "limits" where nothing was measured.
    """

    experts: float
    shared: float
    route: float
    fixed: float
    communication: float
    combine: float
    crossing: float
    copies: float
    collectives: int
    collective_bytes: int
    distinct_experts: float
    pairs: float
    runner: str

    @property
    def seconds(self) -> float:
        return (
            self.experts
            + self.shared
            + self.route
            + self.fixed
            + self.communication
            + self.copies
        )

    @property
    def communication_share(self) -> float:
        return self.communication / self.seconds if self.seconds else 0.0


def layer_cost(
    profile: Profile,
    layer: LayerShape,
    arm: str,
    *,
    tokens: int,
    num_ranks: int = 1,
    per_rank: tuple[int, ...] | None = None,
    runner: str = "auto",
    link: str | None = None,
    config: EPConfig | None = None,
    placement: Placement | None = None,
) -> LayerCost:
    """One MoE layer: routing, experts, shared experts and what makes the sum whole.

    Args:
        profile: of the slowest rank.
        layer: its shape.
        arm: one of `ARMS`.
        tokens: of the step, of all ranks together. With the arms ep-gathered and
            ep-all-to-all each rank holds its part of them, with the others all.
        num_ranks: P; the arm ``single`` is one rank whatever it says.
        per_rank: T of each rank, with the arms ep-gathered and ep-all-to-all; None: as
            evenly as it goes.
        runner: of the experts; ``auto`` the fastest that was measured; with the arms
            single and tp mlx-lm's own block, where that was measured.
        link: in `Profile.links`; None: the first.
        config: rounds and modes of the exchange.
        placement: of whole experts on the ranks of an arm with whole experts, maybe
            with copies; None: contiguous.

    Raises:
        ValueError: there is no such arm, runner or link, or P or T make no sense.
    """
    check_arguments(arm, tokens, num_ranks)
    num_ranks = 1 if arm == "single" else num_ranks
    is_tensor, is_sharded = arm == "tp", arm in ("ep-gathered", "ep-all-to-all")
    counts = _token_counts(tokens, num_ranks, per_rank if is_sharded else None)
    held = max(counts) if is_sharded else tokens
    found = _experts(profile, layer, arm, tokens, num_ranks, runner, placement)
    # The package's `gather` asks the device which rows are this rank's; what was
    # measured has it, and the kernels of `metal` do not.
    asks = found.runner == "limits" and runner == "gather" and arm in STRATEGY
    shared = layer.shared.on_rank(num_ranks) if is_tensor else layer.shared
    router = dense_seconds(
        profile,
        layer.router,
        Packing.plain("float32" if layer.itemsize == 4 else "bfloat16"),
        held,
    )
    moved = _exchange(layer, arm, tokens, counts, profile, link, config)
    communication = collectives_seconds(profile, moved.collectives, num_ranks, link)
    num_bytes = sum(collective.num_bytes for collective in moved.collectives)
    is_copied = is_sharded and num_ranks > 1
    num_collectives = len(moved.collectives) if num_ranks > 1 else 0
    return LayerCost(
        experts=found.seconds,
        shared=dense_seconds(profile, shared, layer.packing, held),
        route=router + profile.route_seconds * held * layer.num_experts,
        fixed=profile.block_seconds + (moved.host_syncs + asks) * profile.sync_seconds,
        communication=communication,
        combine=collectives_seconds(profile, moved.collectives[-1:], num_ranks, link),
        crossing=profile.link(link).crossing_seconds if num_collectives else 0.0,
        copies=2 * num_bytes / profile.copy_bandwidth if is_copied else 0.0,
        collectives=num_collectives,
        collective_bytes=num_bytes if num_ranks > 1 else 0,
        distinct_experts=found.distinct,
        pairs=found.pairs,
        runner=found.runner,
    )


def check_arguments(arm: str, tokens: int, num_ranks: int) -> None:
    """Raises:
    ValueError: there is no such arm, or the numbers make no sense.
    """
    if arm not in ARMS:
        raise ValueError(f"An arm must be one of {', '.join(ARMS)}; got {arm!r}.")
    if tokens < 0 or num_ranks < 1:
        raise ValueError(
            f"tokens must be 0 or more and num_ranks 1 or more; got {tokens} and "
            f"{num_ranks}."
        )


def spread(count: int, num_ranks: int) -> tuple[int, ...]:
    """So many things on each rank, as evenly as it goes.

    >>> spread(5, 2)
    (3, 2)
    """
    each, more = divmod(count, num_ranks)
    return tuple(each + (rank < more) for rank in range(num_ranks))


def _token_counts(
    tokens: int, num_ranks: int, per_rank: tuple[int, ...] | None
) -> tuple[int, ...]:
    if per_rank is None:
        return spread(tokens, num_ranks)
    if len(per_rank) != num_ranks or sum(per_rank) != tokens or min(per_rank) < 0:
        raise ValueError(
            f"per_rank must hold the tokens of {num_ranks} ranks, {tokens} in all; got "
            f"{per_rank}."
        )
    return per_rank


@dataclass(frozen=True)
class _Experts:
    seconds: float
    distinct: float
    pairs: float
    runner: str


def _experts(
    profile: Profile,
    layer: LayerShape,
    arm: str,
    tokens: int,
    num_ranks: int,
    runner: str,
    placement: Placement | None,
) -> _Experts:
    """The routed experts on the slowest rank: mean over draws of the max over ranks."""
    is_tensor = arm in ("tp", "single")
    share = num_ranks if is_tensor else 1
    on_ranks = 1 if is_tensor else num_ranks
    shape = (layer.num_experts, layer.top_k, tokens, on_ranks)
    whole = None if is_tensor else placement
    counts = counts_of_ranks(*shape, whole)
    slots: Sequence[int] = spread(layer.num_experts, on_ranks)
    if whole is not None:
        slots = [len(experts) for experts in whole.rank_experts]
    weights = layer.expert_weights / share

    def expected(cost: MatrixCost | None) -> float:
        if cost is not None and is_tensor:
            # mlx-lm's own block does not wait for the device; a timed call did.
            call = max(0.0, cost.call_seconds - profile.sync_seconds)
            cost = replace(cost, call_seconds=call)
        of_ranks = []
        for mine, held in zip(counts, slots, strict=True):
            if cost is None:
                of_ranks.append(_limits(profile, layer, mine, held, share))
            else:
                of_ranks.append(cost.of_experts(mine, layer.width, weights))
        return float(np.max(of_ranks, axis=0).mean())

    runners = _runners(profile, layer, runner, is_tensor)
    seconds = {name: expected(cost) for name, cost in runners}
    fastest = min(seconds, key=lambda name: seconds[name])
    return _Experts(
        seconds[fastest],
        expected_distinct(*shape, whole),
        expected_pairs(*shape, whole),
        fastest,
    )


def _runners(
    profile: Profile, layer: LayerShape, runner: str, is_own: bool
) -> list[tuple[str, MatrixCost | None]]:
    """The runners that may run a layer's experts, with their cost; None: the limits.

    Args:
        is_own: mlx-lm's own block runs, not this package's runners.
    """
    measured: dict[str, MatrixCost] = {}
    for name in dict.fromkeys(key.partition("|")[0] for key in profile.experts):
        keys = (cost_key(name, packing) for packing in layer.packing.alike)
        if found := [profile.experts[key] for key in keys if key in profile.experts]:
            measured[name] = found[0]
    if runner == "auto":
        own = measured.pop(OWN_BLOCK, None)
        if own is not None and is_own:
            return [(OWN_BLOCK, own)]
        if measured:
            return list(measured.items())
    if runner in measured:
        return [(runner, measured[runner])]
    if runner in ("auto", "gather", "metal") and not measured:
        return [("limits", None)]
    raise ValueError(
        f"The profile {profile.name!r} has no runner {runner!r} for experts packed as "
        f"{str(layer.packing)!r}; it has {', '.join(profile.experts) or 'none'}. Use "
        "runner auto, or calibrate with that packing."
    )


def _limits(
    profile: Profile, layer: LayerShape, counts: np.ndarray, held: int, share: int
) -> np.ndarray:
    """Seconds by what memory and arithmetic allow, for ``counts [draws, experts]`` of a
    rank that holds so many experts.

    Each expert that is used is read once. Rows are multiplied one by one where they are
    few, in tiles of `TILE_ROWS` where there are `SORTED_ROWS` per expert.
    """
    weights, num_bytes = layer.expert_weights / share, layer.expert_bytes / share
    memory = (counts > 0).sum(axis=-1) * num_bytes / profile.memory_bandwidth
    pairs = counts.sum(axis=-1)
    tiles = (-(-counts // TILE_ROWS) * TILE_ROWS).sum(axis=-1)
    is_sorted = pairs >= SORTED_ROWS * held
    few = 2 * pairs * weights / profile.unsorted_rate
    many = 2 * tiles * weights / profile.expert_rate
    return np.maximum(memory, np.where(is_sorted, many, few))


def dense_seconds(
    profile: Profile, matrices: MatrixTotal, packing: Packing, tokens: Number
) -> float:
    """Matrices that all tokens pass: read once, or multiplied, whichever is longer."""
    if not matrices.weights or not tokens:
        return 0.0
    keys = (str(alike) for alike in packing.alike)
    cost = next((profile.dense[key] for key in keys if key in profile.dense), None)
    if cost is not None:
        # on host
        return float(cost.per_weight(np.array(tokens))) * matrices.weights
    memory = matrices.num_bytes / profile.memory_bandwidth
    return max(memory, 2 * tokens * matrices.weights / profile.matmul_rate)


@dataclass(frozen=True)
class _Moved:
    collectives: tuple[Collective, ...]
    host_syncs: int = 0


def _exchange(
    layer: LayerShape,
    arm: str,
    tokens: int,
    counts: tuple[int, ...],
    profile: Profile,
    link: str | None,
    config: EPConfig | None,
) -> _Moved:
    """What completes the sum of one MoE layer, as seen from the rank with most tokens.

    Args:
        counts: tokens of each rank where they are spread.
    """
    if len(counts) == 1:
        return _Moved(())
    if arm == "tp":  # mlx-lm sums in the model's dtype
        num_bytes = tokens * layer.width * layer.itemsize
        return _Moved((Collective("all_reduce", num_bytes),))
    is_sharded = arm not in ("ep-replicated", "ep-tensor")
    settings = config or EPConfig()
    strategy = STRATEGIES.create(_with_strategy(settings, STRATEGY[arm]))
    shape = ExchangeShape(
        tokens=TokenCounts(counts if is_sharded else (tokens,) * len(counts)),
        rank=counts.index(max(counts)),
        width=layer.width,
        top_k=layer.top_k,
        itemsize=layer.itemsize,
        sum_itemsize=4 if settings.sums == "float32" else None,
        transport=profile.link(link).transport,
        dispatch_dtype=settings.dispatch_dtype if is_sharded else "model",
    )
    traffic = layer_traffic(strategy, shape)
    return _Moved(traffic.collectives, traffic.host_syncs)


def _with_strategy(config: EPConfig, strategy: str) -> EPConfig:
    return EPConfig(
        strategy=strategy,
        mode=config.mode if strategy == "all_to_all" else "auto",
        low_latency_tokens=config.low_latency_tokens,
        round_tokens=config.round_tokens,
        sums=config.sums,
        dispatch_dtype="model" if strategy == "replicated" else config.dispatch_dtype,
    )


def collectives_seconds(
    profile: Profile,
    collectives: tuple[Collective, ...],
    num_ranks: int,
    link: str | None = None,
) -> float:
    """Collectives one after another, each with its crossing."""
    if num_ranks == 1 or not collectives:
        return 0.0
    cable: Link = profile.link(link)
    return sum(
        cable.seconds(operation, num_bytes, num_ranks) + cable.crossing_seconds
        for operation, num_bytes in collectives
    )
