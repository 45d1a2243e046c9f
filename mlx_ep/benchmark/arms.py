"""The arms of a layer: one MoE block, run in every way that is compared.

All of them run mlx-lm's own block (router, switch, weighted sum) with the same router
and the same experts; the `ep` arms are that block after what `mlx_ep.load` does to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Float32, Int32
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.benchmark.block import OneLayer, Router, moe_block
from mlx_ep.benchmark.experts import alias_of, random_switch, weight_bytes
from mlx_ep.benchmark.shapes import LayerShape, NumberFormat, why_no_tensor_parallelism
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.metrics import STAGES, StageTimings
from mlx_ep.models import BlockState, find_forms, install
from mlx_ep.moe import ExpertGroup
from mlx_ep.placement import Placement
from mlx_ep.tune import Layer, Wish, tune
from mlx_ep.types import TokenCounts

# The strategy of each arm with expert parallelism; the rest is mlx-lm alone.
ARM_STRATEGIES = {
    "ep-replicated": "replicated",
    "ep-tensor": "replicated",
    "ep-gathered": "gathered",
    "ep-all-to-all": "all_to_all",
}
ARMS = ("single", "tp", *ARM_STRATEGIES)
# Arms in which each rank has tokens of its own.
SHARDED = ("ep-gathered", "ep-all-to-all")


@dataclass(frozen=True)
class CallTraffic:
    """What one call of a layer hands to collectives on this rank."""

    collectives: int = 0
    num_bytes: int = 0


@dataclass
class LayerArm:
    """One way to run the layer on this rank.

    Attributes:
        name: in `ARMS`.
        runner: what runs the experts.
        block: takes ``[T, D]``; None on a rank that has nothing to do.
        weight_bytes: of this rank's experts.
        group: of an ep arm.
        state: of the block of an ep arm.
        router: gives ids and gates as the block's own router does.
    """

    name: str
    runner: str
    block: nn.Module | None
    weight_bytes: int
    comm: GroupComm
    group: ExpertGroup | None = None
    state: BlockState | None = field(default=None, repr=False)
    router: Router | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.name} ({self.runner})" if self.group else self.name

    @property
    def is_idle(self) -> bool:
        return self.block is None

    def part(self, num_tokens: int) -> slice:
        """Which of the T tokens this rank has; the first ranks may have one more."""
        if self.name not in SHARDED:
            return slice(num_tokens)
        counts = token_counts(num_tokens, self.comm.size)
        start = sum(counts[: self.comm.rank])
        return slice(start, start + counts[self.comm.rank])

    def agree(self, num_tokens: int) -> None:
        """Once per step and not per layer, as in a model: the ranks' token counts."""
        if self.group is not None and self.name in SHARDED:
            counts = token_counts(num_tokens, self.comm.size)
            self.group.step.tokens = TokenCounts(counts)

    def run(self, x: Float[mx.array, "T D"]) -> Float[mx.array, "T D"]:
        """The layer's output for this rank's tokens, evaluated."""
        assert self.block is not None
        if self.state is not None and not len(x):
            # What a rank does in a model that has run out of sequences.
            self.state.serve()
            return x
        y = self.block(x)
        # sync: this is what is timed.
        mx.eval(y)
        return y

    def traffic(self, x: Float[mx.array, "T D"]) -> CallTraffic:
        """What the calls since `forget_traffic` moved; for tp what its block sums."""
        if self.group is not None:
            counters = self.group.counters
            return CallTraffic(counters.collectives, counters.collective_bytes)
        return CallTraffic(1, x.nbytes) if self.name == "tp" else CallTraffic()

    def forget_traffic(self) -> None:
        if self.group is not None:
            self.group.counters.reset()

    def staged(self, x: Float[mx.array, "T D"]) -> dict[str, float]:
        """Seconds of each stage in one call."""
        if self.is_idle:
            return dict.fromkeys(STAGES, 0.0)
        if self.group is None:
            return self._plain_stages(x)
        with self.group.timings.measure() as timings:
            timings.start()
            self.run(x)
        return dict(timings.seconds)

    def _plain_stages(self, x: Float[mx.array, "T D"]) -> dict[str, float]:
        """The stages of mlx-lm's block: route, experts and, with tp, wait and sum."""
        assert self.block is not None and self.router is not None
        timings, block = StageTimings(enabled=True), self.block
        timings.start()
        ids, gates = timings.run("route", self.router, x)

        def experts() -> mx.array:
            outputs = block.switch_mlp(x, ids)
            return (outputs * gates[..., None]).sum(axis=-2).astype(x.dtype)

        def combine(total: mx.array) -> mx.array:
            return mx.distributed.all_sum(total, group=self.comm.group)

        total = timings.run("experts", experts)
        if self.name == "tp":
            timings.run("combine", combine, total, barrier=self.comm.barrier)
        return dict(timings.seconds)


