"""Is a decode step with copies of experts as fast as tensor parallelism?

A random 4-bit Qwen3-MoE of about 400 MB on 2 ranks over MPI, each on a core of its own:
mlx-lm's ``shard()`` against expert parallelism with attention split as ``shard()``
splits it and no copies, copies of half of the experts, and all experts on both ranks;
and copies of half with attention whole on each rank. All arms run MLX's own gather_qmm.
One step is B tokens, one of each of B sequences, behind a prompt. What counts is the
rank that is done last; arms are timed in turn, ratios are of neighbouring samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

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
from mlx_ep.loading import expert_sizes
from mlx_ep.metrics import markdown_table

CONFIG = Path(__file__).parent / "configs" / "qwen3-moe-400mb"
PROMPT = 8
# Copies as a share of the experts, and how the dense part runs. Split it is the same
# layers as in tp, and only the experts differ. Whole on both ranks it takes half the
# collectives of tensor parallelism and twice its work: a gain where a collective is a
# hop between machines, not where it is a copy in memory.
ARMS: dict[str, tuple[float, Literal["replicated", "tensor"]]] = {
    "no copies": (0.0, "tensor"),
    "copies of 50%": (0.5, "tensor"),
    "all on both": (1.0, "tensor"),
    "copies of 50%, attention whole": (0.5, "replicated"),
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
    for name, (share, attention) in ARMS.items():
        own = (share * sizes.num_experts / group.size() + 0.5) * sizes.expert_bytes
        config = EPConfig(
            runner="gather",
            attention=attention,
            warmup=False,
            replica_memory=f"{own / 1e9:.9f}" if share else "0",
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
    targets = [
        Target(f"{name} over tp, geometric mean", mean, LIMIT)
        for name, mean in means.items()
        if name.startswith("copies of 50%")
    ]
    text = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return finish(args, records, targets, f"decode step over tp (geomean): {text}")


if __name__ == "__main__":
    sys.exit(main())
