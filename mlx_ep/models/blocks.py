"""Finds the MoE blocks of an mlx-lm model and makes them expert-parallel.

Blocks and switches keep their paths and parameter names; a block's class is replaced
by a subclass of it whose ``__call__`` spreads the experts over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.experts import switch_runner
from mlx_ep.models.block_call import (
    BlockCall,
    BlockView,
    Stub,
    zero_column,
    zero_outputs,
)
from mlx_ep.models.partial_sum import PartialSum, find_partial_sum
from mlx_ep.models.routing_probe import (
    IdentityProbe,
    Probe,
    StandInProbe,
    find_probe,
)
from mlx_ep.models.sites import MoESite
from mlx_ep.models.stand_in import OutputsStandIn
from mlx_ep.moe import ExpertGroup
from mlx_ep.types import CompleteRouting, Routing, to_host

_VERIFY_TOKENS = 64

Tier = Literal["routed", "partial-sum", "per-slot"]
TIERS: tuple[Tier, ...] = ("routed", "partial-sum", "per-slot")


@dataclass
class BlockState:
    """What an expert-parallel block knows beside the model's own parameters.

    Attributes:
        holder: the module whose ``__call__`` is replaced: the site's block, or
            `site.summing` where the sum over the ranks belongs there.
        probe: how its routing is read off, in the tier ``routed``.
        partial_sum: where the ranks' parts are added, in the tier ``partial-sum``.
        why_not_routed: the reason, in the other two tiers.
        partial_shared: the shared experts are split over the ranks, so that what they
            give on a rank is a partial sum too.
    """

    site: MoESite
    holder: nn.Module
    block_class: type[nn.Module]
    group: ExpertGroup
    reduction: str
    probe: Probe | None = None
    partial_sum: PartialSum | None = None
    why_not_routed: str = ""
    partial_shared: bool = False
    is_verifying: bool = False

    @property
    def tier(self) -> Tier:
        """What `verify_blocks` found the block to allow.

        ``routed``: experts' sums travel, by any strategy. ``partial-sum``: the block's
        own code runs on local experts, and its one sum travels, with the strategy
        ``replicated``. ``per-slot``: K outputs per token travel.
        """
        if self.probe is not None:
            return "routed"
        return "per-slot" if self.partial_sum is None else "partial-sum"

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
        is_routed = type(self.probe) is StandInProbe and self.reduction != "per_slot"
        if is_routed and not self.is_verifying:
            output: mx.array = self._with_stand_in(*args, **kwargs)
            return output
        path = self.site.switch_path_in(self.holder)
        call = BlockCall(self.holder, self.block_class, path, args, kwargs)
        if self.is_verifying:
            call = replace(call, args=_without_history(args))
            self._find_tier(call)
            return call.run(zero_outputs, self._whole_shared)
        if self.reduction == "per_slot" or self.tier == "per-slot":
            return call.run(self._switch(self.group.slot_outputs), self._whole_shared)
        if type(self.probe) is IdentityProbe:
            return self._weighted_sum(call, self.probe)
        assert self.partial_sum is not None
        return self.partial_sum.output(
            call,
            self._switch(self.group.local_slot_outputs),
            self.group.sum_parts,
            has_shared=self.partial_shared or self.group.comm.rank == 0,
        )

    @cached_property
    def _with_stand_in(self) -> BlockView:
        """The block, whose switch gives stand-ins for its outputs."""
        path = self.site.switch_path_in(self.holder)
        call = BlockCall(self.holder, self.block_class, path, (), {})

        def switch(x: mx.array, ids: mx.array) -> OutputsStandIn:
            return OutputsStandIn(x, ids, self._routed_sum)

        is_beside = self.group.overlaps and not self.partial_shared
        return call.view(switch, _started if is_beside else None)

    def _routed_sum(
        self, x: mx.array, ids: mx.array, gates: mx.array, dtype: mx.Dtype
    ) -> mx.array:
        """A `RoutedSum`, over the experts of all ranks."""
        *lead, top_k = ids.shape
        ids = ids.reshape(-1, top_k)
        if self.group.strategy.is_sharded:
            ids = ids.astype(mx.int32)  # they travel
        routing = CompleteRouting(
            ids,
            gates.reshape(-1, top_k).astype(mx.float32),
        )
        rows, runner = x.reshape(-1, x.shape[-1]), switch_runner(self.site.switch)
        total = self.group.weighted_sum(rows, routing, runner)
        return total.astype(dtype).reshape(*lead, total.shape[1])

    def _find_tier(self, call: BlockCall) -> None:
        self.probe, self.why_not_routed = find_probe(call, self.partial_shared)
        # Ranks with tokens of their own would add those of different tokens.
        if self.probe is None and not self.group.strategy.is_sharded:
            self.partial_sum, reason = find_partial_sum(call)
            if reason:
                self.why_not_routed += f", and {reason}"
        if self.partial_shared and not self._can_add_shared(call):
            self.probe = self.partial_sum = None
            self.why_not_routed = "its shared experts are not all that it adds"

    def _can_add_shared(self, call: BlockCall) -> bool:
        """Whether parts of the shared experts, and nothing else, join the sum."""
        if self.probe is None:
            return self.partial_sum is None or self.partial_sum.shared_once
        rest = mx.abs(call.run(zero_outputs, zero_column)).max()
        # sync: once per block, when the model is made expert-parallel.
        return not rest.item()

    @property
    def _whole_shared(self) -> Stub | None:
        """In the place of shared experts that are split: their sum over the ranks."""
        if not self.partial_shared:
            return None
        return lambda module, x: self.group.counted.all_reduce(module(x))

    def _weighted_sum(self, call: BlockCall, probe: IdentityProbe) -> mx.array:
        x, routing, lead = probe.routing(call)
        if probe.exit:
            runner = switch_runner(self.site.switch)
            total = self.group.weighted_sum(x, routing, runner)
            return probe.leave(call, total.reshape(*lead, -1))
        runner, shared = switch_runner(self.site.switch), probe.shared(call)
        extra = None
        if shared is not None and self.partial_shared:
            extra, shared = shared.reshape(x.shape[0], -1), None
        routed = self.group.weighted_sum(x, routing, runner, extra)
        routed = routed.reshape(*lead, -1)
        if shared is not None:
            routed = routed + shared
        return routed.astype(probe.out_dtype)

    def serve(self) -> None:
        """Run this rank's experts for tokens of other ranks, with none of its own.

        Raises:
            ValueError: the block is not in the tier ``routed``.
        """
        if self.probe is None:
            raise ValueError(
                f"{self.site.path} cannot serve tokens of other ranks, because "
                f"{self.why_not_routed}. Use --attention replicated."
            )
        x = mx.zeros((0, self.probe.row_dims), self.probe.row_dtype)
        ids = mx.zeros((0, self.probe.top_k), mx.int32)
        routing = Routing(ids, ids.astype(mx.float32))
        self.group.weighted_sum(x, routing, switch_runner(self.site.switch))

    def _switch(self, slot_outputs: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """A switch that gives ``slot_outputs(x, routing, runner)``, of rows [T, D]."""

        def switch(x: mx.array, ids: mx.array) -> mx.array:
            num_slots, width = ids.shape[-1], x.shape[-1]
            flat_ids = ids.reshape(-1, num_slots).astype(mx.int32)
            routing = Routing(flat_ids, mx.ones(flat_ids.shape, mx.float32))
            rows, runner = x.reshape(-1, width), switch_runner(self.site.switch)
            outputs = slot_outputs(rows, routing, runner)
            return outputs.reshape(*ids.shape, width)

        return switch


def _started(module: nn.Module, x: mx.array) -> mx.array:
    """In the place of shared experts: these, queued behind the sum that is under way.

    MLX runs what waits for the sum in the order in which it is asked for. Asked for
    with it, shared experts may come first, and delay the start of the collective, or
    behind what waits for it.
    """
    output: mx.array = module(x)
    mx.async_eval(output)
    return output


@cache
def _expert_parallel_class(block_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        return self.expert_parallel(args, kwargs)

    return type(
        f"ExpertParallel{block_class.__name__}", (block_class,), {"__call__": call}
    )


def install(
    sites: Sequence[MoESite],
    group: ExpertGroup,
    reduction: str,
    partial_shared: Collection[str] = (),
) -> list[BlockState]:
    """Make blocks expert-parallel whose switches already hold local experts only.

    Args:
        partial_shared: paths of the blocks whose shared experts are split over the
            ranks, see `mlx_ep.models.tensor_parallel`.
    """
    states = [_install(site, site.block, group, reduction) for site in sites]
    for state in states:
        state.partial_shared = state.site.path in partial_shared
    return states


def _install(
    site: MoESite, holder: nn.Module, group: ExpertGroup, reduction: str
) -> BlockState:
    block_class = type(holder)
    state = BlockState(site, holder, block_class, group, reduction)
    # A plain object, so that nn.Module does not take it for a parameter or child.
    holder.expert_parallel = state
    holder.__class__ = _expert_parallel_class(block_class)
    return state


def verify_blocks(model: nn.Module, states: list[BlockState]) -> None:
    """Find each block's tier by one forward pass, without experts.

    The ranks communicate where a dense part that is split does.

    Each block gets random tokens of its own. What makes it nonlinear may show for some
    of them only (an identity expert that no token chose), so there are many, and blocks
    of one class share the verdict, on all ranks: the lowest of their tiers. A block
    whose sum over the ranks belongs to a module around it is tried again there, in a
    second pass.

    Args:
        model: with the blocks of `install`.
        states: of all blocks; those that move to a module around them are replaced.
    """
    _run_verification(model, states)
    moved = [i for i, state in enumerate(states) if _belongs_around(state)]
    for i in moved:
        state = states[i]
        state.holder.__class__ = state.block_class
        del state.holder.expert_parallel
        states[i] = _install(
            state.site, state.site.summing, state.group, state.reduction
        )
        states[i].partial_shared = state.partial_shared
    if moved:
        _run_verification(model, [states[i] for i in moved])
    _agree(states)


def _belongs_around(state: BlockState) -> bool:
    return (
        state.probe is None
        and not state.group.strategy.is_sharded
        and state.site.summing is not state.holder
    )


def _run_verification(model: nn.Module, states: Sequence[BlockState]) -> None:
    for state in states:
        state.is_verifying = True
    # What each block is called with is all that this is for: nothing is evaluated but
    # what the blocks look at.
    model(mx.arange(1, _VERIFY_TOKENS + 1)[None], cache=make_prompt_cache(model))
    for state in states:
        state.is_verifying = False


def _without_history(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a block with random tokens as its input.

    What is tried is the block's own form. With the model's own numbers all layers
    before it would be computed for that, which takes several times as long as loading.
    """
    if not args or not isinstance(args[0], mx.array):
        return args
    x = args[0]
    if not mx.issubdtype(x.dtype, mx.floating):
        return args
    return mx.random.normal(x.shape, key=mx.random.key(0)).astype(x.dtype), *args[1:]


