"""Is a decode step with copies of experts as fast as tensor parallelism?

A random 4-bit Qwen3-MoE of about 400 MB on 2 ranks over MPI, each on a core of its own:
mlx-lm's ``shard()`` against expert parallelism with attention split as ``shard()``
splits it and no copies, copies of half of the experts, and all experts on both ranks;
and copies of half with the lm_head whole on each rank, as in tp, or attention. All arms
run MLX's own gather_qmm. The target is for copies of half with attention split.
One step is B tokens, one of each of B sequences, behind a prompt. What counts is the
rank that is done last; arms are timed in turn, ratios are of neighbouring samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.harness import (
    Samples,
    Target,
    arguments,
    barrier_of,
    finish,
    heading,
    interleaved,
    ratio,
    run_pinned,
    slowest,
)
from mlx_ep.api import parallelize
from mlx_ep.benchmark.models import ModelSource
from mlx_ep.config import EPConfig
from mlx_ep.config.record import Attention
from mlx_ep.loading import expert_sizes
from mlx_ep.metrics import markdown_table
from mlx_ep.types import LMHead

CONFIG = Path(__file__).parent / "configs" / "qwen3-moe-400mb"
PROMPT = 8


class Arm(NamedTuple):
    """What runs beside tensor parallelism.

    Attributes:
        copies: as a share of the experts.
        attention, lm_head: of `EPConfig`. The default splits the lm_head on a CPU,
            which mlx-lm's shard() of this model does not.
    """

    copies: float
    attention: Attention = "tensor"
    lm_head: LMHead = "auto"


# Attention whole on both ranks takes half the collectives of tensor parallelism and
# twice its work: a gain where a collective is a hop between machines, not where it is
# a copy in memory. So that arm has no target, nor has the one that differs from tp in
# the experts alone.
TARGET_ARM = "copies of 50%"
ARMS = {
    "no copies": Arm(0.0),
    TARGET_ARM: Arm(0.5),
    "all on both": Arm(1.0),
    "copies of 50%, lm_head whole": Arm(0.5, lm_head="whole"),
    "copies of 50%, attention whole": Arm(0.5, "replicated"),
}
FEW_SAMPLES = 64  # from so many tokens on a step takes seconds: half of the samples
LIMIT = 1.0


def measure(
    group: mx.distributed.Group, batches: list[int], samples: int
) -> dict[int, dict[str, tuple[float, ...]]]:
    """Seconds of each arm's steps on this rank, by batch."""
    source = ModelSource(str(CONFIG), None, True, "gather", None)
    weights = source.whole()
    whole, _ = weights.build(None)

    def like() -> Any:
        model = source.whole().outline()
        model.update(whole.parameters())
        return model

    sizes = expert_sizes(whole)
    models = {"tp": like()}
    models["tp"].shard(group)
    for name, arm in ARMS.items():
        own = (arm.copies * sizes.num_experts / group.size() + 0.5) * sizes.expert_bytes
        config = EPConfig(
            runner="gather",
            attention=arm.attention,
            lm_head=arm.lm_head,
            warmup=False,
            replica_memory=f"{own / 1e9:.9f}" if arm.copies else "0",
        )
        models[name] = parallelize(like(), group, config)
    for model in models.values():
        # sync: nothing is read while steps are timed.
        mx.eval(model.parameters())
    results = {}
    random = np.random.default_rng(0)
    for batch in batches:
        prompt = mx.array(random.integers(0, 8192, (batch, PROMPT)))
        steps = [mx.array(random.integers(0, 8192, (batch, 1))) for _ in range(64)]
        arms = {name: _step(model, prompt, steps) for name, model in models.items()}
        count = samples if batch < FEW_SAMPLES else -(-samples // 2)
        # One round is enough to warm up: nothing is compiled on a CPU.
        timed = interleaved(arms, count, warmup=1, barrier=barrier_of(group))
        results[batch] = {name: found.seconds for name, found in timed.items()}
    return results


def _step(model: Any, prompt: mx.array, steps: list[mx.array]) -> Any:
    """A function that runs one decode step; every call has other tokens."""
    cache = make_prompt_cache(model)
    # One sequence's prompt stands for all: 64 prompts take longer than the steps.
    mx.eval(model(prompt[:1], cache=cache))
    for layer in cache:
        layer.state = [
            mx.repeat(part, len(prompt), axis=0) if isinstance(part, mx.array) else part
            for part in layer.state
        ]
    state = {"number": 0}

    def step() -> None:
        ids = steps[state["number"] % len(steps)]
        state["number"] += 1
        mx.eval(model(ids, cache=cache))

    return step


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    batches = [1, 8] if args.quick else [1, 4, 16, 64]
    ranks = run_pinned(2, measure, batches, args.samples, transport="mpi", timeout=1500)
    records = []
    for batch in batches:
        arms = {
            name: slowest([Samples(rank[batch][name]) for rank in ranks])
            for name in ranks[0][batch]
        }
        for name, found in arms.items():
            records.append(
                {
                    "tokens": batch,
                    "arm": name,
                    "ms": found.median * 1e3,
                    "over_tp": ratio(found, arms["tp"]).median,
                }
            )
    return records


def main() -> int:
    assert __doc__ is not None
    args = arguments(__doc__, samples=6).parse_args()
    print(heading("Decode with copies of experts against tensor parallelism"))
    records = run(args)
    rows = [
        [r["tokens"], r["arm"], f"{r['ms']:.2f}", f"{r['over_tp']:.3f}"]
        for r in records
    ]
    print(markdown_table(["T", "arm", "ms a step", "over tp"], rows), "\n")
    means = {
        name: float(
            np.exp(np.mean([np.log(r["over_tp"]) for r in records if r["arm"] == name]))
        )
        for name in ARMS
    }
    name = f"{TARGET_ARM} over tp, geometric mean"
    targets = [Target(name, means[TARGET_ARM], LIMIT)]
    text = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return finish(args, records, targets, f"decode step over tp (geomean): {text}")


if __name__ == "__main__":
    sys.exit(main())
