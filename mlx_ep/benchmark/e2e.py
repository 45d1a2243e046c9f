"""Level ``e2e``: a whole model, every arm: prompt and decode tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from mlx_ep.benchmark.arms import token_counts
from mlx_ep.benchmark.models import ModelArm
from mlx_ep.benchmark.passes import (
    check_same_logits,
    count_collectives,
    staged_pass,
)
from mlx_ep.benchmark.samples import Budget, Samples, agreed_count, ratio
from mlx_ep.comm import GroupComm, gather_objects
from mlx_ep.cost.shape import ModelShape
from mlx_ep.data_parallel import LockStep
from mlx_ep.measure.machine import MemoryMark
from mlx_ep.metrics import COMMUNICATION_STAGES, STAGES


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """What is measured.

    Attributes:
        batches: sequences at once, of all ranks together.
        prompt_tokens: of each sequence.
        new_tokens: that are generated of each, 2 or more.
        vocabulary: token ids are below it.
        moe_layers: MoE layers of the model.
        prefill_step: prompt tokens of a sequence that are processed at a time.
    """

    shape: ModelShape
    batches: Sequence[int]
    prompt_tokens: int
    new_tokens: int
    vocabulary: int
    moe_layers: int
    prefill_step: int = 2048
    seed: int = 0
    budget: Budget = field(default_factory=Budget)


def measure_model(
    plan: ModelRun,
    arms: Sequence[ModelArm],
    comm: GroupComm,
    report: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """The records of all batches, two an arm. Every rank must call it.

    Raises:
        RuntimeError: on every rank: two arms do not give the same logits.
    """
    check_same_logits(arms, plan.vocabulary, plan.seed, comm)
    records = []
    for batch in plan.batches:
        found = BatchPoint(plan, arms, comm, batch).records()
        report(found)
        records += found
    return records


class BatchPoint:
    """All arms at one number of sequences."""

    def __init__(
        self, plan: ModelRun, arms: Sequence[ModelArm], comm: GroupComm, batch: int
    ) -> None:
        self.plan, self.arms, self.comm, self.batch = plan, arms, comm, batch

    def records(self) -> list[dict[str, Any]]:
        """Warm up, sample in turn, then look inside one step of each phase."""
        memory = {}
        begin = time.perf_counter()
        for arm in self.arms:
            self.comm.barrier()
            mark = MemoryMark.set()
            self._run(arm, 0)
            memory[arm.name] = arm.held_bytes + mark.peak
        count = agreed_count(time.perf_counter() - begin, self.plan.budget, self.comm)
        mine: dict[str, list[tuple[float, float]]] = {a.name: [] for a in self.arms}
        for index in range(count):
            for arm in self.arms:
                self.comm.barrier()
                mine[arm.name].append(self._run(arm, index))
        ranks = gather_objects(self.comm, [mine, memory])
        inside = {arm.name: self._inside(arm) for arm in self.arms}
        found = []
        for index, phase in enumerate(("prefill", "decode")):
            samples = {
                name: Samples(
                    tuple(
                        max(rank[0][name][i][index] for rank in ranks)
                        for i in range(count)
                    )
                )
                for name in mine
            }
            for arm in self.arms:
                most = max(rank[1][arm.name] for rank in ranks)
                details = inside[arm.name][phase]
                found.append(self._record(arm, phase, samples, most, details))
        return found

    def _record(
        self,
        arm: ModelArm,
        phase: str,
        samples: dict[str, Samples],
        memory_bytes: int,
        inside: dict[str, Any],
    ) -> dict[str, Any]:
        plan, own = self.plan, samples[arm.name]
        is_prefill = phase == "prefill"
        tokens = self.batch * (plan.prompt_tokens if is_prefill else 1)
        stages = inside["stages"]
        total = sum(stages.values())
        exchanged = sum(stages[stage] for stage in COMMUNICATION_STAGES)
        middle = plan.prompt_tokens + plan.new_tokens // 2
        return {
            "level": "e2e",
            "arm": arm.name,
            "shape": plan.shape.to_json(),
            "ranks": self.comm.size,
            "transport": self.comm.transport,
            "tokens": tokens,
            "context": plan.prompt_tokens if is_prefill else middle,
            "batch": self.batch,
            "phase": phase,
            "runner": arm.runner,
            "seconds_median": own.median,
            "seconds_mean": own.mean,
            "seconds_quartiles": list(own.quartiles),
            "samples": len(own.seconds),
            "seconds": list(own.seconds),
            "tokens_per_second": tokens / own.median,
            "ratio_to_tp": (
                ratio(own, samples["tp"]).median if "tp" in samples else None
            ),
            "collectives": inside["collectives"],
            "bytes": inside["bytes"],
            "distinct_busiest": None,
            "communication_share": exchanged / total if total else None,
            "memory_bytes": memory_bytes,
            "stages": stages,
        }

    def _prompts(self, arm: ModelArm, sample: int) -> list[list[int]]:
        """This rank's sequences: the same ones in all arms, random ids."""
        random = np.random.default_rng([self.plan.seed, self.batch, sample])
        size = (self.batch, self.plan.prompt_tokens)
        everyone = random.integers(1, self.plan.vocabulary, size).tolist()  # on host
        if not arm.is_sharded:
            return everyone
        counts = token_counts(self.batch, self.comm.size)
        start = sum(counts[: self.comm.rank])
        return everyone[start : start + counts[self.comm.rank]]

    def _run(self, arm: ModelArm, sample: int) -> tuple[float, float]:
        """Seconds until every sequence has a token, and of each step after that."""
        if arm.is_idle:
            return 0.0, 0.0
        arm.enter()
        prompts = self._prompts(arm, sample)
        model: Any = arm.model
        if arm.is_sharded:
            model = LockStep(model, arm.comm, tqdm(disable=True))
        first, last = 0.0, 0.0
        start = time.perf_counter()
        if prompts:
            first, last = self._generate(model, prompts)
        if arm.is_sharded:
            model.serve()
        first -= start if first else 0.0
        last -= start if last else 0.0
        return first, (last - first) / (self.plan.new_tokens - 1)

    def _generate(self, model: Any, prompts: list[list[int]]) -> tuple[float, float]:
        """When every sequence had its first token, and its last."""
        generator = BatchGenerator(
            model,
            completion_batch_size=len(prompts),
            prefill_batch_size=len(prompts),
            prefill_step_size=self.plan.prefill_step,
        )
        uids = generator.insert(prompts, [self.plan.new_tokens] * len(prompts))
        waiting, running = set(uids), len(uids)
        first = 0.0
        while running:
            _, responses = generator.next()
            waiting -= {response.uid for response in responses}
            running -= sum(r.finish_reason is not None for r in responses)
            if not waiting and not first:
                first = time.perf_counter()
        last = time.perf_counter()
        # sync: mlx-lm has begun the step after the last token, whose collectives run on
        # its own stream with tp, and would meet those of the next arm.
        mx.synchronize(generator.stream)
        mx.synchronize(mx.default_stream(mx.cpu))
        generator.close()
        return first, last

    def _inside(self, arm: ModelArm) -> dict[str, dict[str, Any]]:
        """Collectives per MoE layer and its stages, in one pass of each phase."""
        found: dict[str, dict[str, Any]] = {}
        if not arm.is_idle:
            arm.enter()
        prompts = [] if arm.is_idle else self._prompts(arm, 0)
        cache = None if arm.is_idle else make_prompt_cache(arm.model)
        for phase in ("prefill", "decode"):
            length = self.plan.prompt_tokens if phase == "prefill" else 1
            tokens = mx.array([prompt[:length] for prompt in prompts], mx.int32)
            tokens = tokens.reshape(len(prompts), length)
            with count_collectives() as counted:
                stages = staged_pass(arm, tokens, cache)
            mine = [stages, *counted]
            ranks = gather_objects(self.comm, mine)
            busiest = max((rank[0] for rank in ranks), key=lambda s: s["experts"])
            layers = self.plan.moe_layers
            found[phase] = {
                "stages": {stage: busiest[stage] / layers for stage in STAGES},
                "collectives": max(rank[1] for rank in ranks) / layers,
                "bytes": max(rank[2] for rank in ranks) // layers,
            }
        return found
