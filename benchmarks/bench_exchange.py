"""What does an exchange cost beside the bare collectives that move the same bytes?

Two MPI ranks, one core each. Per T and strategy, dispatch and combine without experts,
interleaved with one all_gather and one all_reduce of the bytes that it moves: medians
over samples of the slower rank. Beside it, rows and bytes per token of each strategy
and of the layout with one row per (token, expert).

"floor" is what no exchange can leave out beside its collectives: a rank reads its sums
for the other one and writes them rounded, then reads its own and those that came and
writes the totals. It is measured as a plain copy that reads and writes as many bytes,
on both ranks at once, and computed from the rate of the largest of these copies.

    python -m benchmarks.bench_exchange [--quick] [--check] [--json FILE]

Targets, for strategy `auto`: within 1.25x of the bare collectives and the floor from
T=64 up, and less than 150 us above the bare collectives at T=1.
"""

from __future__ import annotations

import sys
from functools import partial

import mlx.core as mx
import numpy as np

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

D, E, K = 7168, 256, 8
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
QUICK_TOKENS = (1, 64, 256)
ARMS = ("auto", "auto, float32 sums", "gathered", "low_latency", "normal")
# MLX keeps freed buffers on Metal; its Linux CPU build gives them back to the system,
# which then maps and zeroes the same pages again, for as long as the copies themselves
# take. Here malloc keeps them, for both arms alike.
KEEP_BUFFERS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
MOST_RATIO, MOST_MICROSECONDS = 1.25, 150.0
FLOOR = "floor "  # before the name of the arm whose floor it is


def distinct_experts(num_tokens, seed):
    order = np.argsort(np.random.default_rng(seed).random((num_tokens, E)), axis=1)
    return np.ascontiguousarray(order[:, :K]).astype(np.int32)


def floor_bytes(name, num_tokens, num_ranks):
    """Bytes that a rank has to read and to write beside the collectives."""
    if name == "gathered":  # its transport adds
        return 0
    own, others = num_tokens * D, (num_ranks - 1) * num_tokens * D
    sent = 0 if "float32" in name else others * (4 + 2)  # rounded where they are sent
    arrived = 4 if "float32" in name else 2
    return sent + own * 4 + others * arrived + own * 4


