"""Is expert parallelism as fast as tensor parallelism, one MoE layer at a time?

Two MPI ranks, one core each: arms `tp` (mlx-lm's block and sharding) and
`ep-replicated` with the same kernels (runner gather) and with the package's own choice
(runner auto), interleaved, at the shapes qwen3-30b-a3b and kimi-k2 with D and F
quartered, 4-bit weights, uniform routing, T = 1 .. 256 (`mlx_ep.benchmark.layer`).

    python -m benchmarks.bench_ep_vs_tp [--quick | --full] [--check] [--write FILE.md]

`--full` adds T = 1024, half of a full run's time. There, MLX's kernels take 4 times
what they take at T = 256, for tp and ep alike, and the package's choice is further
ahead: what a target says is decided at T = 256.

Targets, for each shape, geometric means of EP's time over TP's: with the same kernels
at most 1.15 for T <= 64 (a uniform routing alone makes 1.13, as the busier of 2 ranks
has more than half of the pairs) and 1.05 for T >= 256; with the package's choice at
most 0.25 for T >= 256.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.harness import Target, arguments, finish, heading, run_pinned

# Shape and what D and F are divided by.
SHAPES = (("qwen3-30b-a3b", 1), ("kimi-k2", 4))
QUICK_SHAPES = (("qwen3-30b-a3b", 2), ("kimi-k2", 8))
TOKENS = (1, 4, 16, 64, 256)
FULL_TOKENS = (*TOKENS, 1024)
QUICK_TOKENS = (1, 16, 64, 256)
ARMS = ("tp", "ep-replicated")
RUNNERS = ("gather", "auto")
# Runner, name, whether a number of tokens counts, most of EP / TP.
GOALS = (
    ("gather", "same kernels, T <= 64", lambda tokens: tokens <= 64, 1.15),
    ("gather", "same kernels, T >= 256", lambda tokens: tokens >= 256, 1.05),
    ("auto", "own choice of kernels, T >= 256", lambda tokens: tokens >= 256, 0.25),
)


def measure(
    group: mx.distributed.Group,
    shape_name: str,
    scale: int,
    tokens: Sequence[int],
    budget: float,
    samples: int,
) -> list[dict[str, Any]]:
    """On a rank: the records of one shape."""
    from mlx_ep.benchmark.layer import LayerRun, check_layer, measure_layer
    from mlx_ep.benchmark.samples import Budget
    from mlx_ep.benchmark.shapes import default_dtype, make_shape, make_weights
    from mlx_ep.comm import GroupComm

    weights = make_weights("affine", 4, 64, default_dtype())
    comm = GroupComm(group, transport="mpi")
    plan = LayerRun(
        shape=make_shape(shape_name, scale, weights),
        weights=weights,
        arms=ARMS,
        runners=RUNNERS,
        tokens=tokens,
        budget=Budget(budget, samples),
    )
    check_layer(plan, comm)
    return measure_layer(plan, comm, lambda records: None)


def targets_of(records: Sequence[dict[str, Any]]) -> list[Target]:
    """One per shape and goal."""
    from mlx_ep.benchmark.samples import geometric_mean

    found = []
    for shape in dict.fromkeys(r["shape"]["name"] for r in records):
        for runner, name, counts, most in GOALS:
            ratios = [
                r["ratio_to_tp"]
                for r in records
                if r["arm"] == "ep-replicated"
                and r["runner"] == runner
                and r["shape"]["name"] == shape
                and counts(r["tokens"])
            ]
            mean = geometric_mean(ratios)
            found.append(Target(f"{shape}, {name}, EP / TP", mean, most))
    return found


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = arguments(__doc__, samples=100)
    parser.add_argument(
        "--full", action="store_true", help="also T = 1024, and 2.5 times the budget"
    )
    parser.add_argument(
        "--budget", type=float, default=8.0, help="seconds a point (%(default)s)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="also to a file")
    return parser.parse_args()


def main() -> int:
    args = parse()
    from mlx_ep.benchmark.report import layer_table, stage_table

    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    say(heading("Expert against tensor parallelism, one MoE layer"))
    say("2 ranks over MPI, rank r pinned to core r. Not Apple hardware.\n")
    shapes, tokens, budget = SHAPES, TOKENS, args.budget
    if args.full:
        tokens, budget = FULL_TOKENS, 2.5 * args.budget
    if args.quick:
        shapes, tokens, budget = QUICK_SHAPES, QUICK_TOKENS, args.budget / 10
    records: list[dict[str, Any]] = []
    for name, scale in shapes:
        found, _ = run_pinned(
            2,
            measure,
            name,
            scale,
            tokens,
            budget,
            args.samples,
            transport="mpi",
            timeout=1800,
        )
        shape = found[0]["shape"]
        say(
            f"## {shape['name']}: E={shape['num_experts']}, D={shape['width']}, "
            f"F={shape['expert_width']}, K={shape['top_k']}, {shape['packing']}"
            + (f" (D and F are 1/{scale} of the model's)" if scale > 1 else "")
            + f"\n\n{layer_table(found, RUNNERS)}\n\n{stage_table(found, RUNNERS)}\n"
        )
        records += found
    targets = targets_of(records)
    worst = max(targets, key=lambda target: target.value / target.limit)
    figure = (
        f"EP / TP, {len(targets)} geometric means, nearest to its limit: "
        f"{worst.name}: {worst.value:.3f} (limit {worst.limit})"
    )
    if args.write is not None:
        ending = [f"- {target}" for target in targets]
        args.write.write_text("\n".join([*lines, *ending, "", figure]) + "\n")
    return finish(args, records, targets, figure)


if __name__ == "__main__":
    sys.exit(main())
