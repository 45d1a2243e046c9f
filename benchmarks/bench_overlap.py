"""How much of a slow link do shared experts hide?

Two ranks of a ring, one core each, and one MoE layer with a shared expert (qwen2_moe,
float32, strategy `replicated`: one all_sum a layer). Per T: the layer with `overlap`
none and single through an artificial link (200 us, 1 GB/s in each direction), and
without the link; the exchange alone through the link, and the shared expert alone.
Medians over samples of the slower rank.

    python -m benchmarks.bench_overlap [--quick] [--check] [--json FILE]

Target: where the shared expert alone takes longer than the exchange alone, the layer
with overlap has at least 0.9 of the throughput that it has without the link.
"""

from __future__ import annotations

import sys
from functools import partial

import mlx.core as mx

from benchmarks.harness import (
    Target,
    arguments,
    finish,
    heading,
    interleaved,
    run_pinned,
    slowest,
)
from mlx_ep.metrics import markdown_table
from tests.support import tiny
from tests.support.link import Link

LATENCY, BANDWIDTH = 200e-6, 1e9
D = 512
TOKENS = (1, 4, 16, 64)
QUICK_TOKENS = (1, 16)
LEAST_SHARE = 0.9
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


def medians(per_rank):
    """T -> arm -> seconds of the slower rank."""
    return {
        num_tokens: {
            arm: slowest([rank[num_tokens][arm] for rank in per_rank]).median
            for arm in arms
        }
        for num_tokens, arms in per_rank[0].items()
    }


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
        }
        records.append(record)
        if here["shared"] > here["exchange"]:
            name = f"T={num_tokens}, throughput with overlap, of that without the link"
            targets.append(Target(name, record["share"], LEAST_SHARE, at_least=True))
    headers = (
        *("T", "exchange us", "shared us", "layer none us", "layer single us"),
        *("without the link us", "hidden us", "of free"),
    )
    lines = [
        (num, *(f"{value:.0f}" for value in values), f"{share:.2f}")
        for num, *values, share in (record.values() for record in records)
    ]
    print(markdown_table(headers, lines) + "\n")
    shares = [target.value for target in targets]
    worst = f"at least {min(shares):.2f}" if shares else "nowhere enough to hide it"
    figure = (
        f"overlap (single, 2 ranks, {LATENCY * 1e6:.0f} us, {BANDWIDTH / 1e9:g} GB/s): "
        f"{worst} of the throughput without the link where shared experts take longer"
    )
    return finish(args, records, targets, figure)


if __name__ == "__main__":
    sys.exit(main())
