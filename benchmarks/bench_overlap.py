"""How much of a slow link do shared experts hide, and how much two micro-batches?

Two ranks of a ring, one core each, float32, strategy `replicated`: one all_sum a layer.
Each is measured through an artificial link (200 us, 1 GB/s in each direction) and
without it. Medians over samples of the slower rank.

One MoE layer with a shared expert (qwen2_moe): per T the layer with `overlap` none and
single, the exchange alone and the shared expert alone.

Steps of a model of 4 such layers with attention: per number of tokens with `overlap`
none, single, two and auto, which has measured them itself when the model was made. And
the milliseconds of a layer's exchange that were hidden, as `--timings` shows them.

    python -m benchmarks.bench_overlap [--quick] [--check] [--json FILE]

Targets: where there is enough to compute (the shared expert alone takes longer than the
exchange alone; a step without the link takes longer than its exchanges), the layer with
single and the step with the best overlap have at least 0.9 of the throughput that they
have without the link. `auto` has at least 0.98 of the throughput of none, everywhere:
steps of both in turn, now one first, now the other, each pair with its ratio. Missed is
where the median's interval (95 %, bootstrap) lies below; a wider one than 4 % tells too
little, and is missed too.
"""

from __future__ import annotations

import sys
import time
from functools import partial

import mlx.core as mx
import numpy as np

from benchmarks.harness import (
    Target,
    arguments,
    finish,
    heading,
    interleaved,
    run_pinned,
    slowest,
)
from mlx_ep.api.overlap import step_of
from mlx_ep.metrics import markdown_table
from tests.support import tiny
from tests.support.link import Link

LATENCY, BANDWIDTH = 200e-6, 1e9
D = 512
TOKENS = (1, 4, 16, 64)
QUICK_TOKENS = (1, 16)
LEAST_SHARE = 0.9
LAYERS = 4
SIZES = (
    *(("decode", 1), ("decode", 4), ("decode", 16)),
    *(("prompt", 32), ("prompt", 128)),
)
QUICK_SIZES = (("decode", 8), ("prompt", 64))
MODEL = tiny.QWEN2_MOE | {
    "hidden_size": D,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": D,
}


def measure(group, tokens, samples):
    """On a rank: T -> arm -> samples."""
    import mlx_ep
    from mlx_ep import EPConfig
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    blocks = {}
    for overlap in ("none", "single"):
        model = tiny.make_model(MODEL)
        config = EPConfig(overlap=overlap, runner="gather", warmup=False)
        mlx_ep.parallelize(model, group, config)
        mx.eval(model.parameters())
        blocks[overlap] = model.layers[0].mlp
    results = {}
    for num_tokens in tokens:
        x = mx.random.normal((1, num_tokens, D), key=mx.random.key(1))
        mx.eval(x)

        def run(function, x=x):
            mx.eval(function(x))

        arms = {name: partial(run, block) for name, block in blocks.items()}
        arms["exchange"] = partial(run, comm.all_reduce)
        arms["shared"] = partial(run, blocks["none"].shared_expert)
        results[num_tokens] = interleaved(arms, samples, barrier=comm.barrier)
    return results


def measure_steps(group, sizes, samples):
    """On a rank: (kind, tokens) -> arm -> samples; and what is hidden, by overlap."""
    import mlx_ep
    from mlx_ep import EPConfig
    from mlx_ep.api.overlap import always
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    model = tiny.make_model(MODEL | {"num_hidden_layers": LAYERS})
    config = EPConfig(overlap="auto", runner="gather", warmup=False)
    mlx_ep.parallelize(model, group, config)
    mx.eval(model.parameters())
    parallel = model.expert_parallel
    choose = {mode: always(mode) for mode in ("none", "single", "two")}
    choose["auto"] = parallel.overlaps.choose
    results, hidden = {}, {}
    for kind, size in sizes:
        step = step_of(model, kind, size)

        def run(mode, step=step):
            parallel.two_batch.choose = choose[mode]
            step()

        arms = {mode: partial(run, mode) for mode in choose}
        x = mx.zeros((size, D))
        arms["exchange"] = lambda x=x: mx.eval(comm.all_reduce(x))
        results[kind, size] = interleaved(arms, samples, barrier=comm.barrier)
        for mode in ("single", "two"):
            exposure = parallel.group.overlap.exposure
            for times in exposure.times.values():
                times.clear()
            parallel.group.timings.enabled = True
            for _ in range(8):
                comm.barrier()
                run(mode)
            parallel.group.timings.enabled = False
            hidden[kind, size, mode] = exposure.per_layer()
    chosen = {each: parallel.overlaps.choose(*each) for each in sizes}
    return results, hidden, chosen


