"""How much of a slow link do shared experts hide, and how much two micro-batches?

Two MPI ranks, one core each, float32, strategy `replicated`: one all_sum a layer. Each
is measured through an artificial link and without it: a collective first sleeps 200 us
and 1 ns for each byte that a rank gives it, which leaves the core to what overlaps it.
Medians over samples of the slower rank.

One MoE layer with a shared expert (qwen2_moe): per T the layer with `overlap` none and
single, the exchange alone and the shared expert alone.

Steps of a model of 4 such layers with attention: per number of tokens in the ways none,
single and two; what `auto` takes, which has measured them itself when the model was
made; and the milliseconds of a layer's exchange that were hidden, as `--timings` shows
them. "computing" is a step without the link less its exchanges without it.

    python -m benchmarks.bench_overlap [--quick] [--check] [--json FILE]

Targets: where there is enough to compute (the shared expert alone takes longer than the
exchange alone; a step's computing takes longer than its exchanges), the layer with
single and the step with the best overlap have at least 0.9 of the throughput that they
have without the link. `auto` has at least 0.98 of the throughput of a model without
overlap, everywhere: steps of both in turn, now one first, now the other, each pair with
its ratio. Missed is
where the median's interval (95 %, bootstrap) lies below; a wider one than 4 % tells
too little, and is missed too.
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
SIZES = (*(("decode", size) for size in (1, 4, 8, 16)), ("prompt", 16))
HIDDEN_PASSES = 4
STEP_COLUMNS = ("exchanges", "computing", "none", "single", "two", "free")
QUICK_SIZES = (("decode", 8), ("prompt", 16))
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


def make_steps(group, overlap):
    """A model of several layers whose steps can be cut, and its `expert_parallel`."""
    import mlx_ep
    from mlx_ep import EPConfig

    model = tiny.make_model(MODEL | {"num_hidden_layers": LAYERS})
    config = EPConfig(overlap=overlap, runner="gather", warmup=False)
    mlx_ep.parallelize(model, group, config)
    mx.eval(model.parameters())
    return model


def time_steps(group, model, sizes, samples):
    """On a rank: (kind, tokens) -> way -> samples, and of the exchange alone."""
    from mlx_ep.api.overlap import always
    from mlx_ep.comm import GroupComm

    comm, parallel = GroupComm(group), model.expert_parallel
    choose = {mode: always(mode) for mode in ("none", "single", "two")}
    results = {}
    for kind, size in sizes:
        step = step_of(model, kind, size)

        def run(mode, step=step):
            parallel.two_batch.choose = choose[mode]
            step()

        arms = {mode: partial(run, mode) for mode in choose}
        x = mx.zeros((size, D))
        arms["exchange"] = lambda x=x: mx.eval(comm.all_reduce(x))
        results[kind, size] = interleaved(arms, samples, 1, barrier=comm.barrier)
    return results


def time_hidden(group, model, sizes):
    """On a rank: (kind, tokens, way) -> ms a layer, as `--timings` has them."""
    from mlx_ep.api.overlap import always
    from mlx_ep.comm import GroupComm

    comm, parallel, hidden = GroupComm(group), model.expert_parallel, {}
    for kind, size in sizes:
        step = step_of(model, kind, size)
        for mode in ("single", "two"):
            parallel.two_batch.choose = always(mode)
            exposure = parallel.group.overlap.exposure
            for times in exposure.times.values():
                times.clear()
            parallel.group.timings.enabled = True
            for _ in range(HIDDEN_PASSES):
                comm.barrier()
                step()
            parallel.group.timings.enabled = False
            hidden[kind, size, mode] = exposure.per_layer()
    return hidden


def time_pairs(group, plain, auto, sizes, seconds):
    """On a rank: (kind, tokens) -> seconds of none and of auto, ``[rounds, 2]``.

    Args:
        plain: a model without overlap; `auto`: one that has measured its ways.
        seconds: about what each size may take; rank 0 says how many rounds that is.
    """
    from mlx_ep.comm import GroupComm

    comm, results = GroupComm(group), {}
    for kind, size in sizes:
        steps = [step_of(model, kind, size) for model in (plain, auto)]

        def timed(arm, steps=steps):
            comm.barrier()
            start = time.perf_counter()
            steps[arm]()
            return time.perf_counter() - start

        alone = [timed(arm) + timed(1 - arm) for arm in (0, 1, 0)][-1]
        rounds = comm.broadcast(mx.array(max(int(seconds / alone), 8))).item()
        found = np.zeros((rounds, 2))
        for number in range(rounds):
            for arm in (0, 1) if number % 2 else (1, 0):
                found[number, arm] = timed(arm)
        results[kind, size] = found
    return results


def measure_free(group, tokens, sizes, samples, samples_of_steps):
    """On a rank, without the link: layers and steps."""
    layers = measure(group, tokens, samples)
    model = make_steps(group, "two")
    return layers, time_steps(group, model, sizes, samples_of_steps)


def measure_slow(group, tokens, sizes, samples, samples_of_steps, seconds):
    """On a rank, through the link: layers, steps, what is hidden, and `auto`."""
    layers = measure(group, tokens, samples)
    model, plain = make_steps(group, "auto"), make_steps(group, "none")
    overlaps = model.expert_parallel.overlaps
    chosen = {each: overlaps.choose(*each) for each in sizes}
    found = time_pairs(group, plain, model, sizes, seconds)
    times = time_steps(group, model, sizes, samples_of_steps)
    return layers, times, time_hidden(group, model, sizes), chosen, found


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


def layer_records(free, slow):
    """A record of each T, and the targets."""
    records, targets = [], []
    for num_tokens, here in slow.items():
        there = free[num_tokens]
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
    return records, targets


def layers_table(records):
    headers = (
        *("T", "exchange us", "shared us", "layer none us", "layer single us"),
        *("without the link us", "hidden us", "of free", "shared > exchange"),
    )
    lines = [
        (num, *(f"{v:.0f}" for v in values), f"{share:.2f}", "yes" if applies else "no")
        for num, *values, share, applies in (record.values() for record in records)
    ]
    return markdown_table(headers, lines)


def step_records(free, slow, hidden, chosen):
    """A record of each size, and the targets."""
    records, targets = [], []
    for (kind, size), here in slow.items():
        there = free[kind, size]
        best = min(there["none"], there["single"], there["two"])
        exchanges = LAYERS * here["exchange"]
        record = {
            "kind": kind,
            "tokens": size,
            "exchanges_us": exchanges * 1e6,
            "computing_us": max(best - LAYERS * there["exchange"], 0.0) * 1e6,
            **{f"{mode}_us": here[mode] * 1e6 for mode in ("none", "single", "two")},
            "free_us": best * 1e6,
            "auto": chosen[kind, size],
            "of_free": max(best / here[m] for m in ("none", "single", "two")),
            "hidden_ms": {
                mode: [
                    max(alone - exposed, 0.0)
                    for _, alone, exposed in hidden[kind, size, mode]
                ]
                for mode in ("single", "two")
            },
        }
        records.append(record)
        if record["computing_us"] > record["exchanges_us"]:
            name = f"{kind}, {size} tokens: best overlap, of a free link"
            targets.append(Target(name, record["of_free"], LEAST_SHARE, at_least=True))
    return records, targets


def steps_table(records):
    headers = (
        *("step", "exchanges us", "computing us", "none us", "single us", "two us"),
        *("without the link us", "auto is", "best of free", "hidden ms: single"),
        "two",
    )
    lines = [
        (
            f"{r['kind']} {r['tokens']}",
            *(f"{r[f'{n}_us']:.0f}" for n in STEP_COLUMNS),
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


def pairs_table(records):
    lines = [
        (r["pairs"], r["rounds"], *(f"{r[n]:.3f}" for n in ("of_none", "low", "high")))
        for r in records
    ]
    headers = ("none / auto", "pairs", "median", "95 % from", "to")
    return markdown_table(headers, lines)


def main():
    args = arguments(__doc__, samples=40).parse_args()
    tokens = QUICK_TOKENS if args.quick else TOKENS
    sizes = QUICK_SIZES if args.quick else SIZES
    samples = max(args.samples // (4 if args.quick else 1), 5)
    of_steps = max(samples // 5, 5)
    print(heading("overlap"))
    free = run_pinned(
        2, measure_free, tokens, sizes, samples, of_steps, transport="mpi", timeout=200
    )
    with Link(LATENCY, BANDWIDTH) as link:
        slow = run_pinned(
            2,
            measure_slow,
            *(tokens, sizes, samples, of_steps, 2 if args.quick else 14),
            transport="mpi",
            timeout=300,
            link=link,
        )
    layers, targets = layer_records(
        medians([rank[0] for rank in free]), medians([rank[0] for rank in slow])
    )
    shares = [target.value for target in targets]
    print(layers_table(layers) + "\n")
    _, _, hidden, chosen, _ = slow[0]
    steps, step_targets = step_records(
        medians([rank[1] for rank in free]),
        medians([rank[1] for rank in slow]),
        hidden,
        chosen,
    )
    print(steps_table(steps) + "\n")
    of_pairs, pair_targets = pairs([rank[4] for rank in slow])
    print(pairs_table(of_pairs) + "\n")
    least_auto = min(record["of_none"] for record in of_pairs)
    worst = f"at least {min(shares):.2f}" if shares else "nowhere enough to hide it"
    figure = (
        f"overlap (single, 2 ranks, {LATENCY * 1e6:.0f} us, {BANDWIDTH / 1e9:g} GB/s): "
        f"{worst} of the throughput without the link where shared experts take longer; "
        f"steps with auto: at least {least_auto:.2f} of none"
    )
    records = [*layers, *steps, *of_pairs]
    return finish(args, records, targets + step_targets + pair_targets, figure)


if __name__ == "__main__":
    sys.exit(main())