def token_counts(num_tokens: int, num_ranks: int) -> tuple[int, ...]:
    """How many of the T tokens each rank has where they are spread.

    >>> token_counts(5, 2)
    (3, 2)
    """
    share, rest = divmod(num_tokens, num_ranks)
    return tuple(share + (rank < rest) for rank in range(num_ranks))


def distinct_on_busiest(
    name: str, expert_ids: Int32[np.ndarray, "T K"], placement: Placement
) -> float:
    """Whole experts whose weights the busiest rank reads at least once.

    With tp every rank reads 1/P of each expert that any token visits.
    """
    distinct = np.unique(expert_ids)
    if name == "single":
        return float(len(distinct))
    if name == "tp":
        return len(distinct) / placement.num_ranks
    ranks = placement.expert_ranks[distinct]
    return float(np.bincount(ranks, minlength=placement.num_ranks).max())


def why_not(
    name: str,
    level: str,
    shape: LayerShape | None,
    weights: NumberFormat | None,
    num_ranks: int,
) -> str:
    """Why an arm does not exist here, or ""."""
    if num_ranks == 1 and name != "single":
        return "it needs 2 ranks or more (one rank runs arm single)"
    if level == "layer" and name == "ep-tensor":
        return (
            "it differs from ep-replicated in the attention only: at level layer they "
            "are the same"
        )
    if name == "tp" and shape is not None and weights is not None:
        return why_no_tensor_parallelism(shape, weights, num_ranks)
    return ""


def rank_weight_bytes(
    names: list[str], shape: LayerShape, num_ranks: int, rank: int
) -> int:
    """Bytes of the experts that a rank holds for all arms of a layer together."""
    held = 0
    if "single" in names and rank == 0:
        held += shape.num_experts * shape.expert_bytes
    if "tp" in names:
        held += shape.num_experts * shape.expert_bytes // num_ranks
    if any(name in ARM_STRATEGIES for name in names):
        placement = Placement.contiguous(shape.num_experts, num_ranks)
        held += placement.num_slots(rank) * shape.expert_bytes
    return held


def build_arms(
    names: list[str],
    runners: list[str],
    shape: LayerShape,
    weights: NumberFormat,
    router: Float32[np.ndarray, "E D"],
    comm: GroupComm,
) -> list[LayerArm]:
    """The arms on this rank. Every rank must call it.

    Args:
        names: in `ARMS`; they exist for this shape.
        runners: of the arms with expert parallelism, which are built once for each.
        router: the router's matrix.
    """
    placement = Placement.contiguous(shape.num_experts, comm.size)
    dtype = weights.mlx_dtype
    gate = nn.Linear(shape.width, shape.num_experts, bias=False)
    gate.weight = mx.array(router).astype(dtype)

    def block_of(switch: SwitchGLU) -> nn.Module:
        return moe_block(shape, gate, switch)

    arms = []
    everyone = range(shape.num_experts)
    if "single" in names:
        found = None
        if comm.rank == 0:
            found = block_of(random_switch(shape, weights, everyone))
        arms.append(_plain_arm("single", found, shape, comm))
    if "tp" in names:
        switch = random_switch(shape, weights, everyone, comm.group)
        arms.append(_plain_arm("tp", block_of(switch), shape, comm))
        assert arms[-1].block is not None
        arms[-1].block.sharding_group = comm.group
    expert_arms = [name for name in names if name in ARM_STRATEGIES]
    if not expert_arms:
        return arms
    own = random_switch(shape, weights, placement.rank_experts[comm.rank])
    for runner in runners:
        switch = alias_of(own)
        layer = Layer(switch, dtype, shape.top_k)
        wish = Wish(runner, "auto", warmup=runner == "auto")
        tune([layer], shape.num_experts, comm, wish)
        for name in expert_arms:
            config = EPConfig(strategy=ARM_STRATEGIES[name])
            group = ExpertGroup.from_config(comm, placement, config)
            block = block_of(switch)
            model = OneLayer(block, shape.width, dtype)
            is_sharded = group.strategy.is_sharded
            forms = find_forms(model, comm, is_sharded=is_sharded)
            (state,) = install(forms, group, "partial_sum")
            held = weight_bytes(switch)
            arms.append(LayerArm(name, runner, block, held, comm, group, state))
    return arms


def _plain_arm(
    name: str,
    block: nn.Module | None,
    shape: LayerShape,
    comm: GroupComm,
) -> LayerArm:
    if block is None:
        return LayerArm(name, "gather", None, 0, comm)
    held = weight_bytes(block.switch_mlp)
    return LayerArm(name, "gather", block, held, comm, router=Router(shape, block))
