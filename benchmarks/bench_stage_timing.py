"""What does timing every stage of a MoE layer cost?

Two MPI ranks, one core each, one expert-parallel layer (`ep-replicated`, runner gather)
at the shapes of `bench_ep_vs_tp`: the same tokens with and without
`group.timings.measure()`, interleaved, and whether both give the same bits.

    python -m benchmarks.bench_stage_timing [--quick] [--check] [--json FILE]

Target: geometric mean over T of the time with over the time without at most 1.02, for
each shape.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from benchmarks.bench_ep_vs_tp import QUICK_SHAPES, SHAPES
from benchmarks.harness import (
    Samples,
    Target,
    arguments,
    finish,
    heading,
    interleaved,
    ratio,
    run_pinned,
    slowest,
)
from mlx_ep.metrics import markdown_table

TOKENS = (1, 4, 16, 64, 256)
QUICK_TOKENS = (1, 16)
MOST_RATIO = 1.02
SECONDS = 15.0  # for the samples of one number of tokens


def measure(
    group: mx.distributed.Group,
    shape_name: str,
    scale: int,
    tokens: Sequence[int],
    samples: int,
) -> dict[int, dict[str, Any]]:
    """On a rank: samples of both sides, the stages, and whether the bits agree."""
    from mlx_ep.benchmark.arms import build_arms
    from mlx_ep.benchmark.samples import Budget, agreed_count
    from mlx_ep.benchmark.shapes import default_dtype, make_shape, make_weights
    from mlx_ep.benchmark.tokens import TokenSource
    from mlx_ep.comm import GroupComm

    weights = make_weights("affine", 4, 64, default_dtype())
    shape = make_shape(shape_name, scale, weights)
    comm = GroupComm(group, transport="mpi")
    source = TokenSource(shape, weights.mlx_dtype)
    names, runners = ["ep-replicated"], ["gather"]
    (arm,) = build_arms(names, runners, shape, weights, source.router, comm)
    assert arm.group is not None
    found = {}
    for num_tokens in tokens:
        x = source.tokens(source.expert_ids(num_tokens, 0), 0)
        mx.eval(x)
        off = arm.run(x)
        with arm.group.timings.measure() as timings:
            timings.start()
            on = arm.run(x)
        stages = dict(timings.seconds)
        arms = {"off": partial(arm.run, x), "on": partial(arm.staged, x)}
        once = interleaved(arms, 1, warmup=0, barrier=comm.barrier)
        round_seconds = sum(s.median for s in once.values())
        count = agreed_count(round_seconds, Budget(SECONDS, samples), comm)
        found[num_tokens] = {
            "same": mx.array_equal(off, on).item(),
            "stages": stages,
            "samples": interleaved(arms, count, warmup=1, barrier=comm.barrier),
        }
    return found


def main() -> int:
    assert __doc__ is not None
    args = arguments(__doc__, samples=200).parse_args()
    print(heading("Timing the stages of a layer"))
    records: list[dict[str, Any]] = []
    targets, rows = [], []
    tokens = QUICK_TOKENS if args.quick else TOKENS
    for name, scale in QUICK_SHAPES if args.quick else SHAPES:
        ranks = run_pinned(
            2, measure, name, scale, tokens, args.samples, transport="mpi", timeout=1200
        )
        ratios = []
        for num_tokens in tokens:
            points = [rank[num_tokens] for rank in ranks]
            off, on = (
                slowest([p["samples"][s] for p in points]) for s in ("off", "on")
            )
            more: Samples = ratio(on, off)
            same = all(point["same"] for point in points)
            ratios.append(more.median)
            low, high = more.quartiles
            rows.append(
                [
                    f"{name}/{scale}",
                    num_tokens,
                    off.text("ms"),
                    on.text("ms"),
                    f"{more.median:.4f} ({low:.3f} .. {high:.3f})",
                    "yes" if same else "NO",
                    len(off.seconds),
                ]
            )
            records.append(
                {
                    "shape": name,
                    "scale": scale,
                    "tokens": num_tokens,
                    "off": off.seconds,
                    "on": on.seconds,
                    "ratio": more.median,
                    "same": same,
                    "stages": [point["stages"] for point in points],
                }
            )
        from mlx_ep.benchmark.samples import geometric_mean

        mean = geometric_mean(ratios)
        targets.append(Target(f"{name}/{scale}, on / off", mean, MOST_RATIO))
    headers = ["shape", "T", "off", "on", "on / off", "same bits", "samples"]
    print(markdown_table(headers, rows) + "\n")
    different = sum(not record["same"] for record in records)
    targets.append(Target("points where the outputs differ", different, 0))
    figure = "stage timings on / off: " + ", ".join(
        f"{target.value:.3f} at {target.name.partition(',')[0]}"
        for target in targets[:-1]
    )
    return finish(args, records, targets, figure)


if __name__ == "__main__":
    sys.exit(main())
