"""How much of a slow link do shared experts hide, and how much two micro-batches?

Two MPI ranks, one core each, float32, strategy `replicated`: one all_sum a layer. It
goes through an artificial link: a collective ends 200 us and 1 ns for each byte that a
rank gives it after the last rank has joined it, and no core is taken until then
(`tests/support/slow_mpi.c`). "free" is the same link with a delay of nothing, in the
same processes: the arms take turns, one step each, there and back (A B C C B A ...), in
every fourth turn the free ones and the exchange alone too. Every ratio is one of
neighbours, of the slower rank's seconds in the same turn; what counts is their median,
beside its interval of 95 % (bootstrap).

One MoE layer with a shared expert (qwen2_moe): per T the layer with `overlap` none and
single, through the link and free, the exchange alone and the shared expert alone.

Steps of a model of 4 such layers with attention: per number of tokens in the ways none,
single and two, through the link and free; what `auto` takes, which has measured them
itself, through the link, when the model was made (its steps are those of that way);
and the milliseconds of a layer's exchange that were hidden, as `--timings` shows them.
"computing" is a free step less its exchanges.

    python -m benchmarks.bench_overlap [--quick] [--check] [--json FILE]

Targets: where there is enough to compute (the shared expert alone takes longer than the
exchange alone; a step's computing takes longer than its exchanges), the layer with
single and the step with the best overlap have at least 0.9 of the throughput of a free
link. `auto` has at least 0.98 of the throughput of each way that it does not take, at
every size. Missed is where the median's interval lies below; one that reaches from
below to above and is wider than 4 % tells too little, and is missed too.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np

from benchmarks.harness import Target, Told, arguments, finish, heading, run_pinned
from mlx_ep.api.overlap import step_of
from mlx_ep.metrics import markdown_table
from tests.support import tiny
from tests.support.link import Link, set_link

LATENCY, BANDWIDTH = 200e-6, 1e9
D, STEP_D = 512, 256  # of layers, of the model whose steps are timed
TOKENS, QUICK_TOKENS = (1, 4, 16, 64), (1, 16)
LEAST_SHARE, LEAST_OF_WAYS, WIDEST = 0.9, 0.98, 0.04
LAYERS = 4
SIZES = (*(("decode", size) for size in (1, 4, 8, 16)), ("prompt", 16))
QUICK_SIZES = (("decode", 8), ("prompt", 16))
WAYS = ("none", "single", "two")
ALONE = ("exchange", "shared")
FREE = "free "  # before the name of an arm without the link's delay
LEAST_ROUNDS = 6
LAYER_SECONDS, STEP_SECONDS = 6.0, 28.0  # of the arms of one size together
RARELY = 4  # in every so many turns, what needs no narrow interval
HIDDEN_PASSES = 4


def model_of(width, num_layers=2):
    sizes = {"hidden_size": width, "shared_expert_intermediate_size": width}
    sizes |= {"moe_intermediate_size": 64, "num_hidden_layers": num_layers}
    return tiny.make_model(tiny.QWEN2_MOE | sizes)


def there_and_back(
    arms: dict[str, Callable[[], None]], comm, seconds: float, most: int
) -> dict[str, np.ndarray]:
    """Seconds of each arm in each turn: A B C, then C B A, and so on.

    Arms whose name begins with `FREE` run without the link's delay.

    Args:
        seconds: about what they may take together; rank 0 says how many turns that is.
        most: turns.
    """

    def timed(name):
        link = (0.0, math.inf) if name.startswith(FREE) else (LATENCY, BANDWIDTH)
        set_link(*link)
        comm.barrier()
        start = time.perf_counter()
        arms[name]()
        return time.perf_counter() - start

    names = list(arms)
    alone = [sum(timed(n) / turns_between(n) for n in names) for _ in range(3)][-1]
    rounds = min(max(int(seconds / alone), LEAST_ROUNDS * RARELY), most)
    rounds = comm.broadcast(mx.array(rounds)).item()
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[::-1] if number % 2 else names:
            if number % turns_between(name) == 0:
                found[name].append(timed(name))
    set_link(LATENCY, BANDWIDTH)
    return {name: np.array(times) for name, times in found.items()}


def turns_between(name: str) -> int:
    """Through the link every turn counts; the rest is there for medians."""
    return RARELY if name.startswith((FREE, *ALONE)) else 1


def time_layers(group, tokens, seconds, most):
    """On a rank: T -> arm -> seconds of each turn."""
    import mlx_ep
    from mlx_ep import EPConfig
    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    blocks = {}
    for overlap in ("none", "single"):
        model = model_of(D)
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

        arms = {}
        for name, block in blocks.items():
            arms[name] = arms[FREE + name] = partial(run, block)
        arms["exchange"] = partial(run, comm.all_reduce)
        arms["shared"] = partial(run, blocks["none"].shared_expert)
        results[num_tokens] = there_and_back(arms, comm, seconds, most)
    return results


def make_steps(group):
    """A model of several layers whose steps can be cut, and which has timed them."""
    import mlx_ep
    from mlx_ep import EPConfig

    model = model_of(STEP_D, LAYERS)
    config = EPConfig(overlap="auto", runner="gather", warmup=False)
    mlx_ep.parallelize(model, group, config)
    mx.eval(model.parameters())
    return model


def time_steps(group, model, sizes, seconds, most):
    """On a rank: (kind, tokens) -> arm -> seconds of each turn."""
    from mlx_ep.api.overlap import always
    from mlx_ep.comm import GroupComm

    comm, parallel = GroupComm(group), model.expert_parallel
    results = {}
    for kind, size in sizes:
        choose = {way: always(way) for way in WAYS}
        choose[parallel.overlaps.choose(kind, size)] = parallel.overlaps.choose
        if (kind, size) == ("decode", 1):
            del choose["two"]  # runs as single

        def run(choose, step):
            parallel.two_batch.choose = choose
            step()

        arms = {}
        for way, chooses in choose.items():
            # Of its own caches: those of `two` are in halves.
            step = step_of(model, kind, size)
            arms[way] = arms[FREE + way] = partial(run, chooses, step)
        x = mx.zeros((size, STEP_D))
        arms["exchange"] = lambda x=x: mx.eval(comm.all_reduce(x))
        arms[f"{FREE}exchange"] = arms["exchange"]
        results[kind, size] = there_and_back(arms, comm, seconds, most)
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


def measure(group, tokens, sizes, part, most):
    """On a rank: layers, steps, what is hidden, and what `auto` takes.

    Args:
        part: of the seconds of a full run.
    """
    layers = time_layers(group, tokens, LAYER_SECONDS * part, most)
    model = make_steps(group)
    overlaps = model.expert_parallel.overlaps
    chosen = {each: overlaps.choose(*each) for each in sizes}
    steps = time_steps(group, model, sizes, STEP_SECONDS * part, most)
    hidden = time_hidden(group, model, sizes)
    return layers, steps, hidden, chosen, overlaps.explain()


def slower(per_rank):
    """size -> arm -> seconds of the slower rank in each turn."""
    return {
        size: {
            arm: np.max([rank[size][arm] for rank in per_rank], axis=0) for arm in arms
        }
        for size, arms in per_rank[0].items()
    }


def fastest(arms, *names):
    """The arm with the lowest median."""
    return min(
        (name for name in names if name in arms), key=lambda n: np.median(arms[n])
    )


def microseconds(arms, name):
    return float(np.median(arms[name])) * 1e6


def layer_records(sizes):
    """A record of each T, and the targets."""
    records, targets = [], []
    for num_tokens, arms in sizes.items():
        free = fastest(arms, f"{FREE}none", f"{FREE}single")
        share = Told.of(arms[free] / arms["single"][::RARELY])
        record = {
            "tokens": num_tokens,
            "turns": len(arms["none"]),
            "exchange_us": microseconds(arms, "exchange"),
            "shared_us": microseconds(arms, "shared"),
            "none_us": microseconds(arms, "none"),
            "single_us": microseconds(arms, "single"),
            "free_us": microseconds(arms, free),
            "hidden_us": float(np.median(arms["none"] - arms["single"])) * 1e6,
            "share": share,
        }
        record["applies"] = record["shared_us"] > record["exchange_us"]
        records.append(record)
        if record["applies"]:
            name = f"T={num_tokens}, throughput with overlap, of that of a free link"
            targets.append(Target(name, share.median, LEAST_SHARE, at_least=True))
    return records, targets


def layers_table(records):
    headers = (
        *("T", "turns", "exchange us", "shared us", "layer none us", "layer single us"),
        *("free us", "hidden us", "of free", "95 %", "shared > exchange"),
    )
    lines = [
        (
            num,
            turns,
            *(f"{v:.0f}" for v in values),
            *share.texts,
            "yes" if applies else "no",
        )
        for num, turns, *values, share, applies in (r.values() for r in records)
    ]
    return markdown_table(headers, lines)


def step_records(sizes, hidden, chosen):
    """A record of each size, and the targets."""
    records, targets = [], []
    for (kind, size), arms in sizes.items():
        free = fastest(arms, *(FREE + way for way in WAYS))
        best = fastest(arms, *WAYS)
        of_free = Told.of(arms[free] / arms[best][::RARELY])
        alone = microseconds(arms, free)
        free_exchanges = LAYERS * microseconds(arms, f"{FREE}exchange")
        record = {
            "kind": kind,
            "tokens": size,
            "exchanges_us": LAYERS * microseconds(arms, "exchange"),
            "computing_us": max(alone - free_exchanges, 0.0),
            "ways_us": {way: microseconds(arms, way) for way in WAYS if way in arms},
            "free_us": alone,
            "auto": chosen[kind, size],
            "of_free": of_free,
            "hidden_ms": {
                way: [
                    max(all_ - seen, 0.0) for _, all_, seen in hidden[kind, size, way]
                ]
                for way in ("single", "two")
            },
        }
        record["applies"] = record["computing_us"] > record["exchanges_us"]
        records.append(record)
        if record["applies"]:
            name = f"{kind}, {size} tokens: best overlap, of a free link"
            targets.append(Target(name, of_free.median, LEAST_SHARE, at_least=True))
    return records, targets


def steps_table(records):
    headers = (
        *("step", "exchanges us", "computing us", *(f"{way} us" for way in WAYS)),
        *("free us", "best of free", "95 %", "computing > exchanges"),
        *("hidden ms: single", "two"),
    )
    lines = [
        (
            f"{r['kind']} {r['tokens']}",
            *(f"{r[f'{n}_us']:.0f}" for n in ("exchanges", "computing")),
            *(f"{r['ways_us'][w]:.0f}" if w in r["ways_us"] else "-" for w in WAYS),
            f"{r['free_us']:.0f}",
            *r["of_free"].texts,
            "yes" if r["applies"] else "no",
            *(
                " ".join(f"{ms:.2f}" for ms in r["hidden_ms"][way]) or "-"
                for way in ("single", "two")
            ),
        )
        for r in records
    ]
    return markdown_table(headers, lines)


def auto_records(sizes, chosen):
    """A record of each size and way beside `auto`, and the targets."""
    records, targets = [], []
    for (kind, size), arms in sizes.items():
        for way in WAYS:
            if way not in arms or way == chosen[kind, size]:
                continue
            told = Told.of(arms[way] / arms[chosen[kind, size]])
            record = {"step": f"{kind} {size}", "auto": chosen[kind, size], "way": way}
            records.append(record | {"turns": len(arms[way]), "of_way": told})
            name = f"{kind} {size}: auto ({chosen[kind, size]}), of {way}"
            end = Target(f"{name} (upper end)", told.high, LEAST_OF_WAYS, at_least=True)
            targets.append(end)
            if told.low < LEAST_OF_WAYS:  # else the width does not matter
                width = told.high - told.low
                targets.append(Target(f"{name} (width of the interval)", width, WIDEST))
    return records, targets


def auto_table(records):
    headers = ("step", "auto is", "way", "turns", "way / auto", "95 %")
    lines = [
        (r["step"], r["auto"], r["way"], r["turns"], *r["of_way"].texts)
        for r in records
    ]
    return markdown_table(headers, lines, left=3)


def main():
    parser = arguments(__doc__, samples=240)
    args = parser.parse_args()
    if sys.platform != "linux":
        parser.error("it needs Linux: the artificial link over MPI waits by futex")
    tokens = QUICK_TOKENS if args.quick else TOKENS
    sizes = QUICK_SIZES if args.quick else SIZES
    part = 0.2 if args.quick else 1.0
    print(heading("overlap"))
    with Link(LATENCY, BANDWIDTH) as link:
        work = (tokens, sizes, part, args.samples)
        ranks = run_pinned(2, measure, *work, transport="mpi", timeout=400, link=link)
    _, _, hidden, chosen, explained = ranks[0]
    layers, targets = layer_records(slower([rank[0] for rank in ranks]))
    print(layers_table(layers) + "\n")
    step_sizes = slower([rank[1] for rank in ranks])
    steps, step_targets = step_records(step_sizes, hidden, chosen)
    print(steps_table(steps) + "\n")
    autos, auto_targets = auto_records(step_sizes, chosen)
    print(auto_table(autos) + "\n")
    print(f"What `auto` has measured:\n\n{explained}\n")
    shares = [target.value for target in targets]
    worst = f"at least {min(shares):.2f}" if shares else "nowhere enough to hide it"
    least = min(record["of_way"].median for record in autos)
    figure = (
        f"overlap (single, 2 ranks, {LATENCY * 1e6:.0f} us, {BANDWIDTH / 1e9:g} GB/s): "
        f"{worst} of the throughput of a free link where shared experts take longer; "
        f"steps with auto: at least {least:.2f} of any other way"
    )
    records = [*layers, *steps, *autos]
    return finish(args, records, targets + step_targets + auto_targets, figure)


if __name__ == "__main__":
    sys.exit(main())
