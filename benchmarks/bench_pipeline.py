"""Experts, layers or both over four ranks: bytes held, tokens a second, and the flow.

A random 4-bit Qwen3-MoE of about 120 MB over MPI. First on 4 ranks: its experts spread
over all (EP 4), its layers (PP 4), and two stages of two ranks (2 x 2). Each generates
the same tokens from the same prompt, arms in turn. On a machine with fewer cores than
ranks the ranks share them, and seconds say what the sum of the work is, not what four
machines would take.

Then on 2 ranks, each on a core of its own: a prompt in chunks through 2 stages, as they
are queued, against the same chunks of which each waits (at a barrier) until the last
stage has had the one before. Where S stages are busy at once, C chunks take C + S - 1
times a stage's work instead of C * S.

    python -m benchmarks.bench_pipeline [--quick] [--check] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
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
from mlx_ep.api import load
from mlx_ep.config import EPConfig
from mlx_ep.metrics import markdown_table

CONFIG = Path(__file__).parent / "configs" / "qwen3-moe-100mb"
ARMS = {"EP 4": 1, "2 x 2": 2, "PP 4": 4}  # stages
CHUNK, TOKENS = 16, 16
FLOW_CHUNK = 16
NUM_STAGES = 2
FLOW_LIMIT = 0.8  # of the time of chunks that wait for each other


def _load(group: mx.distributed.Group, stages: int, runner: str) -> Any:
    config = EPConfig(strategy="replicated", runner=runner, warmup=False, pp=stages)
    model, _ = load(str(CONFIG), group, config, dummy_weights=True)
    return model


def compare(
    group: mx.distributed.Group, samples: int, length: int
) -> dict[str, tuple[list[int], int, tuple[float, ...], tuple[float, ...]]]:
    """By arm: tokens, bytes this rank holds, seconds of prompts and of tokens.

    Args:
        length: tokens of the prompt.
    """
    prompt = mx.array(np.random.default_rng(0).integers(0, 8192, (1, length)))
    models = {name: _load(group, stages, "gather") for name, stages in ARMS.items()}
    caches: dict[str, Any] = {}
    tokens: dict[str, list[int]] = {}

    def read(name: str) -> Callable[[], None]:
        def prefill() -> None:
            caches[name] = make_prompt_cache(models[name])
            logits = chunks(models[name], prompt, CHUNK, caches[name])
            tokens[name] = [int(logits[0, -1].argmax().item())]

        return prefill

    def write(name: str) -> Callable[[], None]:
        def decode() -> None:
            for _ in range(TOKENS):
                logits = models[name](mx.array([tokens[name][-1:]]), caches[name])
                tokens[name].append(int(logits[0, -1].argmax().item()))

        return decode

    barrier = barrier_of(group)
    warmup = int(samples > 1)
    reads = interleaved({n: read(n) for n in ARMS}, samples, warmup, barrier=barrier)
    writes = interleaved({n: write(n) for n in ARMS}, samples, 0, barrier=barrier)
    held = {
        name: model.expert_parallel.reports[group.rank()].held_bytes
        for name, model in models.items()
    }
    return {
        name: (tokens[name], held[name], reads[name].seconds, writes[name].seconds)
        for name in ARMS
    }


def chunks(
    model: Any,
    prompt: mx.array,
    size: int,
    cache: Any,
    between: Callable[[], None] = lambda: None,
) -> mx.array:
    """A prompt's logits, chunk by chunk as mlx-lm's generate_step reads it.

    Args:
        between: called when this rank has computed a chunk.
    """
    logits = prompt
    for start in range(0, prompt.shape[1], size):
        logits = model(prompt[:, start : start + size], cache=cache)
        mx.eval([layer.state for layer in cache])
        between()
    mx.eval(logits)
    return logits


def flow(
    group: mx.distributed.Group, samples: int, length: int
) -> dict[str, tuple[float, ...]]:
    """Seconds of a prompt of `length` tokens in chunks through two stages."""
    prompt = mx.array(np.random.default_rng(0).integers(0, 8192, (1, length)))
    model = _load(group, NUM_STAGES, "blas")
    barrier = barrier_of(group)

    def run(between: Callable[[], None]) -> Callable[[], None]:
        return lambda: mx.eval(
            chunks(model, prompt, FLOW_CHUNK, make_prompt_cache(model), between)
        )

    arms = {"queued": run(lambda: None), "one by one": run(barrier)}
    found = interleaved(arms, samples, 1, barrier=barrier)
    return {name: arm.seconds for name, arm in found.items()}


def main() -> int:
    assert __doc__ is not None
    parser = arguments(__doc__, samples=3)
    args: argparse.Namespace = parser.parse_args()
    samples = 1 if args.quick else args.samples
    length, flow_length = 32 if args.quick else 64, 128
    print(heading("Experts, layers, or both over four ranks"))
    ranks = run_pinned(4, compare, samples, length, transport="mpi", timeout=500)
    records: list[dict[str, Any]] = []
    for name in ARMS:
        held = [rank[name][1] / 1e6 for rank in ranks]
        reads = slowest([Samples(rank[name][2]) for rank in ranks]).median
        writes = slowest([Samples(rank[name][3]) for rank in ranks]).median
        records.append(
            {
                "arm": name,
                "tokens": ranks[0][name][0],
                "held_mb": held,
                "prompt_tokens_per_s": length / reads,
                "tokens_per_s": TOKENS / writes,
            }
        )
    rows = [
        [
            r["arm"],
            " ".join(f"{held:.1f}" for held in r["held_mb"]),
            f"{r['prompt_tokens_per_s']:.1f}",
            f"{r['tokens_per_s']:.2f}",
        ]
        for r in records
    ]
    headings = ["arm", "MB held by rank", "prompt tokens/s", "tokens/s"]
    print(markdown_table(headings, rows), "\n")
    flows = run_pinned(
        NUM_STAGES, flow, samples, flow_length, transport="mpi", timeout=300
    )
    arms = {name: slowest([Samples(rank[name]) for rank in flows]) for name in flows[0]}
    queued = ratio(arms["queued"], arms["one by one"]).median
    count = flow_length // FLOW_CHUNK
    least = (count + NUM_STAGES - 1) / (count * NUM_STAGES)
    print(
        f"{count} chunks of {FLOW_CHUNK} tokens through {NUM_STAGES} stages: "
        f"{arms['queued'].median:.2f} s, one by one {arms['one by one'].median:.2f} s; "
        f"ratio {queued:.3f}, of even stages {least:.3f} (computed)\n"
    )
    records.append({"arm": "flow", "queued_over_one_by_one": queued, "least": least})
    first = records[0]
    different = sum(rank[name][0] != first["tokens"] for rank in ranks for name in ARMS)
    targets = [
        Target("ranks and arms whose tokens differ", different, 0),
        Target("chunks as they are queued over one by one", queued, FLOW_LIMIT),
        *(
            Target(
                f"{r['arm']}: most MB held over EP 4's",
                max(r["held_mb"]) / max(first["held_mb"]),
                1.0,
            )
            for r in records[1:3]
        ),
    ]
    return finish(
        args,
        records,
        targets,
        f"queued chunks over one by one {queued:.3f}; tokens differ in {different}",
    )


if __name__ == "__main__":
    sys.exit(main())
