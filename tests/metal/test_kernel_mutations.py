"""Bugs put into the kernels on purpose: the checks or the values must show each."""

from __future__ import annotations

from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.kernels import loader, metal, ops
from mlx_ep.kernels.records import RowFormat
from tests.support import host, kernel_reference
from tests.support.projections import projection

GLU = "expert_glu"
DOWN = "expert_down"
QUANTIZE, DEQUANTIZE = "quantize_rows", "dequantize_rows"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTATIONS = [
    ("pack_rows", "pack_rows.metal", "row < count[0]", "row <= count[0]"),
    ("pack_rows", "pack_rows.metal", "start + RUN <= width", "start <= width"),
    ("pack_rows", "pack_rows.metal", "if (token < 0) return;", ""),
    ("pack_rows", "pack_rows.metal", "to[i] = from[i]", "to[i] = from[start]"),
    ("unpack_sum", "unpack_sum.metal", "if (row < 0) continue;", ""),
    ("unpack_sum", "unpack_sum.metal", "if (column + i < width)", ""),
    ("unpack_sum", "unpack_sum.metal", "gate * values[i]", "values[i]"),
    ("unpack_sum", "unpack_sum.metal", "row < num_rows", "row <= num_rows"),
    ("unpack_sum", "unpack_sum.metal", "row - num_rows", "row"),
    ("route_plan", "route_plan.metal", "pair / K % replicas", "pair % replicas"),
    ("route_plan", "route_plan.metal", "other < slot", "other <= slot"),
    ("route_plan", "route_plan.metal", "pair < num_pairs", "true"),
    ("route_plan", "route_plan.metal", "pair >= num_pairs", "pair > num_pairs"),
    ("route_plan", "route_plan.metal", "int row = next + lane", "int row = next + 32"),
    (QUANTIZE, "quantize_rows.metal", "largest, ushort(8)", "largest, ushort(1)"),
    (QUANTIZE, "quantize_rows.metal", "if (start < width) to", "to"),
    (QUANTIZE, "quantize_rows.metal", "scale, ushort(16)", "scale, ushort(1)"),
    (QUANTIZE, "quantize_rows.metal", "+ 0x1fffffu", ""),
    (QUANTIZE, "quantize_rows.metal", "+ ((size >> 20) & 1u)", ""),
    (QUANTIZE, "quantize_rows.metal", "width - start, values", "4, values"),
    (DEQUANTIZE, "dequantize_rows.metal", "if (start >= width) return;", ""),
    (DEQUANTIZE, "dequantize_rows.metal", "if (start + i < width)", ""),
    (DEQUANTIZE, "dequantize_rows.metal", "(8 * (lane / 8))", "(8 * (lane % 4))"),
    (DEQUANTIZE, "dequantize_rows.metal", "int(code << 24) >> 24", "int(code)"),
    (GLU, "weights.h", "clamp(columns - column, 0, COLUMNS)", "COLUMNS"),
    (GLU, "weights.h", "word >> (BITS * i)", "word >> i"),
    (GLU, "weights.h", "row * (columns / GROUP) + column / GROUP", "row"),
    (GLU, "weights.h", "lane - lane % LANES", "lane % LANES"),
    (GLU, "expert_glu.metal", "lane == 0 && row < rows", "lane == 0"),
    (GLU, "expert_glu.metal", "lane == 0 && row < rows", "row < rows"),
    (GLU, "expert_glu.metal", "bias.x, u + bias.y", "bias.y, u + bias.x"),
    (GLU, "pairs.h", BARRIER, ""),
    (GLU, "pairs.h", "slot < 0 ? -1 : leader", "leader"),
    (DOWN, "expert_down.metal", BARRIER, ""),
    (DOWN, "expert_down.metal", "if (pairs.slots[pair] >= 0)", ""),
    (DOWN, "expert_down.metal", "if (first_row + r >= rows) continue;", ""),
    (
        DOWN,
        "expert_down.metal",
        "vectors[v] = begin + members[v]",
        "vectors[v] = begin",
    ),
    (
        DOWN,
        "expert_down.metal",
        "groups++ % num_simds != simd",
        "groups++ % num_simds == simd",
    ),
]