def measure_pairs(group, sizes, seconds):
    """On a rank: (kind, tokens) -> seconds of none and of auto, ``[rounds, 2]``.

    Args:
        seconds: about what each size may take; rank 0 says how many rounds that is.
    """
    import mlx_ep
    from mlx_ep import EPConfig
    from mlx_ep.api.overlap import always
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    model = tiny.make_model(MODEL | {"num_hidden_layers": LAYERS})
    config = EPConfig(overlap="auto", runner="gather", warmup=False)
    mlx_ep.parallelize(model, group, config)
    mx.eval(model.parameters())
    parallel = model.expert_parallel
    choose = (always("none"), parallel.overlaps.choose)
    results = {}
    for kind, size in sizes:
        step = step_of(model, kind, size)

        def timed(arm, step=step):
            parallel.two_batch.choose = choose[arm]
            comm.barrier()
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        alone = [timed(arm) + timed(1 - arm) for arm in (0, 1, 0)][-1]
        rounds = comm.broadcast(mx.array(max(int(seconds / alone), 8))).item()
        found = np.zeros((rounds, 2))
        for number in range(rounds):
            for arm in (0, 1) if number % 2 else (1, 0):
                found[number, arm] = timed(arm)
        results[kind, size] = found
    return results


def told_apart(ranks, rng):
    """The median of none / auto over pairs, its 95 % interval, and the pairs."""
    none, auto = np.max(ranks, axis=0).T
    ratios = none / auto
    draws = rng.integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high), len(ratios)


def pairs(per_rank):
    """A record of each size, and the targets."""
    records, targets, rng = [], [], np.random.default_rng(0)
    for kind, size in per_rank[0]:
        median, low, high, rounds = told_apart(
            [rank[kind, size] for rank in per_rank], rng
        )
        name = f"{kind} {size}: auto, of none"
        records.append(
            {"pairs": f"{kind} {size}", "of_none": median, "low": low, "high": high}
            | {"rounds": rounds}
        )
        targets += [
            Target(f"{name} (upper end)", high, 0.98, at_least=True),
            Target(f"{name} (width of the interval)", high - low, 0.04),
        ]
    return records, targets


def medians(per_rank):
    """T -> arm -> seconds of the slower rank."""
    return {
        num_tokens: {
            arm: slowest([rank[num_tokens][arm] for rank in per_rank]).median
            for arm in arms
        }
        for num_tokens, arms in per_rank[0].items()
    }


def steps(free, slow):
    """A record of each size, and the targets."""
    records, targets = [], []
    times, without = (medians([rank[0] for rank in ranks]) for ranks in (slow, free))
    for (kind, size), here in times.items():
        there = without[kind, size]
        best = min(there["none"], there["single"], there["two"])
        of_free = {m: best / here[m] for m in ("none", "single", "two", "auto")}
        record = {
            "kind": kind,
            "tokens": size,
            "exchanges_us": LAYERS * here["exchange"] * 1e6,
            **{f"{mode}_us": here[mode] * 1e6 for mode in of_free},
            "free_us": best * 1e6,
            "auto": slow[0][2][kind, size],
            "of_free": max(of_free.values()),
            "hidden_ms": {
                mode: [max(alone - exposed, 0.0) for _, alone, exposed in found]
                for mode in ("single", "two")
                for found in [slow[0][1][kind, size, mode]]
            },
        }
        records.append(record)
        name = f"{kind}, {size} tokens"
        if record["free_us"] > record["exchanges_us"]:
            targets.append(
                Target(
                    f"{name}: best overlap, of a free link",
                    record["of_free"],
                    LEAST_SHARE,
                    at_least=True,
                )
            )
    return records, targets


