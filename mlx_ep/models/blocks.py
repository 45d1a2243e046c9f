"""Finds the MoE blocks of an mlx-lm model and makes them expert-parallel.

Blocks and switches keep their paths and parameter names; a block's class is replaced
by a subclass of it whose ``__call__`` spreads the experts over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlx_ep.models.routing_probe import BlockCall, Probe, find_probe
from mlx_ep.moe import ExpertGroup
from mlx_ep.runners import switch_runner
from mlx_ep.types import Routing

_VERIFY_TOKENS = 64
PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")


@dataclass(frozen=True)
class MoESite:
    """A place in a model where experts are routed.

    Attributes:
        path: of the block, such as ``model.layers.3.mlp``.
        block: routes, calls its switch and sums.
        switch_name: the block's attribute that holds the switch.
    """

    path: str
    block: nn.Module
    switch_name: str

    @property
    def switch(self) -> nn.Module:
        return self.block[self.switch_name]

    @property
    def num_experts(self) -> int:
        """The experts that the switch holds now."""
        return self.projections[0].num_experts

    @property
    def projections(self) -> list[nn.Module]:
        """The switch's stacked linear layers; experts are axis 0 of each parameter."""
        return [self.switch[name] for name in PROJECTIONS if name in self.switch]


def find_moe_sites(model: nn.Module) -> list[MoESite]:
    """Every block with routed experts, in the model's order.

    Raises:
        ValueError: there is none, or the sites differ in their number of experts.
    """
    sites = sorted(_walk(model), key=lambda site: _natural(site.path))
    if not sites:
        raise ValueError(
            "The model has no routed experts that mlx_ep can find (no SwitchGLU or "
            f"SwitchMLP in {type(model).__module__}): expert parallelism needs a "
            "Mixture-of-Experts model. A dense model runs with mlx_lm.generate."
        )
    counts = {site.num_experts for site in sites}
    if len(counts) > 1:
        raise ValueError(
            "All MoE layers of a model must have the same number of experts; got "
            f"{sorted(counts)} in {type(model).__module__}."
        )
    return sites


def _walk(model: nn.Module) -> Iterator[MoESite]:
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, (SwitchGLU, SwitchMLP)):
            parent, _, name = path.rpartition(".")
            yield MoESite(parent, modules[parent], name)


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    parts = path.split(".")
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def keep_experts(site: MoESite, take: Callable[[mx.array], mx.array]) -> None:
    """Replace every expert-stacked parameter of a site by ``take(parameter)``."""
    for projection in site.projections:
        projection.update(tree_map(take, projection.parameters()))


@dataclass
class BlockState:
    """What an expert-parallel block knows beside the model's own parameters.

    Attributes:
        probe: how its routing is read off; None until `verify_blocks`, or where it
            cannot be: then K outputs per token travel instead of their sum.
        why_per_slot: the reason, where that is so.
    """

    site: MoESite
    block_class: type[nn.Module]
    group: ExpertGroup
    reduction: str
    probe: Probe | None = None
    why_per_slot: str = ""
    is_verifying: bool = False

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
        call = BlockCall(
            self.site.block, self.block_class, self.site.switch_name, args, kwargs
        )
        if self.is_verifying:
            self.probe, self.why_per_slot = find_probe(call)
            return call.run(lambda x, ids: mx.zeros((*ids.shape, x.shape[-1]), x.dtype))
        if self.reduction == "per_slot" or self.probe is None:
            return call.run(self._slot_outputs)
        return self._weighted_sum(call, self.probe)

    def _weighted_sum(self, call: BlockCall, probe: Probe) -> mx.array:
        x, routing, lead = probe.routing(call)
        routed = self.group.weighted_sum(x, routing, switch_runner(self.site.switch))
        routed = routed.reshape(*lead, -1)
        shared = probe.shared(call)
        if shared is not None:
            routed = routed + shared
        return routed.astype(probe.out_dtype)

    def serve(self) -> None:
        """Run this rank's experts for tokens of other ranks, with none of its own.

        Raises:
            ValueError: the block exchanges K outputs per token.
        """
        if self.probe is None:
            raise ValueError(
                f"{self.site.path} cannot serve tokens of other ranks, because "
                f"{self.why_per_slot}. Use --attention replicated."
            )
        x = mx.zeros((0, self.probe.row_dims), self.probe.row_dtype)
        ids = mx.zeros((0, self.probe.top_k), mx.int32)
        routing = Routing(ids, ids.astype(mx.float32))
        self.group.weighted_sum(x, routing, switch_runner(self.site.switch))

    def _slot_outputs(self, x: mx.array, ids: mx.array) -> mx.array:
        num_slots, width = ids.shape[-1], x.shape[-1]
        flat_ids = ids.reshape(-1, num_slots).astype(mx.int32)
        routing = Routing(flat_ids, mx.ones(flat_ids.shape, mx.float32))
        outputs = self.group.slot_outputs(
            x.reshape(-1, width), routing, switch_runner(self.site.switch)
        )
        return outputs.reshape(*ids.shape, width)


@cache
def _expert_parallel_class(block_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        return self.expert_parallel(args, kwargs)

    return type(
        f"ExpertParallel{block_class.__name__}", (block_class,), {"__call__": call}
    )


def install(
    sites: Sequence[MoESite], group: ExpertGroup, reduction: str
) -> list[BlockState]:
    """Make blocks expert-parallel whose switches already hold local experts only."""
    states = []
    for site in sites:
        block_class = type(site.block)
        state = BlockState(site, block_class, group, reduction)
        # A plain object, so that nn.Module does not take it for a parameter or child.
        site.block.expert_parallel = state
        site.block.__class__ = _expert_parallel_class(block_class)
        states.append(state)
    return states


def verify_blocks(model: nn.Module, states: Sequence[BlockState]) -> None:
    """Find each block's probe by one forward pass, without experts or communication.

    What makes a block nonlinear may show for some tokens only (an identity expert that
    no token chose), so there are many of them, and blocks of one class share the
    verdict: one without a probe leaves all without.
    """
    for state in states:
        state.is_verifying = True
    cache = make_prompt_cache(model)
    # sync: once, when the model is made expert-parallel.
    mx.eval(model(mx.arange(1, _VERIFY_TOKENS + 1)[None], cache=cache))
    reasons = {s.block_class: s.why_per_slot for s in states if s.probe is None}
    for state in states:
        state.is_verifying = False
        if state.block_class in reasons:
            state.probe, state.why_per_slot = None, reasons[state.block_class]
