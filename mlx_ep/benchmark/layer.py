"""Level ``layer``: one MoE layer, every arm, over a sweep of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_ep.benchmark import legacy
from mlx_ep.benchmark.arms import (
    CallTraffic,
    LayerArm,
    build_arms,
    distinct_on_busiest,
    rank_weight_bytes,
)
from mlx_ep.benchmark.samples import (
    Budget,
    agreed_count,
    ratio,
    sample,
    slowest,
)
from mlx_ep.benchmark.shapes import LayerShape, NumberFormat
from mlx_ep.benchmark.tokens import TokenSource
from mlx_ep.comm import GroupComm, gather_objects
from mlx_ep.measure.machine import MemoryMark, check_memory
from mlx_ep.metrics import COMMUNICATION_STAGES, STAGES
from mlx_ep.placement import Placement
from mlx_ep.types import to_host

# Uncounted rounds before the samples, as far as a share of the budget lasts.
MOST_WARMUPS, WARMUP_SHARE = 4, 0.1
# Largest difference between arms, of the largest output: what rounding makes.
TOLERANCES = {mx.float32: 1e-4, mx.bfloat16: 3e-2, mx.float16: 5e-3}


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """What is measured.

    Attributes:
        arms: names in `mlx_ep.benchmark.arms.ARMS`.
        runners: what runs the experts of the ep arms; each of them once.
        tokens: T, of all ranks together.
        skew: of the routing, see `TokenSource`.
        memory_limit_gb: most GB a rank may hold; None: what it has.
        legacy: whether to count as ml-explore/mlx#3158 did, too.
    """

    shape: LayerShape
    weights: NumberFormat
    arms: Sequence[str]
    runners: Sequence[str] = ("gather",)
    tokens: Sequence[int]
    skew: float = 0.0
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    memory_limit_gb: float | None = None
    legacy: bool = False


def check_layer(plan: LayerRun, comm: GroupComm) -> None:
    """Every rank must call it; nothing is built.

    Raises:
        ValueError: on every rank: the weights and activations do not fit.
    """
    shape = plan.shape
    held = rank_weight_bytes(list(plan.arms), shape, comm.size, comm.rank)
    if plan.legacy:
        dense = 3 * shape.width * shape.expert_width * shape.itemsize
        held += dense + dense // comm.size
    check_memory(comm, held + activation_bytes(plan), plan.memory_limit_gb)


def activation_bytes(plan: LayerRun) -> int:
    """A bound on what the largest number of tokens needs beside the weights.

    Per (token, expert) pair a sorted copy of the token, the output and its float32 term
    of the sum; gate, up and their product; per token a few copies of it in float32.
    """
    shape, most = plan.shape, max(plan.tokens)
    row, wide = shape.width * shape.itemsize, shape.expert_width * shape.itemsize
    pairs = most * shape.top_k * (2 * row + 4 * shape.width + 3 * wide)
    return pairs + most * 4 * (6 * shape.width + 2 * shape.num_experts)


def measure_layer(
    plan: LayerRun, comm: GroupComm, report: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """The records of all points. Every rank must call it.

    Args:
        report: called with the records of each point as soon as it is measured.

    Raises:
        RuntimeError: on every rank: two arms do not give the same output.
    """
    dtype = plan.weights.mlx_dtype
    source = TokenSource(plan.shape, dtype, plan.skew, plan.seed)
    arms = build_arms(
        list(plan.arms),
        list(plan.runners),
        plan.shape,
        plan.weights,
        source.router,
        comm,
    )
    counting = legacy.LegacyCount(plan.shape, dtype, comm) if plan.legacy else None
    records = []
    for num_tokens in plan.tokens:
        point = MeasuredPoint(plan, comm, arms, source, num_tokens)
        found = point.records()
        if counting is not None:
            ids = mx.array(source.expert_ids(num_tokens, comm.rank))
            parts = counting.measure(num_tokens, ids, plan.budget)
            for record in found:
                record["legacy_3158"] = legacy.to_json(parts, plan.shape.top_k)
        report(found)
        records += found
    return records


class MeasuredPoint:
    """All arms at one number of tokens."""

    def __init__(
        self,
        plan: LayerRun,
        comm: GroupComm,
        arms: Sequence[LayerArm],
        source: TokenSource,
        num_tokens: int,
    ) -> None:
        self.plan, self.comm, self.arms = plan, comm, arms
        self.source, self.num_tokens = source, num_tokens
        self.placement = Placement.contiguous(plan.shape.num_experts, comm.size)
        self.distinct: dict[str, list[float]] = {arm.label: [] for arm in arms}
        self.x: dict[str, mx.array] = {}

    def records(self) -> list[dict[str, Any]]:
        """Check, warm up, sample, then take the stages apart."""
        for arm in self.arms:
            arm.agree(self.num_tokens)
        self._prepare(0)
        outputs: dict[str, mx.array] = {}
        memory, traffic = {}, {}
        begin = time.perf_counter()
        for arm in self.arms:
            self.comm.barrier()
            mark = MemoryMark.set()
            arm.forget_traffic()
            self._run_into(outputs, arm)
            memory[arm.label] = arm.weight_bytes + mark.peak
            traffic[arm.label] = arm.traffic(self.x[arm.label])
        self._check_same(outputs)
        first = time.perf_counter() - begin
        runs = {arm.label: partial(self._run, arm) for arm in self.arms}
        count = self._warm_up(runs, first)
        self.distinct = {arm.label: [] for arm in self.arms}
        samples = slowest(sample(runs, self._prepare, count, self.comm), self.comm)
        stages = self._stages(max(1, count // 4))
        totals = gather_objects(
            self.comm,
            {
                label: [memory[label], traffic[label].collectives,
                        traffic[label].num_bytes]
                for label in samples
            },
        )  # fmt: skip
        found = []
        for arm in self.arms:
            label = arm.label
            most = [max(rank[label][i] for rank in totals) for i in range(3)]
            found.append(
                self._record(
                    arm, samples, most[0], CallTraffic(*most[1:]), stages[label]
                )
            )
        return found

    def _record(
        self,
        arm: LayerArm,
        samples: dict[str, Any],
        memory_bytes: int,
        traffic: CallTraffic,
        stages: dict[str, float],
    ) -> dict[str, Any]:
        own = samples[arm.label]
        total = sum(stages.values())
        exchanged = sum(stages[stage] for stage in COMMUNICATION_STAGES)
        return {
            "level": "layer",
            "arm": arm.name,
            "shape": self.plan.shape.to_json(),
            "ranks": self.comm.size,
            "transport": self.comm.transport,
            "tokens": self.num_tokens,
            "context": 0,
            "batch": 1,
            "phase": "layer",
            "runner": arm.runner,
            "skew": self.plan.skew,
            "seconds_median": own.median,
            "seconds_mean": own.mean,
            "seconds_quartiles": list(own.quartiles),
            "samples": len(own.seconds),
            "seconds": list(own.seconds),
            "ratio_to_tp": (
                ratio(own, samples["tp"]).median if "tp" in samples else None
            ),
            "collectives": traffic.collectives,
            "bytes": traffic.num_bytes,
            "distinct_busiest": float(np.mean(self.distinct[arm.label])),
            "communication_share": exchanged / total if total else 0.0,
            "memory_bytes": memory_bytes,
            "stages": stages,
        }

    def _warm_up(
        self, runs: Mapping[str, Callable[[], None]], first_round: float
    ) -> int:
        """Runs that are not counted; how many samples are affordable.

        Args:
            first_round: seconds of the round that was checked; it warms up too.
        """
        round_seconds = spent = max(gather_objects(self.comm, first_round))
        for _ in range(MOST_WARMUPS):
            if spent > self.plan.budget.seconds * WARMUP_SHARE:
                break
            once = sample(runs, self._prepare, 1, self.comm)
            mine = sum(seconds[0] for seconds in once.values())
            round_seconds = max(gather_objects(self.comm, mine))
            spent += round_seconds
        return agreed_count(round_seconds, self.plan.budget, self.comm)

    def _prepare(self, index: int) -> None:
        """The tokens of a sample, the same for all arms."""
        ids = self.source.expert_ids(self.num_tokens, index)
        tokens = self.source.tokens(ids, index)
        self.x = {}
        for arm in self.arms:
            self.x[arm.label] = tokens[arm.part(self.num_tokens)]
            busiest = distinct_on_busiest(arm.name, ids, self.placement)
            self.distinct[arm.label].append(busiest)
        # sync: inputs are made before anything is timed.
        mx.eval(tokens, list(self.x.values()))

    def _run(self, arm: LayerArm) -> None:
        if not arm.is_idle:
            arm.run(self.x[arm.label])

    def _run_into(self, outputs: dict[str, mx.array], arm: LayerArm) -> None:
        if not arm.is_idle:
            outputs[arm.label] = arm.run(self.x[arm.label])

    def _stages(self, count: int) -> dict[str, dict[str, float]]:
        """Mean seconds of each stage, of the rank that spends most in its experts.

        Of the others, waiting for it is all that differs.
        """
        seconds = {arm.label: dict.fromkeys(STAGES, 0.0) for arm in self.arms}
        for index in range(count):
            self._prepare(index)
            for arm in self.arms:
                self.comm.barrier()
                for stage, spent in arm.staged(self.x[arm.label]).items():
                    seconds[arm.label][stage] += spent / count
        ranks = gather_objects(self.comm, seconds)
        return {
            label: max((rank[label] for rank in ranks), key=lambda s: s["experts"])
            for label in seconds
        }

    def _check_same(self, outputs: dict[str, mx.array]) -> None:
        """Every arm's output is the first one's, within rounding.

        Raises:
            RuntimeError: on every rank, if it is not so on any.
        """
        problem = ""
        whole = [arm for arm in self.arms if arm.label in outputs]
        for arm in whole[1:]:
            error = self._difference(whole[0], arm, outputs)
            if error > TOLERANCES[self.plan.weights.mlx_dtype]:
                problem = (
                    f"arm {arm.label} differs from arm {whole[0].label} by {error:.1e} "
                    f"of the largest output at {self.num_tokens} tokens"
                )
        found = [p for p in gather_objects(self.comm, problem) if p]
        if found:
            raise RuntimeError(f"The arms do not compute the same layer: {found[0]}.")

    def _difference(
        self, one: LayerArm, other: LayerArm, outputs: dict[str, mx.array]
    ) -> float:
        """The largest difference of the tokens that this rank has in both arms."""
        a, b = outputs[one.label], outputs[other.label]
        parts = [arm.part(self.num_tokens) for arm in (one, other)]
        if parts[0] != parts[1]:
            # One of them is whole; of that one, the part that the other has.
            a, b = (y if len(y) < self.num_tokens else y[p] for y, p in
                    ((a, parts[1]), (b, parts[0])))  # fmt: skip
        return difference(a, b)


def difference(a: Float[mx.array, "T D"], b: Float[mx.array, "T D"]) -> float:
    """The largest difference, of the largest number; 0 for no tokens."""
    if not a.size:
        return 0.0
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    # sync: of one sample, before anything is timed.
    error = mx.abs(a - b).max() / mx.maximum(mx.abs(a).max(), 1e-30)
    return float(to_host(error))