def steps_table(records):
    headers = (
        *("step", "exchanges us", "none us", "single us", "two us", "auto us"),
        *("without the link us", "auto is", "best of free", "hidden ms: single", "two"),
    )
    lines = [
        (
            f"{r['kind']} {r['tokens']}",
            *(f"{r[f'{n}_us']:.0f}" for n in ("exchanges", "none", "single", "two")),
            f"{r['auto_us']:.0f}",
            f"{r['free_us']:.0f}",
            r["auto"],
            f"{r['of_free']:.2f}",
            *(
                " ".join(f"{ms:.2f}" for ms in r["hidden_ms"][mode]) or "-"
                for mode in ("single", "two")
            ),
        )
        for r in records
    ]
    return markdown_table(headers, lines)


def main():
    args = arguments(__doc__, samples=60).parse_args()
    tokens = QUICK_TOKENS if args.quick else TOKENS
    samples = args.samples // 4 if args.quick else args.samples
    print(heading("overlap"))
    free = medians(run_pinned(2, measure, tokens, samples, timeout=200))
    with Link(LATENCY, BANDWIDTH) as link:
        slow = medians(run_pinned(2, measure, tokens, samples, timeout=200, link=link))
    records, targets = [], []
    for num_tokens in tokens:
        here, there = slow[num_tokens], free[num_tokens]
        best = min(there["none"], there["single"])
        record = {
            "tokens": num_tokens,
            "exchange_us": here["exchange"] * 1e6,
            "shared_us": here["shared"] * 1e6,
            "none_us": here["none"] * 1e6,
            "single_us": here["single"] * 1e6,
            "free_us": best * 1e6,
            "hidden_us": (here["none"] - here["single"]) * 1e6,
            "share": best / here["single"],
            "applies": here["shared"] > here["exchange"],
        }
        records.append(record)
        if record["applies"]:
            name = f"T={num_tokens}, throughput with overlap, of that without the link"
            targets.append(Target(name, record["share"], LEAST_SHARE, at_least=True))
    headers = (
        *("T", "exchange us", "shared us", "layer none us", "layer single us"),
        *("without the link us", "hidden us", "of free", "shared > exchange"),
    )
    lines = [
        (num, *(f"{v:.0f}" for v in values), f"{share:.2f}", "yes" if applies else "no")
        for num, *values, share, applies in (record.values() for record in records)
    ]
    print(markdown_table(headers, lines) + "\n")
    sizes = QUICK_SIZES if args.quick else SIZES
    samples = max(samples // 6, 5)
    free = run_pinned(2, measure_steps, sizes, samples, timeout=300)
    with Link(LATENCY, BANDWIDTH) as link:
        slow = run_pinned(2, measure_steps, sizes, samples, timeout=300, link=link)
    step_records, step_targets = steps(free, slow)
    print(steps_table(step_records) + "\n")
    with Link(LATENCY, BANDWIDTH) as link:
        seconds = 2 if args.quick else 16
        found = run_pinned(2, measure_pairs, sizes, seconds, timeout=300, link=link)
    pair_records, pair_targets = pairs(found)
    lines = [
        (r["pairs"], r["rounds"], *(f"{r[n]:.3f}" for n in ("of_none", "low", "high")))
        for r in pair_records
    ]
    headers = ("none / auto", "pairs", "median", "95 % from", "to")
    print(markdown_table(headers, lines) + "\n")
    least_auto = min(record["of_none"] for record in pair_records)
    shares = [target.value for target in targets]
    worst = f"at least {min(shares):.2f}" if shares else "nowhere enough to hide it"
    figure = (
        f"overlap (single, 2 ranks, {LATENCY * 1e6:.0f} us, {BANDWIDTH / 1e9:g} GB/s): "
        f"{worst} of the throughput without the link where shared experts take longer; "
        f"steps with auto: at least {least_auto:.2f} of none"
    )
    records += step_records + pair_records
    return finish(args, records, targets + step_targets + pair_targets, figure)


if __name__ == "__main__":
    sys.exit(main())