def launch_and_compare(name: str) -> bool:
    """Runs a kernel on one awkward case; whether its values are right."""
    ids = np.array(
        [[3, 0, -1], [3, -1, 1], [-1, 3, -1], [3, 2, 1], [4, 0, 2]], np.int32
    )
    key = mx.random.key(0)
    x = mx.random.normal((5, 96), key=key)
    gates = mx.random.uniform(shape=ids.shape, key=key)
    if name == "route_plan":
        first = np.array([0, 0, 1, 1, 2], np.int32)
        slots = np.arange(5, dtype=np.int32)
        # Two replicas of each expert, the second one where the next expert is.
        columns = [np.stack([m, np.roll(m, -1)], axis=1) for m in (first, slots)]
        maps = [mx.array(m) for m in columns]
        got, expected = (
            kernel_reference.as_lists(
                module.route_plan(mx.array(ids), *maps, num_ranks=3, num_slots=5)
            )
            for module in (metal, ops)
        )
        return got == expected
    if name == "pack_rows":
        x = x[:, :23]
        tokens, count = mx.array([4, 1, 0, 2, 999], mx.int32), mx.array([4], mx.int32)
        packed = metal.pack_rows(x, tokens, count)
        return mx.array_equal(packed[:4], x[tokens[:4]]).item()
    if name in (QUANTIZE, DEQUANTIZE):
        x = mx.concatenate([x, x * 1.8, x], axis=1)[:, :261]
        x = mx.round(64 * x) / 64  # some are half way between two codes
        is_right = True
        for form in get_args(RowFormat):
            words = ops.quantize_rows(x, form)
            rows = ops.dequantize_rows(words, form, 261, mx.bfloat16)
            if name == QUANTIZE:
                got, expected = metal.quantize_rows(x, form), words
            else:
                got = metal.dequantize_rows(words, form, 261, mx.bfloat16)
                expected = rows
            is_right &= mx.array_equal(got, expected).item()
        return is_right
    if name == "unpack_sum":
        # Ids from 3 on are rows that stayed here, in another dtype.
        rows, local = x[:3, :21].astype(mx.bfloat16), x[3:, :21]
        both = mx.concatenate([rows.astype(mx.float32), local])
        return close(
            metal.unpack_sum(rows, mx.array(ids), gates, local, dtype=mx.float32),
            kernel_reference.unpack_sum(both, ids, gates),
        )
    if name == GLU:
        gate, up = (
            projection("affine4-32", 5, 9, 96, bias=True, seed=i) for i in (1, 2)
        )
        got = metal.expert_glu(x, mx.array(ids), gate, up)
        got = mx.where(mx.array(ids >= 0)[..., None], got, 0.0)
        return close(got, kernel_reference.expert_glu(x, ids, gate, up, "swiglu"))
    down = projection("affine4-32", 5, 9, 96, bias=True)
    hidden = mx.random.normal((*ids.shape, 96), key=key)
    return close(
        metal.expert_down(hidden, mx.array(ids), gates, down),
        kernel_reference.expert_down(hidden, ids, gates, down),
    )


def close(got: mx.array, expected: np.ndarray) -> bool:
    return np.allclose(kernel_reference.as_float64(got), expected, rtol=1e-5, atol=1e-5)


NAMES = ["pack_rows", "unpack_sum", "route_plan", GLU, DOWN, QUANTIZE, DEQUANTIZE]


@pytest.mark.parametrize("name", NAMES)
def test_unchanged_kernels_pass(host_kernels: list[host.Launch], name: str) -> None:
    assert launch_and_compare(name)


@pytest.mark.parametrize(
    ("name", "file", "old", "new"), MUTATIONS, ids=[f"{m[0]}-{m[2]}" for m in MUTATIONS]
)
def test_bug_shows(
    host_kernels: list[host.Launch],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    file: str,
    old: str,
    new: str,
) -> None:
    original = loader.source

    def mutated(which: str) -> str:
        text = original(which)
        assert which != file or old in text, "the kernel has changed: adapt this test"
        return text.replace(old, new) if which == file else text

    monkeypatch.setattr(loader, "source", mutated)
    loader.forget_kernels()
    try:
        assert not launch_and_compare(name)
    except host.KernelError:
        pass
    finally:
        host_kernels.clear()  # a bug need not be spotless