def measure(group, tokens, samples):
    """On a rank: T -> arm -> samples, of the exchange and of "bare" with its name."""
    from mlx_ep import EPConfig, Placement
    from mlx_ep.comm import GroupComm
    from mlx_ep.exchange import (
        STRATEGIES,
        moe_combine_exchange,
        moe_dispatch_exchange,
    )
    from mlx_ep.types import Routing, TokenCounts

    comm = GroupComm(group)
    placement = Placement.contiguous(E, comm.size)
    results = {}
    for num_tokens in tokens:
        x = mx.random.normal((num_tokens, D)).astype(mx.bfloat16)
        ids = distinct_experts(num_tokens, comm.rank)
        routing = Routing(mx.array(ids), mx.full(ids.shape, 1 / K))
        sums = mx.random.normal((comm.size * num_tokens, D))
        # What the bare all_reduce sums: `gathered` reduces float32 sums of all tokens,
        # the others send one sum for each row back.
        reduced = {name: mx.zeros((num_tokens, D), mx.bfloat16) for name in ARMS}
        reduced["gathered"] = sums
        reduced["auto, float32 sums"] = mx.zeros((num_tokens, D))
        mx.eval(x, routing, sums, reduced)
        dispatch = partial(
            moe_dispatch_exchange,
            routing=routing,
            placement=placement,
            comm=comm,
            tokens=TokenCounts((num_tokens,) * comm.size),
        )

        def exchange(strategy, dtype, sums, x=x, dispatch=dispatch):
            rows, handle = dispatch(x, strategy=strategy, sum_dtype=dtype)
            mx.eval(rows)
            mx.eval(moe_combine_exchange(sums, handle))

        def bare(reduced, x=x):
            mx.eval(comm.all_gather(x))
            mx.eval(comm.all_reduce(reduced))

        def copy(source, target):
            np.copyto(target, source)

        arms = {}
        for name in ARMS:
            if name == "low_latency" and num_tokens > 64:
                continue
            # Half of what is moved is read, half is written.
            size = floor_bytes(name, num_tokens, comm.size) // 2
            memory = np.ones(size, np.uint8), np.zeros(size, np.uint8)
            arms[FLOOR + name] = partial(copy, *memory)
            config = EPConfig(strategy=name.partition(",")[0])
            strategy = STRATEGIES.create(config)
            num_rows = len(dispatch(x, strategy=strategy)[0].x)
            dtype = mx.float32 if "float32" in name else None
            arms[name] = partial(exchange, strategy, dtype, sums[:num_rows])
            arms[f"bare {name}"] = partial(bare, reduced[name])
        count = max(5, min(samples, samples * 64 // num_tokens))
        results[num_tokens] = interleaved(arms, count, barrier=comm.barrier)
    return results


def summarize(per_rank):
    records = []
    for num_tokens, arms in per_rank[0].items():
        for name in ARMS:
            if name not in arms:
                continue
            exchange, bare, floor = (
                slowest([rank[num_tokens][arm] for rank in per_rank])
                for arm in (name, f"bare {name}", FLOOR + name)
            )
            pairs = zip(exchange.seconds, bare.seconds, strict=True)
            overhead = Samples(tuple(ours - theirs for ours, theirs in pairs))
            least = Samples(tuple(map(sum, zip(bare.seconds, floor.seconds))))
            records.append(
                {
                    "tokens": num_tokens,
                    "strategy": name,
                    "exchange_us": exchange.median * 1e6,
                    "bare_us": bare.median * 1e6,
                    "floor_us": floor.median * 1e6,
                    "floor_bytes": floor_bytes(name, num_tokens, len(per_rank)),
                    "ratio": ratio(exchange, bare).median,
                    "floor_ratio": ratio(exchange, least).median,
                    "overhead_us": overhead.median * 1e6,
                    "samples": len(exchange.seconds),
                }
            )
    largest = max(records, key=lambda record: record["floor_bytes"])
    rate = largest["floor_bytes"] / largest["floor_us"]
    for record in records:
        record["computed_floor_us"] = record["floor_bytes"] / rate
    return records


def layout_records(num_tokens=4096):
    """Rows and bytes per token, out and back, for uniform routing."""
    from mlx_ep import EPConfig, Placement
    from mlx_ep.exchange import STRATEGIES, ExchangeShape
    from mlx_ep.rows import get_dispatch_layout
    from mlx_ep.types import TokenCounts

    records = []
    for num_ranks in (2, 4):
        ids = mx.array(distinct_experts(num_tokens, 0))
        layout = get_dispatch_layout(ids, Placement.contiguous(E, num_ranks))
        per_rank = tuple(layout.rows_per_rank.tolist())
        rows = sum(per_rank) / num_tokens
        shape = ExchangeShape(
            tokens=TokenCounts((num_tokens,) * num_ranks),
            width=D,
            top_k=K,
            itemsize=2,
            rows_to=per_rank,
            rows_from=per_rank,
        )
        for name in ("gathered", "low_latency", "normal"):
            config = EPConfig(strategy=name, low_latency_tokens=num_tokens)
            moved = STRATEGIES.create(config).traffic(shape).num_bytes
            is_exact = name == "normal"
            records.append(
                {
                    "ranks": num_ranks,
                    "strategy": name,
                    "rows": rows if is_exact else num_ranks,
                    "bytes": moved / num_tokens,
                    "fewer_rows": K / (rows if is_exact else num_ranks),
                }
            )
        per_expert = {"rows": K, "bytes": 2 * K * D * 2, "fewer_rows": 1.0}
        name = "one row per (token, expert)"
        records.append({"ranks": num_ranks, "strategy": name, **per_expert})
    return records


def targets_of(records):
    found = []
    for record in records:
        num_tokens = record["tokens"]
        if record["strategy"] != "auto":
            continue
        if num_tokens >= 64:
            name = f"auto at T={num_tokens}, x of the bare collectives and the floor"
            found.append(Target(name, record["floor_ratio"], MOST_RATIO))
        elif num_tokens == 1:
            name = "auto at T=1, us above the bare collectives"
            found.append(Target(name, record["overhead_us"], MOST_MICROSECONDS))
    return found


def main():
    args = arguments(__doc__, samples=100).parse_args()
    tokens = QUICK_TOKENS if args.quick else TOKENS
    samples = args.samples // 4 if args.quick else args.samples
    print(heading("exchange"))
    layouts = layout_records()
    headers = ("ranks", "layout", "rows a token", "fewer", "KiB, out and back")
    lines = [
        (
            r["ranks"],
            r["strategy"],
            f"{r['rows']:.2f}",
            f"{r['fewer_rows']:.1f}x",
            f"{r['bytes'] / 1024:.1f}",
        )
        for r in layouts
    ]
    print(markdown_table(headers, lines) + "\n")
    records = summarize(
        run_pinned(
            2,
            measure,
            tokens,
            samples,
            transport="mpi",
            timeout=1500,
            env=KEEP_BUFFERS,
        )
    )
    headers = (
        *("T", "strategy", "exchange us", "bare us", "floor us", "computed"),
        *("x bare", "x bare + floor", "us above bare"),
    )
    lines = [
        (
            r["tokens"],
            r["strategy"],
            *(f"{r[name]:.0f}" for name in ("exchange_us", "bare_us", "floor_us")),
            f"{r['computed_floor_us']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['floor_ratio']:.2f}",
            f"{r['overhead_us']:.0f}",
        )
        for r in records
    ]
    print(markdown_table(headers, lines) + "\n")
    targets = targets_of(records)
    worst = max(t.value for t in targets[1:])
    figure = (
        f"exchange (auto, 2 ranks, D={D} bf16): {targets[0].value:.0f} us above the "
        f"bare collectives at T=1, at most {worst:.2f}x of them and the floor from "
        "T=64 up"
    )
    return finish(args, [*layouts, *records], targets, figure)


if __name__ == "__main__":
    sys.exit(main())
