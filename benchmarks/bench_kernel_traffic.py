"""How many bytes do the Metal kernels move, against the least they could?

Each kernel runs on the CPU (tests/support/host), which counts every byte that its
source reads or writes, per buffer. Counts are exact and the same on every run, so one
sample is enough. They are not measured on a GPU: caches, which serve a byte that is
read again, and the coalescing of lanes do not exist here.

What counts as the least:
- movement (pack_rows, unpack_sum, and rows in 8 bits a value and back): every row read
  once, every row written once, and the ids and gates. A token that goes to several
  ranks is a row of each. Sums of two sources are those of an exchange: rows that came
  back, and those that stayed.
- parameters (weights, scales, offsets, biases): those of the slots that the tokens
  visit, once each, however many tokens share them.
Activations (x, hidden) are read again by every block of output rows, by design, from
caches; for them the table says how many output rows one read serves.

Over 400 lines, because the cases of each kernel, what is the least for them and the
tables that say it are read together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.harness import Target, arguments, finish, heading
from mlx_ep.kernels import Activation, Projection, loader, metal, ops
from mlx_ep.metrics import markdown_table
from tests.support import host
from tests.support.projections import projection

MOVEMENT_LIMIT = 1.05
ONE_TOKEN_LIMIT = 1.0
SHARED_LIMIT = 1.25  # of the distinct experts' bytes, for several tokens
ROWS_PER_READ = 4.0

Record = dict[str, Any]


@dataclass(frozen=True)
class Movement:
    """Tokens sent to ranks and back."""

    name: str
    num_tokens: int
    width: int
    dtype: mx.Dtype
    per_token: int = 8
    num_experts: int = 128
    num_ranks: int = 4


@dataclass(frozen=True)
class Experts:
    """Decode on one of two ranks, which holds half of the experts."""

    name: str
    num_tokens: int
    packing: str
    width: int
    rows: int
    num_slots: int
    per_token: int
    bias: bool = False
    activation: Activation = "swiglu"


# Widths of Qwen3-30B-A3B, gpt-oss-20b and OLMoE, with fewer experts than these have:
# a slot that nobody visits adds nothing but memory.
SHAPES: list[dict[str, Any]] = [
    {"packing": "affine4-64", "width": 2048, "rows": 768, "per_token": 8},
    {"packing": "affine8-64", "width": 2048, "rows": 768, "per_token": 8},
    {
        "packing": "mxfp4",
        "width": 2880,
        "rows": 2880,
        "per_token": 4,
        "bias": True,
        "activation": "clamped_swiglu",
    },
    {"packing": "bfloat16", "width": 2048, "rows": 1024, "per_token": 8},
]
QUICK_SHAPES: list[dict[str, Any]] = [
    {"packing": "affine4-64", "width": 512, "rows": 192, "per_token": 8},
    {"packing": "mxfp4", "width": 352, "rows": 352, "per_token": 4, "bias": True},
    {"packing": "bfloat16", "width": 256, "rows": 128, "per_token": 8},
]


def movement_cases(quick: bool) -> list[Movement]:
    sizes = [(1, 2048), (8, 512)] if quick else [(1, 2048), (8, 2880), (64, 2048)]
    return [
        Movement(f"T={tokens} D={width} {_name(dtype)}", tokens, width, dtype)
        for tokens, width in sizes
        for dtype in (mx.bfloat16, mx.float32)
    ]


def expert_cases(quick: bool) -> list[Experts]:
    return [
        Experts(
            name=f"T={tokens} {shape['packing']} D={shape['width']} F={shape['rows']}",
            num_tokens=tokens,
            num_slots=8 if quick else 12,
            **shape,
        )
        for shape in (QUICK_SHAPES if quick else SHAPES)
        for tokens in (1, 8)
    ]


# ---------------------------------------------------------------- running


def run_movement(case: Movement, launches: list[host.Launch]) -> list[Record]:
    """The plan, the rows that leave, and the sums of what comes back, two ways."""
    ids = mx.array(top_k(case.num_tokens, case.num_experts, case.per_token))
    ranks = np.arange(case.num_experts) * case.num_ranks // case.num_experts
    maps = [mx.array(ranks.astype(np.int32))[:, None]]
    maps.append(mx.arange(case.num_experts).astype(mx.int32)[:, None])
    sizes = {"num_ranks": case.num_ranks, "num_slots": case.num_experts}
    plan = metal.route_plan(ids, *maps, **sizes)
    expected = ops.route_plan(ids, *maps, **sizes)
    assert all(mx.array_equal(*pair) for pair in zip(plan, expected))
    key = mx.random.key(0)
    x = mx.random.normal((case.num_tokens, case.width), key=key).astype(case.dtype)
    count = plan.rank_offsets[-1:]
    num_rows = count.item()
    rows = metal.pack_rows(x, plan.row_tokens, count)
    assert mx.array_equal(rows[:num_rows], x[plan.row_tokens[:num_rows]])
    gates = mx.random.uniform(shape=plan.token_rows.shape, key=key)
    out = metal.unpack_sum(rows, plan.token_rows, gates)
    assert mx.allclose(out, ops.unpack_sum(rows, plan.token_rows, gates), atol=0.05)
    # As an exchange adds: the last rank's sums are this one's own, float32, and stayed.
    local = mx.random.normal((case.num_tokens, case.width), key=key)
    places = rows.shape[0] + mx.arange(case.num_tokens)[:, None]
    row_ids = mx.concatenate([plan.token_rows[:, :-1], places], axis=1)
    both = rows, row_ids.astype(mx.int32), gates, local
    total = metal.unpack_sum(*both, dtype=mx.float32)
    assert mx.allclose(total, ops.unpack_sum(*both, dtype=mx.float32), atol=1e-4)
    words = metal.quantize_rows(x, "mxfp8")
    back = metal.dequantize_rows(words, "mxfp8", case.width, x.dtype)
    assert mx.array_equal(words, ops.quantize_rows(x, "mxfp8"))
    row = case.width * case.dtype.size
    num_back = int((plan.token_rows[:, :-1] >= 0).sum().item())
    inputs = {"expert_ids": ids, "expert_ranks": maps[0], "expert_slots": maps[1]}
    arrays = inputs | plan._asdict()
    least = {
        "route_plan": {name: array.nbytes for name, array in arrays.items()},
        "pack_rows": {
            "x": num_rows * row,
            "row_tokens": num_rows * 4,
            "count": 4,
            "packed": num_rows * row,
        },
        "unpack_sum": {
            "rows": num_rows * row,
            "row_ids": plan.token_rows.nbytes,
            "gates": gates.nbytes,
            "out": case.num_tokens * row,
        },
        "unpack_sum of two sources": {
            "rows": num_back * row,
            "local": local.nbytes,
            "row_ids": row_ids.nbytes,
            "gates": gates.nbytes,
            "out": total.nbytes,
        },
        "quantize_rows": {"x": x.nbytes, "words": words.nbytes},
        "dequantize_rows": {"words": words.nbytes, "widths": 4, "out": back.nbytes},
    }
    records = []
    for (kernel, sizes_of), launch in zip(least.items(), launches[-6:], strict=True):
        group = "plan" if kernel == "route_plan" else "movement"
        records += [
            record(case.name, kernel, group, buffer, launch.traffic[buffer], size)
            for buffer, size in sizes_of.items()
        ]
    return records


def run_experts(case: Experts, launches: list[host.Launch]) -> list[Record]:
    ids = top_k(case.num_tokens, 2 * case.num_slots, case.per_token)
    ids = np.where(ids < case.num_slots, ids, -1).astype(np.int32)
    gate, up, down = (
        projection(case.packing, case.num_slots, *shape, bias=case.bias, seed=seed)
        for seed, shape in enumerate(
            [(case.rows, case.width)] * 2 + [(case.width, case.rows)]
        )
    )
    key = mx.random.key(0)
    x = mx.random.normal((case.num_tokens, case.width), key=key).astype(mx.bfloat16)
    slot_ids, gates = mx.array(ids), mx.random.uniform(shape=ids.shape, key=key)
    hidden = metal.expert_glu(x, slot_ids, gate, up, case.activation)
    out = metal.expert_down(hidden, slot_ids, gates, down)
    twin = ops.expert_glu(x, slot_ids, gate, up, case.activation)
    assert mx.allclose(
        out, ops.expert_down(twin, slot_ids, gates, down), rtol=1e-4, atol=1e-4
    )
    glu, last = (launch.traffic for launch in launches[-2:])
    visited = len(set(ids[ids >= 0].tolist()))
    pairs = int((ids >= 0).sum())
    records = []
    for kernel, traffic, projections in (
        ("expert_glu", glu, {"gate": gate, "up": up}),
        ("expert_down", last, {"down": down}),
    ):
        for name, of in projections.items():
            for part, size in bytes_per_slot(of).items():
                buffer = f"{name}_{part}"
                moved = traffic[buffer]
                found = record(
                    case.name, kernel, "parameters", buffer, moved, visited * size
                )
                records.append(found)
        # Reads if every output row of every pair read its vector for itself.
        vector, rows, size = (
            ("x", 2 * case.rows * case.width, 2)
            if kernel == "expert_glu"
            else ("hidden", case.width * case.rows, 4)
        )
        found = record(case.name, kernel, "activations", vector, traffic[vector], None)
        found["rows_per_read"] = pairs * rows * size / traffic[vector].read
        records.append(found)
        written = "hidden" if kernel == "expert_glu" else "out"
        least = pairs * case.rows * 4 if kernel == "expert_glu" else out.nbytes
        records.append(
            record(case.name, kernel, "results", written, traffic[written], least)
        )
        small = ("slot_ids",) if kernel == "expert_glu" else ("slot_ids", "gates")
        records += [
            record(case.name, kernel, "routing", buffer, traffic[buffer], None)
            for buffer in small
        ]
    return records


def top_k(num_tokens: int, num_experts: int, per_token: int) -> np.ndarray:
    random = np.random.default_rng(num_tokens)
    rows = [random.permutation(num_experts)[:per_token] for _ in range(num_tokens)]
    return np.array(rows, np.int32)


def bytes_per_slot(projection: Projection) -> dict[str, int]:
    parts = {
        name: getattr(projection, name)
        for name in ("weight", "scales", "offsets", "bias")
    }
    return {
        name: part.nbytes // projection.num_slots
        for name, part in parts.items()
        if part is not None
    }


def record(
    case: str,
    kernel: str,
    group: str,
    buffer: str,
    traffic: host.Traffic,
    least: int | None,
) -> Record:
    return {
        "case": case,
        "kernel": kernel,
        "group": group,
        "buffer": buffer,
        "least": least,
        "read": traffic.read,
        "distinct": traffic.distinct,
        "written": traffic.written,
    }


# ---------------------------------------------------------------- reporting


def totals(records: list[Record], group: str) -> dict[tuple[str, str], Record]:
    """Sums over the buffers of one group, per kernel and case."""
    sums: dict[tuple[str, str], Record] = {}
    for r in (r for r in records if r["group"] == group):
        into = sums.setdefault(
            (r["kernel"], r["case"]), {"least": 0, "moved": 0, "distinct": 0}
        )
        into["least"] += r["least"] or 0
        into["moved"] += r["read"] + r["written"]
        into["distinct"] += r["distinct"]
        into["rows_per_read"] = r.get("rows_per_read")
    for into in sums.values():
        into["ratio"] = into["moved"] / into["least"] if into["least"] else None
    return sums


def report(records: list[Record]) -> tuple[list[Target], str]:
    movement = totals(records, "movement")
    parameters = totals(records, "parameters")
    activations = totals(records, "activations")
    routing, results = totals(records, "routing"), totals(records, "results")
    print("## Movement\n")
    print(
        "All buffers, ids and gates included. A token that goes to several ranks is a\n"
        "row of each, and is read for each of them.\n"
    )
    headers = ["kernel", "case", "least, bytes", "moved, bytes", "moved / least"]
    rows = [
        [kernel, case, r["least"], r["moved"], f"{r['ratio']:.4f}"]
        for (kernel, case), r in sorted(movement.items())
    ]
    print(markdown_table(headers, rows) + "\n")
    plans = totals(records, "plan")
    print("## Route plan\n")
    print(
        "Each slot and each rank has a SIMD group that reads all ids twice, so that\n"
        "nothing is exchanged between groups; ids are small, and caches serve them.\n"
        "No target: the rows that it plans are what has to be moved.\n"
    )
    headers = ["case", "least, bytes", "moved, bytes", "moved / least"]
    rows = [
        [case, r["least"], r["moved"], f"{r['ratio']:.1f}"]
        for (_, case), r in sorted(plans.items())
    ]
    print(markdown_table(headers, rows) + "\n")
    print("## Decode experts\n")
    print(
        "Half of the slots that tokens choose are another rank's. `parameters` are\n"
        "weights, scales, offsets and biases; `other slots` are bytes read of slots\n"
        "that no token of this rank visits; `rows per read` is how many output rows a\n"
        "read activation serves; `routing` are bytes of slot ids and gates read.\n"
    )
    headers = [
        "kernel", "case", "parameters, least", "parameters, read", "read / least",
        "other slots", "rows per read", "activations read", "results written",
        "routing",
    ]  # fmt: skip
    rows = []
    for (kernel, case), r in sorted(parameters.items()):
        key = (kernel, case)
        rows.append(
            [
                kernel,
                case,
                r["least"],
                r["moved"],
                f"{r['ratio']:.4f}",
                max(0, r["distinct"] - r["least"]),
                f"{activations[key]['rows_per_read']:.2f}",
                activations[key]["moved"],
                results[key]["moved"],
                routing[key]["moved"],
            ]
        )
    print(markdown_table(headers, rows) + "\n")
    print("## Targets\n")
    targets = [
        highest(f"{kernel}, moved / least", movement, kernel, "", MOVEMENT_LIMIT)
        for kernel in (
            "pack_rows",
            "unpack_sum",
            "unpack_sum of two sources",
            "quantize_rows",
            "dequantize_rows",
        )
    ]
    for kernel in ("expert_glu", "expert_down"):
        for tokens, limit in (("T=1 ", ONE_TOKEN_LIMIT), ("T=8 ", SHARED_LIMIT)):
            name = f"{kernel}, {tokens.strip()}, parameters read / least"
            targets.append(highest(name, parameters, kernel, tokens, limit))
        other = max(
            r["distinct"] - r["least"]
            for (name, _), r in parameters.items()
            if name == kernel
        )
        targets.append(Target(f"{kernel}, bytes read of other slots", other, 0))
        fewest = min(
            r["rows_per_read"] for (name, _), r in activations.items() if name == kernel
        )
        targets.append(
            Target(f"{kernel}, output rows per read", fewest, ROWS_PER_READ, True)
        )
    worst = max(r["ratio"] for r in (movement | parameters).values())
    figure = (
        f"Counted in host execution, not measured on a GPU: at most {worst:.3f} x the "
        f"least bytes, over {len(movement)} cases of movement and {len(parameters)} of "
        "decode experts."
    )
    return targets, figure


def highest(
    name: str, sums: dict[tuple[str, str], Record], kernel: str, case: str, limit: float
) -> Target:
    ratios = [
        r["ratio"]
        for (of, which), r in sums.items()
        if of == kernel and which.startswith(case)
    ]
    return Target(name, max(ratios), limit)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "", samples=1)
    args = parser.parse_args()
    if reason := host.missing():
        parser.error(reason)
    return args


def main() -> int:
    args = parse()
    print(heading("Bytes that the Metal kernels move"))
    print(
        "Counted in host execution: the kernels ran on the CPU, which counted the\n"
        "bytes that their source reads and writes. Not measured on a GPU.\n"
    )
    records: list[Record] = []
    with pytest.MonkeyPatch.context() as patch:
        launches = host.install(patch, timeout=600)
        loader.forget_kernels()
        runs: list[tuple[Callable[..., list[Record]], Movement | Experts]] = [
            *((run_movement, case) for case in movement_cases(args.quick)),
            *((run_experts, case) for case in expert_cases(args.quick)),
        ]
        for run, case in runs:
            records += run(case, launches)
            launches.clear()
        loader.forget_kernels()
    targets, figure = report(records)
    return finish(args, records, targets, figure)


if __name__ == "__main__":
    raise SystemExit(main())
