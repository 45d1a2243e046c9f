"""MoE blocks that are expert-parallel.

Blocks and switches keep their paths and parameter names; a block's class is replaced
by a subclass of it whose ``__call__`` spreads the experts over the ranks, in the form
that `block_form` found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.experts import switch_runner
from mlx_ep.models.block_call import BlockCall, BlockView, Stub, zero_outputs
from mlx_ep.models.block_form import BlockForm, replace_call, whole_shared
from mlx_ep.models.routing_probe import IdentityProbe, StandInProbe
from mlx_ep.models.stand_in import OutputsStandIn
from mlx_ep.moe import ExpertGroup
from mlx_ep.types import CompleteRouting, Routing

KERNEL_TOKENS = (64, 1)  # as of a prompt, and of decode


@dataclass
class BlockState:
    """What an expert-parallel block knows beside the model's own parameters.

    Attributes:
        block_class: of the module whose ``__call__`` this is, as it was.
        reduction: see `EPConfig`.
        is_without_experts: their outputs are zeros, and nothing is communicated.
        before: called before every pass through the block, on all ranks alike.
    """

    form: BlockForm
    block_class: type[nn.Module]
    group: ExpertGroup
    reduction: str
    is_without_experts: bool = False
    before: Callable[[], None] | None = None

    @cached_property
    def layer(self) -> int:
        """The number in its path; -1: there is none."""
        parts = self.form.site.path.split(".")
        return int(next((part for part in parts if part.isdecimal()), -1))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
        if self.before is not None:
            self.before()
        form = self.form
        self.group.step.enter(self.layer)
        is_routed = type(form.probe) is StandInProbe and self.reduction != "per_slot"
        if is_routed and not self.is_without_experts:
            output: mx.array = self._with_stand_in(*args, **kwargs)
            return output
        path = form.site.switch_path_in(form.holder)
        call = BlockCall(form.holder, self.block_class, path, args, kwargs)
        if self.is_without_experts:
            return call.run(zero_outputs, self._whole_shared)
        if self.reduction == "per_slot" or form.tier == "per-slot":
            return call.run(self._switch(self.group.slot_outputs), self._whole_shared)
        if type(form.probe) is IdentityProbe:
            return self._weighted_sum(call, form.probe)
        assert form.partial_sum is not None
        return form.partial_sum.output(
            call,
            self._switch(self.group.local_slot_outputs),
            self.group.sum_parts,
            has_shared=form.partial_shared or self.group.comm.rank == 0,
        )

    @cached_property
    def _with_stand_in(self) -> BlockView:
        """The block, whose switch gives stand-ins for its outputs."""
        form = self.form
        path = form.site.switch_path_in(form.holder)
        call = BlockCall(form.holder, self.block_class, path, (), {})

        def switch(x: mx.array, ids: mx.array) -> OutputsStandIn:
            return OutputsStandIn(x, ids, self._routed_sum)

        overlap = self.group.overlap

        def started(module: nn.Module, x: mx.array) -> mx.array:
            """In the place of shared experts: these, behind the sum that is under way.

            MLX runs what waits for the sum in the order in which it is asked for. Asked
            for with it, shared experts may come first, and delay the start of the
            collective, or behind what waits for it.
            """
            output: mx.array = module(x)
            overlap.start_beside(output)
            return output

        is_beside = overlap.wanted != "none" and not form.partial_shared
        return call.view(switch, started if is_beside else None)

    @cached_property
    def _switch_module(self) -> nn.Module:
        return self.form.site.switch

    def _routed_sum(
        self, x: mx.array, ids: mx.array, gates: mx.array, dtype: mx.Dtype
    ) -> mx.array:
        """A `RoutedSum`, over the experts of all ranks."""
        runner = switch_runner(self._switch_module)
        if self.group.keeps_axes(ids.size // ids.shape[-1]):
            routing = CompleteRouting(ids, gates.squeeze(-1).astype(mx.float32))
            return self.group.weighted_sum(x, routing, runner).astype(dtype)
        *lead, top_k = ids.shape
        ids = ids.reshape(-1, top_k)
        if self.group.strategy.is_sharded and not self.group.is_apart:
            ids = ids.astype(mx.int32)  # they travel
        routing = CompleteRouting(
            ids,
            gates.reshape(-1, top_k).astype(mx.float32),
        )
        rows = x.reshape(-1, x.shape[-1])
        total = self.group.weighted_sum(rows, routing, runner)
        return total.astype(dtype).reshape(*lead, total.shape[1])

    @property
    def _whole_shared(self) -> Stub | None:
        """In the place of shared experts that are split: their sum over the ranks."""
        return whole_shared(self.group.counted) if self.form.partial_shared else None

    def _weighted_sum(self, call: BlockCall, probe: IdentityProbe) -> mx.array:
        x, routing, lead = probe.routing(call)
        if probe.exit:
            runner = switch_runner(self.form.site.switch)
            total = self.group.weighted_sum(x, routing, runner)
            return probe.leave(call, total.reshape(*lead, -1))
        runner, shared = switch_runner(self.form.site.switch), probe.shared(call)
        extra = None
        if shared is not None and self.form.partial_shared:
            extra, shared = shared.reshape(x.shape[0], -1), None
        routed = self.group.weighted_sum(x, routing, runner, extra)
        routed = routed.reshape(*lead, -1)
        if shared is not None:
            routed = routed + shared
        return routed.astype(probe.out_dtype)

    @property
    def can_share(self) -> bool:
        """Whether ranks that need not exchange rows could; see `serve`."""
        chooses = getattr(self.group.strategy, "can_share", False)
        is_free = bool(chooses) and self.group.may_be_apart
        return is_free and self.form.tier == "routed" and self.reduction != "per_slot"

    def serve(self) -> None:
        """Run this rank's experts for tokens of other ranks, with none of its own.

        Raises:
            ValueError: the block is not in the tier ``routed``.
        """
        if self.form.probe is None:
            raise ValueError(
                f"{self.form.site.path} cannot serve tokens of other ranks, because "
                f"{self.form.why_not_routed}. Use --attention replicated."
            )
        if self.before is not None:
            self.before()
        self.group.step.enter(self.layer)
        x = mx.zeros((0, self.form.probe.row_dims), self.form.probe.row_dtype)
        ids = mx.zeros((0, self.form.probe.top_k), mx.int32)
        routing = Routing(ids, ids.astype(mx.float32))
        self.group.weighted_sum(x, routing, switch_runner(self.form.site.switch))

    def _switch(self, slot_outputs: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """A switch that gives ``slot_outputs(x, routing, runner)``, of rows [T, D]."""

        def switch(x: mx.array, ids: mx.array) -> mx.array:
            num_slots, width = ids.shape[-1], x.shape[-1]
            flat_ids = ids.reshape(-1, num_slots).astype(mx.int32)
            routing = Routing(flat_ids, mx.ones(flat_ids.shape, mx.float32))
            rows, runner = x.reshape(-1, width), switch_runner(self.form.site.switch)
            outputs = slot_outputs(rows, routing, runner)
            return outputs.reshape(*ids.shape, width)

        return switch


def install(
    forms: Sequence[BlockForm], group: ExpertGroup, reduction: str
) -> list[BlockState]:
    """Make blocks expert-parallel whose switches already hold local experts only.

    Args:
        forms: what `find_forms` found of them.
        reduction: see `EPConfig`.
    """
    states = []
    for form in forms:
        state = BlockState(form, type(form.holder), group, reduction)
        replace_call(form.holder, state)
        states.append(state)
    return states


def build_kernels(model: nn.Module, states: Sequence[BlockState]) -> None:
    """Run all but the experts once, so that MLX builds its kernels now.

    Later other ranks would wait for it, inside a collective. Nothing is communicated
    where attention is replicated. The kernels of experts are built where they are tried
    (`mlx_ep.tune`).
    """
    for state in states:
        state.is_without_experts = True
    try:
        cache = make_prompt_cache(model)
        for num_tokens in KERNEL_TOKENS:
            # sync: once, when the model is made expert-parallel.
            mx.eval(model(mx.arange(1, num_tokens + 1)[None], cache=cache))
    finally:
        for state in states:
            state.is_without_experts = False
