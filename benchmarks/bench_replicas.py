"""Is a decode step with copies of experts as fast as tensor parallelism?

A random 4-bit Qwen3-MoE of about 400 MB on 2 ranks over MPI, each on a core of its own:
mlx-lm's ``shard()`` against expert parallelism with attention replicated and with no
copies, copies of half of the experts, and all experts on both ranks. All arms run MLX's
own gather_qmm. One step is B tokens, one of each of B sequences, behind a prompt. What
counts is the rank that is done last; arms are timed in turn, and ratios are of
neighbouring samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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
PROMPT = 16
SHARES = {"no copies": 0.0, "copies of 50%": 0.5, "all on both": 1.0}
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
    for name, share in SHARES.items():
        own = (share * sizes.num_experts / group.size() + 0.5) * sizes.expert_bytes
        config = EPConfig(
            runner="gather",
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
        # One round is enough to warm up: nothing is compiled on a CPU.
        timed = interleaved(arms, samples, warmup=1, barrier=barrier_of(group))
        results[batch] = {name: found.seconds for name, found in timed.items()}
    return results


def _step(model: Any, prompt: mx.array, steps: list[mx.array]) -> Any:
    """A function that runs one decode step; every call has other tokens."""
    cache = make_prompt_cache(model)
    mx.eval(model(prompt, cache=cache))
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
        for name in SHARES
    }
    half = means["copies of 50%"]
    targets = [Target("copies of 50% over tp, geometric mean", half, LIMIT)]
    text = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return finish(args, records, targets, f"decode step over tp (geomean): {text}")


if __name__ == "__main__":
    sys.exit(main())
