"""A model whose switches hold this rank's experts becomes expert-parallel."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.api.machines import (
    layers_between,
    machine_facts,
    shares_rank_0_routing,
    unlike,
)
from mlx_ep.api.overlap import OverlapTable, overlap_steps
from mlx_ep.comm import Comm, gather_objects, note_progress, note_step
from mlx_ep.config import EPConfig, settings
from mlx_ep.cost.attention import REPLICATED, AttentionChoice
from mlx_ep.exchange import STRATEGIES, Strategy, sends_nothing
from mlx_ep.loading import Splitter, refuse_dense, watch_phase
from mlx_ep.metrics import Counters, RankReport
from mlx_ep.models import (
    BlockState,
    build_kernels,
    find_forms,
    install,
    keep_experts,
)
from mlx_ep.models.tensor_parallel import connect
from mlx_ep.models.two_batch import TwoBatch
from mlx_ep.moe import (
    ExpertGroup,
    Rebalancer,
    RebalanceRule,
    RoutingRecorder,
    move_slots,
)
from mlx_ep.placement import Moves, Placement
from mlx_ep.rows import MovesRows
from mlx_ep.tune import Layer, ModelPolicy, Wish, tune


@dataclass
class ExpertParallel:
    """What an expert-parallel model says of itself, as ``model.expert_parallel``.

    Attributes:
        group: the ranks, the placement, and the counters of this rank.
        blocks: the MoE layers.
        policy: what runs the experts, by shape and number of rows; ``policy.explain()``
            prints every option with its times.
        reports: of every rank, in rank order; empty for a model that was already in
            memory.
        attention: how the dense part runs, with the reason and predicted times.
        rebalancer: what moves slots between ranks meanwhile; None: nothing does.
        two_batch: what cuts steps in two; None: nothing does.
        overlaps: with ``--overlap auto``, what was measured; ``explain()`` prints it.
    """

    group: ExpertGroup
    blocks: list[BlockState]
    policy: ModelPolicy | None = None
    reports: list[RankReport] = field(default_factory=list)
    attention: AttentionChoice = REPLICATED
    rebalancer: Rebalancer | None = None
    two_batch: TwoBatch | None = None
    overlaps: OverlapTable | None = None
    _recorders: list[RoutingRecorder] = field(default_factory=list)

    @property
    def counters(self) -> Counters:
        return self.group.counters

    def serve(self) -> None:
        """Run this rank's experts in a step of the others, with no tokens of its own.

        Raises:
            ValueError: a block cannot.
        """
        if all(block.group.is_apart for block in self.blocks):
            return
        if self.two_batch is not None:
            self.two_batch.serve()
            return
        for block in self.blocks:
            block.serve()

    @property
    def can_share(self) -> bool:
        """Whether a pass may be shared that needs not be; see `Step.is_shared`."""
        is_possible = self.two_batch is None and bool(self.blocks)
        return is_possible and all(block.can_share for block in self.blocks)

    def placement_of(self, layer: int) -> Placement:
        """The present placement of a MoE layer, by its number from 0 on."""
        return self.blocks[layer].group.placement

    def recorder(self) -> RoutingRecorder:
        """A recorder of this rank's routing, connected to the MoE layers, not started.

        Where ranks have tokens of their own, each records its own.

        Raises:
            ValueError: the model is dense.
        """
        refuse_dense(len(self.blocks), "a record of routing")
        layers = range(len(self.blocks))
        placements = [self.placement_of(layer) for layer in layers]
        made = RoutingRecorder(placements, self.group.may_be_apart)
        for layer, block in enumerate(self.blocks):
            observe = _both(block.group.observe, made.observer(layer))
            block.group = replace(block.group, observe=observe)
        self._recorders.append(made)
        return made

    def place(self, layer: int, placement: Placement) -> int:
        """Give a MoE layer another placement: its experts move between the ranks.

        Every rank must call it alike, between forward passes. One layer's experts at
        most are held a second time meanwhile.

        Returns:
            The bytes that travelled, between all ranks.

        Raises:
            ValueError: the placement is of other experts or ranks.
        """
        block = self.blocks[layer]
        moves = Moves.between(block.group.placement, placement)
        num_bytes = 0

        def moved(parameter: mx.array) -> mx.array:
            nonlocal num_bytes
            row = parameter.dtype.size * math.prod(parameter.shape[1:])
            num_bytes += row * len(moves.transfers)
            return move_slots(parameter, moves, self.group.comm)

        keep_experts(block.form.site, moved)
        mx.clear_cache()
        block.group = replace(block.group, placement=placement)
        for recorder in self._recorders:
            recorder.place(layer, placement)
        # A rank that missed it is found by its fingerprint.
        note_step(layer, int(placement.digest, 16))
        return num_bytes

    @property
    def per_slot_reasons(self) -> list[str]:
        """Why MoE layers exchange K outputs per token instead of their sum."""
        forms = [block.form for block in self.blocks]
        found = {form.why_not_routed for form in forms if form.tier == "per-slot"}
        return sorted(found)


Observer = Callable[[mx.array], None]


def _both(first: Observer | None, second: Observer) -> Observer:
    if first is None:
        return second

    def observe(expert_ids: mx.array) -> None:
        first(expert_ids)
        second(expert_ids)

    return observe


def _computes_as_one(strategy: Strategy, placement: Placement) -> bool:
    """Whether each rank has what one rank alone would have, and sends nothing."""
    ranks = range(placement.num_ranks)
    return sends_nothing(strategy, placement) and all(
        map(placement.has_all_in_order, ranks)
    )


def install_experts(
    model: nn.Module,
    comm: Comm,
    placement: Placement,
    config: EPConfig,
    splitter: Splitter,
) -> nn.Module:
    """Make a model expert-parallel whose switches hold this rank's experts.

    First it is known how each block runs and what runs its experts and moves its rows;
    then the group is made, with its strategy, and the blocks get it.

    Args:
        placement: by which the switches were filled; where its `layers` differ from it
            experts move between the ranks here.
    """
    note_progress("warmup")
    asked = config
    plain = STRATEGIES.create(config)  # what it needs is known without a mover
    if config.overlap != "none" and comm.size > 1 and sends_nothing(plain, placement):
        warnings.warn(
            f"overlap={config.overlap!r} has no effect where every rank has every "
            "expert and nothing is exchanged.",
            stacklevel=3,
        )
        config = replace(config, overlap="none")
    connect(model, comm)  # what is tried is not counted
    forms = find_forms(
        model,
        comm,
        is_sharded=plain.is_sharded,
        partial_shared=splitter.made.partial_shared,
    )
    policy = tune(
        [
            Layer(form.site.switch, form.probe.row_dtype, form.probe.top_k)
            for form in forms
            if form.probe
        ],
        placement.num_experts,
        comm,
        Wish(config.runner, config.backend, config.warmup),
        moves_rows=isinstance(plain, MovesRows),
        dispatch_dtype=config.dispatch_dtype,
        placement=placement.slots,
        is_apart=_computes_as_one(plain, placement),
        watch=lambda total: watch_phase("warm-up", total, comm.rank, "shapes"),
    )
    machines = gather_objects(comm, machine_facts(os.environ))
    shares_routing = shares_rank_0_routing(config, machines)
    config = replace(config, eval_layers=layers_between(config, machines))
    if shares_routing and comm.rank == 0 and (text := unlike(machines)):
        warnings.warn(
            f"Ranks may round differently: {text}. They take rank 0's routing.",
            stacklevel=3,
        )
    group = ExpertGroup.from_config(
        comm, placement, config, shares_routing, policy.mover
    )
    has_metal = any(machine["backend"] == "metal" for machine in machines)
    # The kernel of the choice levels no rows, and all ranks have to choose alike.
    group = replace(group, levels_rows=not has_metal)
    connect(model, group.counted)
    blocks = install(forms, group, config.reduction)
    if comm.size > 1 and has_metal and splitter.choice.attention == "replicated":
        build_kernels(model, blocks)
    comm.barrier()  # nobody's first step waits for another's warm-up
    state = ExpertParallel(
        group,
        blocks,
        policy.with_strategy(group.strategy),
        attention=splitter.choice,
    )
    for layer, wanted in enumerate(placement.layers):
        note_progress("loading", layer)
        state.place(layer, wanted)
    _rebalance_by(config, state)
    if blocks and config.overlap in ("two", "auto"):
        state.two_batch, state.overlaps = overlap_steps(
            model, group, blocks, config.overlap
        )
    if not blocks and placement.stage is None:
        _warn_of_dense(asked)
    model.expert_parallel = state
    if reasons := state.per_slot_reasons:
        warnings.warn(
            f"{type(model).__module__}: K outputs per token travel instead of their "
            f"sum, K times the bytes, because {'; '.join(reasons)}.",
            stacklevel=3,
        )
    if shares_routing and any(form.probe is None for form in forms):
        warnings.warn(
            f"{type(model).__module__} keeps its routing inside its MoE blocks: rank "
            "0's routing cannot be sent to all, and ranks that round differently may "
            "choose different experts at a near-tie.",
            stacklevel=3,
        )
    return model


# What is about a MoE layer, and nothing else of a model.
_OF_LAYERS = ("mode", "capacity", "overlap", "reduction", "runner", "eval_layers")


def _warn_of_dense(config: EPConfig) -> None:
    """Settings that have no effect on a model without MoE layers are named."""
    defaults = {each.name: each for each in settings()}
    given = [
        defaults[name].flag_name
        for name in _OF_LAYERS
        if getattr(config, name) != defaults[name].default
    ]
    if given:
        warnings.warn(
            f"{' and '.join(given)}: no effect on a dense model, which has no MoE "
            "layers.",
            stacklevel=4,
        )


def _rebalance_by(config: EPConfig, state: ExpertParallel) -> None:
    """Slots move as the configuration says."""
    group = state.group
    rule = RebalanceRule.of(config, group.comm.size)
    if not rule.is_on:
        return
    if group.comm.size == 1:
        warnings.warn("On one rank there is nothing to rebalance.", stacklevel=4)
        return
    sums_loads = group.strategy.is_sharded
    recorder = state.recorder()
    if sums_loads or group.comm.rank == 0:
        recorder.start()
    state.rebalancer = Rebalancer(
        rule, group.comm, recorder, state.placement_of, state.place, sums_loads
    )
    state.blocks[0].before = state.rebalancer.before_pass
