"""What does an expert-parallel MoE layer cost beside mlx-lm's own, on one rank?

One MoE block of each family, with the same 4-bit weights and float32 tokens: mlx-lm's
own code, ours with the same kernels (`--runner gather`), and ours as the warm-up
chooses (`auto`), timed in turn. One rank exchanges nothing, so what remains is the
layer itself. T=1 and T=64 are timed at D 2048, F 768; T=512 at an eighth of that, where
a layer's own cost weighs 48 times as much and a CPU takes seconds.

Then the embedded model's whole decode step, of one sequence behind 64 tokens, in the
same three ways.

Beside the times, of one call with T=1: the primitives in its graph
(`mx.export_to_dot`), those of its routing and of what stands beside the experts' sum,
Python functions called, and how often the host waits for the device: with runner
gather, and with runner metal, whose kernels are replaced by their twins of MLX's ops.

    python -m benchmarks.bench_decode_overhead [--quick] [--check] [--json FILE]

Targets: at T=1 at most 4 primitives more for routing and shared part, and 1.10 of
mlx-lm's time; at T=64 and 512 at most 1.03 of it, and with `auto` not more than it; no
host sync with runner metal, at most 1 with gather; the whole step at most 1.10.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

import mlx_ep
from benchmarks.harness import (
    Samples,
    Target,
    arguments,
    finish,
    heading,
    interleaved,
    ratio,
)
from mlx_ep.config import EPConfig, RunnerName
from mlx_ep.experts import metal as metal_runner
from mlx_ep.experts import switch_runner
from mlx_ep.kernels import ops
from mlx_ep.loading import EMBEDDED_MODEL, find_model
from mlx_ep.metrics import markdown_table
from mlx_ep.models import find_moe_sites
from mlx_ep.models.block_call import BlockCall
from mlx_ep.models.blocks import BlockState
from mlx_ep.models.stand_in import OutputsStandIn
from mlx_ep.moe import ExpertGroup
from tests.support import tiny

WIDTHS = {1: (2048, 768), 64: (2048, 768), 512: (256, 128)}
SAMPLES = {64: 6, 512: 16}  # at most; T=1: as asked for
QUICK_WIDTHS = {1: (256, 128), 64: (256, 128)}
MOST_RATIO = {1: 1.10, 64: 1.03, 512: 1.03}
MOST_MORE_PRIMITIVES = 4
WARMUP = {1: 2, 64: 1, 512: 1}
STEPS, PROMPT = 8, 64  # of a sample of the embedded model, and tokens before
MOST_STEP_RATIO = 1.10

# Of each family: a configuration, and the names of its expert width.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "qwen3_moe": (tiny.QWEN3_MOE, ("moe_intermediate_size",)),
    "qwen2_moe": (
        tiny.QWEN2_MOE,
        ("moe_intermediate_size", "shared_expert_intermediate_size"),
    ),
    "deepseek_v3": (tiny.DEEPSEEK_V3, ("moe_intermediate_size",)),
    "gpt_oss": (tiny.GPT_OSS, ("intermediate_size",)),
    "mixtral": (tiny.MIXTRAL, ("intermediate_size",)),
}


def make_model(family: str, width: int, expert_width: int) -> nn.Module:
    """A model of the family with 4-bit weights, the same at each call."""
    config, names = FAMILIES[family]
    sizes = {"hidden_size": width} | dict.fromkeys(names, expert_width)
    model = tiny.make_model({**config, **sizes})

    def is_linear(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0

    nn.quantize(model, group_size=64, bits=4, class_predicate=is_linear)
    mx.eval(model.parameters())
    return model


def ours(family: str, widths: tuple[int, int], runner: RunnerName) -> BlockState:
    config = EPConfig(runner=runner)
    model = mlx_ep.parallelize(make_model(family, *widths), config=config)
    state: BlockState = model.expert_parallel.blocks[-1]
    return state


def primitives(*arrays: mx.array) -> int:
    """The primitives in the graph of arrays."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return len(re.findall(r"shape=rectangle", text.getvalue()))


def beside_the_experts(block: nn.Module, path: tuple[str, ...], x: mx.array) -> int:
    """Primitives of mlx-lm's routing, and of its output when the sum is given."""
    found: list[mx.array] = []

    def routed_sum(x: mx.array, ids: mx.array, gates: mx.array, _: Any) -> mx.array:
        found.extend((x, ids, gates))
        return evaluated(mx.zeros((*ids.shape[:-1], x.shape[-1])))

    call = BlockCall(block, type(block), path, (x,), {})
    output = call.run(lambda x, ids: OutputsStandIn(x, ids, routed_sum))
    return primitives(*found) + primitives(output)