def _agree(states: Sequence[BlockState]) -> None:
    """One tier for all blocks of a class, on all ranks."""
    by_class: dict[type[nn.Module], list[BlockState]] = {}
    for state in states:
        by_class.setdefault(state.block_class, []).append(state)
    for alike in by_class.values():
        lowest = max(alike, key=lambda state: TIERS.index(state.tier))
        for state in alike:
            _lower(state, lowest.tier, lowest.partial_sum, lowest.why_not_routed)
    ways = mx.array([[_number(state) for state in states]], mx.int32)
    # sync: once, when the model is made expert-parallel.
    ranks = to_host(states[0].group.comm.all_gather(ways))
    for state, differ in zip(states, (ranks != ranks[0]).any(axis=0)):
        if differ:  # chips may round differently, close to the tolerance
            _lower(state, "per-slot", None, "the ranks' checks of it disagree")


def _lower(
    state: BlockState, tier: Tier, partial_sum: PartialSum | None, reason: str
) -> None:
    if tier != "routed":
        state.probe, state.partial_sum = None, partial_sum
        state.why_not_routed = reason


def _number(state: BlockState) -> int:
    """The way in which a block was found to work, for comparing it between ranks."""
    way = state.partial_sum
    details = 0 if way is None else 4 + 2 * way.in_block + way.shared_once
    return 8 * TIERS.index(state.tier) + details