def beside_our_experts(state: BlockState, x: mx.array) -> int:
    """The same of ours, as the layer gets its routing and gives its sum."""
    found: list[mx.array] = []

    def weighted_sum(_: Any, x: mx.array, routing: Any, *__: Any) -> mx.array:
        found.extend((x, *routing))
        return evaluated(mx.zeros(x.shape))

    with mock.patch.object(ExpertGroup, "weighted_sum", weighted_sum):
        output = state.form.holder(x)
    return primitives(*found) + primitives(output)


def evaluated(x: mx.array) -> mx.array:
    mx.eval(x)
    return x


def python_calls(function: Callable[[], object]) -> int:
    """Python functions that a call enters."""
    count = 0

    def profile(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    function()
    sys.setprofile(None)
    return count


def host_syncs(function: Callable[[], object]) -> int:
    """How often a call waits for the device: reads what has not been evaluated."""
    known: list[mx.array] = []  # kept, so that no other array gets their ids
    count = 0

    def waits(arrays: list[mx.array]) -> None:
        nonlocal count
        new = [a for a in arrays if not any(a is b for b in known)]
        count += bool(new)
        known.extend(new)

    def arrays_in(values: Any) -> list[mx.array]:
        if isinstance(values, mx.array):
            return [values]
        if isinstance(values, (tuple, list)):
            return [a for value in values for a in arrays_in(value)]
        return []

    def waiting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            waits(arrays_in(args))
            return original(*args, **kwargs)

        return call

    with (
        mock.patch.object(mx, "eval", waiting(mx.eval)),
        mock.patch.object(np, "array", waiting(np.array)),
        mock.patch.object(np, "asarray", waiting(np.asarray)),
        mock.patch.object(mx.array, "item", waiting(mx.array.item)),
        mock.patch.object(mx.array, "tolist", waiting(mx.array.tolist)),
    ):
        function()
    return count


@contextmanager
def kernels_as_ops(state: BlockState) -> Iterator[None]:
    """The block with runner metal, its kernels replaced by their twins."""
    with mock.patch.object(metal_runner, "metal", ops):
        runner = switch_runner(state.form.site.switch)
        kernels = runner.runner("metal")
        with mock.patch.object(runner, "runner", lambda _: kernels):
            yield


def in_both_orders(
    arms: dict[str, Callable[[], None]], samples: int, warmup: int
) -> dict[str, Samples]:
    """Samples in turn, half of them in the other order.

    What an arm leaves in the caches is found by the one behind it.
    """
    half = samples // 2
    first = interleaved(arms, samples - half, warmup)
    second = interleaved(dict(reversed(arms.items())), half, 0)
    return {
        name: Samples((*first[name].seconds, *second[name].seconds)) for name in arms
    }


def measure_family(
    family: str, widths: dict[int, tuple[int, int]], samples: int
) -> list[dict[str, Any]]:
    records = []
    for num_tokens, (width, expert_width) in widths.items():
        site = find_moe_sites(make_model(family, width, expert_width))[-1]
        block, path = site.block, site.switch_path_in(site.block)
        gather = ours(family, (width, expert_width), "gather")
        auto = ours(family, (width, expert_width), "auto")
        key = mx.random.key(num_tokens)
        x = evaluated(mx.random.normal((1, num_tokens, width), key=key))

        def run(block: nn.Module, x: mx.array = x) -> None:
            mx.eval(block(x))

        theirs, found = block(x), gather.form.holder(x)
        difference = mx.abs(found - theirs).max() / mx.abs(theirs).max()
        count = min(samples, SAMPLES.get(num_tokens, samples))
        times = in_both_orders(
            {
                "mlx-lm": lambda block=block: run(block),
                "gather": lambda block=gather.form.holder: run(block),
                "auto": lambda block=auto.form.holder: run(block),
            },
            count,
            WARMUP[num_tokens],
        )
        record: dict[str, Any] = {
            "family": family,
            "tokens": num_tokens,
            "width": width,
            "expert_width": expert_width,
            "samples": count,
            "difference": difference.item(),
            "mlx_lm_ms": times["mlx-lm"].median * 1e3,
            "gather": ratio(times["gather"], times["mlx-lm"]).median,
            "auto": ratio(times["auto"], times["mlx-lm"]).median,
        }
        if num_tokens == 1:
            record |= counts(block, path, gather, x)
        records.append(record)
    return records


def decode_steps(model: nn.Module) -> Callable[[], None]:
    """A sample of the embedded model: greedy steps, which are then taken back."""
    caches = make_prompt_cache(model)
    prompt = mx.arange(1, PROMPT + 1)[None]
    first = evaluated(model(prompt, cache=caches)[:, -1].argmax(-1))

    def run() -> None:
        token = first
        for _ in range(STEPS):
            token = evaluated(model(token[None], cache=caches)[:, -1].argmax(-1))
        for cache in caches:
            cache.trim(STEPS)

    return run


def measure_step(samples: int) -> dict[str, Any]:
    """The embedded model's decode step beside mlx-lm's."""
    folder = str(find_model(EMBEDDED_MODEL))
    models = {"mlx-lm": mlx_lm.load(folder)[0]}
    runners: tuple[RunnerName, ...] = ("gather", "auto")
    for runner in runners:
        config = EPConfig(runner=runner)
        models[runner] = mlx_ep.load(folder, config=config)[0]
    arms = {name: decode_steps(model) for name, model in models.items()}
    times = in_both_orders(arms, samples, 2)
    return {
        "model": EMBEDDED_MODEL,
        "samples": samples,
        "mlx_lm_ms": times["mlx-lm"].median * 1e3 / STEPS,
        "gather": ratio(times["gather"], times["mlx-lm"]).median,
        "auto": ratio(times["auto"], times["mlx-lm"]).median,
    }


def counts(
    block: nn.Module, path: tuple[str, ...], state: BlockState, x: mx.array
) -> dict[str, Any]:
    """What does not depend on the machine."""
    both = {"mlx_lm": block, "ours": state.form.holder}
    found: dict[str, Any] = {}
    for name, module in both.items():
        found[f"primitives_{name}"] = primitives(module(x))
        found[f"calls_{name}"] = python_calls(lambda module=module: module(x))
    found["beside_mlx_lm"] = beside_the_experts(block, path, x)
    found["beside_ours"] = beside_our_experts(state, x)
    found["syncs_gather"] = host_syncs(lambda: state.form.holder(x))
    with kernels_as_ops(state):
        found["syncs_metal"] = host_syncs(lambda: state.form.holder(x))
    return found


def targets_of(records: list[dict[str, Any]]) -> list[Target]:
    targets = []
    for record in records:
        name, num_tokens = record["family"], record["tokens"]
        at = f"{name}, T={num_tokens}"
        most = MOST_RATIO[num_tokens]
        targets.append(Target(f"{at}, ours / mlx-lm", record["gather"], most))
        if num_tokens > 1:
            targets.append(Target(f"{at}, auto / mlx-lm", record["auto"], 1.0))
            continue
        more = record["beside_ours"] - record["beside_mlx_lm"]
        what = f"{at}, primitives beside the experts"
        targets.append(Target(what, more, MOST_MORE_PRIMITIVES))
        for runner, most_syncs in (("gather", 1), ("metal", 0)):
            syncs = record[f"syncs_{runner}"]
            targets.append(Target(f"{at}, host syncs, {runner}", syncs, most_syncs))
    return targets


def main() -> int:
    assert __doc__ is not None
    args = arguments(__doc__, samples=40).parse_args()
    print(heading("A MoE layer on one rank beside mlx-lm's"), flush=True)
    widths = QUICK_WIDTHS if args.quick else WIDTHS
    records = [
        record
        for family in FAMILIES
        for record in measure_family(family, widths, args.samples)
    ]
    step = measure_step(args.samples)
    headers = ["family", "T", "D", "F", "mlx-lm, ms", "gather", "auto", "difference"]
    rows = [
        [
            r["family"],
            r["tokens"],
            r["width"],
            r["expert_width"],
            f"{r['mlx_lm_ms']:.2f}",
            f"{r['gather']:.3f}",
            f"{r['auto']:.3f}",
            f"{r['difference']:.0e}",
        ]
        for r in records
    ]
    print("Time over mlx-lm's, medians of neighbouring samples.\n")
    print(markdown_table(headers, rows) + "\n")
    single = [r for r in records if r["tokens"] == 1]
    headers = ["T=1", "mlx-lm", "ours", "beside experts", "calls", "syncs"]
    rows = [
        [
            r["family"],
            r["primitives_mlx_lm"],
            r["primitives_ours"],
            f"{r['beside_mlx_lm']} -> {r['beside_ours']}",
            f"{r['calls_mlx_lm']} -> {r['calls_ours']}",
            f"{r['syncs_gather']} / {r['syncs_metal']}",
        ]
        for r in single
    ]
    print("Primitives; Python calls; host syncs with runner gather / metal.\n")
    print(markdown_table(headers, rows) + "\n")
    print(
        f"A whole decode step of {step['model']}: mlx-lm {step['mlx_lm_ms']:.2f} ms; "
        f"of its time, gather {step['gather']:.3f}, auto {step['auto']:.3f}.\n"
    )
    worst = max(single, key=lambda r: r["gather"])
    figure = (
        f"one layer, T=1, runner gather: at most {worst['gather']:.2f} of mlx-lm's "
        f"time ({worst['family']})"
    )
    targets = targets_of(records) + [
        Target(f"whole step, {runner} / mlx-lm", step[runner], MOST_STEP_RATIO)
        for runner in ("gather", "auto")
    ]
    return finish(args, [*records, step], targets, figure)


if __name__ == "__main__":
    sys.exit(main())
