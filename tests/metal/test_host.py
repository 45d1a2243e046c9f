"""The tool itself: correct kernels pass on every schedule, all bugs are caught.

Over 400 lines, because each seeded bug stands beside the kernel that it is put into.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support import host
from tests.support.host.dropin import traced
from tests.support.host.lint import lint
from tests.support.tiers import require


@pytest.fixture(autouse=True)
def _tier() -> None:
    require("host_metal")


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"

# Histogram and prefix sum of one threadgroup: threadgroup memory, atomics, SIMD scans.
SCAN = f"""
  uint i = thread_index_in_threadgroup;
  uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
  threadgroup atomic_uint histogram[64];
  threadgroup uint part[32], base[64];
  if (i < 64) atomic_store_explicit(&histogram[i], 0u, memory_order_relaxed);
  {BARRIER}
  for (uint n = i; n < NUM_IDS; n += threads_per_threadgroup.x)
    atomic_fetch_add_explicit(&histogram[ids[n]], 1u, memory_order_relaxed);
  {BARRIER}
  uint mine = i < 64 ? atomic_load_explicit(&histogram[i], memory_order_relaxed) : 0u;
  uint before = simd_prefix_exclusive_sum(mine);
  if (lane == 31) part[simd] = before + mine;
  {BARRIER}
  if (simd == 0) {{
    uint sum = lane < simdgroups_per_threadgroup ? part[lane] : 0u;
    part[lane] = simd_prefix_exclusive_sum(sum);
  }}
  {BARRIER}
  if (i < 64) {{ base[i] = before + part[simd]; offsets[i] = base[i]; }}
  if (i < 64) counts[i] = mine;
"""

# dst[i] = src[index[i]] for i < count, four elements a thread.
GATHER = """
  uint column = 4 * thread_position_in_grid.x, row = thread_position_in_grid.y;
  if (row >= uint(count[0])) return;
  for (uint e = column; e < min(column + 4, uint(src_shape[1])); e++)
    dst[row * src_shape[1] + e] = src[index[row] * src_shape[1] + e];
"""


def scan(
    source: str = SCAN, num_ids: int = 1000, **options: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
    ids = np.random.default_rng(0).integers(0, 64, num_ids).astype(np.uint32)
    kernel = host.metal_kernel(
        "scan", ["ids"], ["counts", "offsets"], source, **options
    )
    outputs = kernel(
        inputs=[mx.array(ids)],
        output_shapes=[(64,), (64,)],
        output_dtypes=[mx.uint32, mx.uint32],
        grid=(128, 1, 1),
        threadgroup=(128, 1, 1),
        template=[("NUM_IDS", num_ids)],
    )
    return ids, [np.array(x) for x in outputs]


def gather(
    source: str = GATHER, count: int = 7, rows: int = 9, **options: Any
) -> tuple[mx.array, np.ndarray, mx.array]:
    src = mx.arange(5 * 18).reshape(5, 18).astype(mx.bfloat16)
    index = np.array([4, 0, 3, 3, 1, 2, 0, 1, 4], np.int32)
    kernel = host.metal_kernel(
        "gather", ["src", "index", "count"], ["dst"], source, **options
    )
    (dst,) = kernel(
        inputs=[src, mx.array(index), mx.array([count], mx.int32)],
        output_shapes=[(9, 18)],
        output_dtypes=[mx.bfloat16],
        grid=(5, rows, 1),
        threadgroup=(5, 4, 1),
    )
    return src, index, dst


def small(
    body: str, threads: int = 64, group: int = 64, header: str = "", **options: Any
) -> np.ndarray:
    """`body` with threads i reading the float array a[i] = i and writing o[i]."""
    init_value = options.pop("init_value", None)
    kernel = host.metal_kernel(
        "small",
        ["a"],
        ["o"],
        f"uint i = thread_position_in_grid.x;\n{body}",
        header,
        **options,
    )
    (o,) = kernel(
        inputs=[mx.arange(64).astype(mx.float32)],
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        init_value=init_value,
    )
    return np.array(o)


def without(source: str, piece: str, number: int = 0, instead: str = "") -> str:
    """`source` with the given occurrence of `piece` replaced."""
    parts = source.split(piece)
    assert len(parts) > number + 1
    head, tail = parts[: number + 1], parts[number + 1 :]
    return piece.join(head) + instead + piece.join(tail)


def kinds(caught: pytest.ExceptionInfo[host.KernelError]) -> set[str]:
    return {finding.kind for finding in caught.value.launch.findings}


# ------------------------------------------------------------------ correct kernels


def test_scan(schedule: int) -> None:
    ids, (counts, offsets) = scan(seed=schedule)
    expected = np.bincount(ids, minlength=64)
    assert np.array_equal(counts, expected)
    assert np.array_equal(offsets, np.cumsum(expected) - expected)


def test_gather(schedule: int) -> None:
    seen: list[host.Launch] = []
    src, index, dst = gather(seed=schedule, on_launch=seen.append)
    assert mx.array_equal(dst[:7], src[mx.array(index[:7])])
    assert mx.all(mx.isnan(dst[7:]))  # never written: still the poison
    assert seen[0].traffic["dst"].unwritten == 2 * 18 * 2


def test_traffic_is_counted() -> None:
    seen: list[host.Launch] = []
    gather(on_launch=seen.append)
    traffic = seen[0].traffic
    # 7 rows of 18 bf16, of 5 distinct source rows.
    assert traffic["src"] == host.Traffic(180, 7 * 36, 5 * 36, 0, 0)
    assert traffic["dst"] == host.Traffic(9 * 36, 0, 0, 7 * 36, 2 * 36)
    # every element's store reads the index again; only 7 of 9 entries are ever read
    assert traffic["index"].distinct == 7 * 4


def test_traffic_of_a_byte_read_twice() -> None:
    seen: list[host.Launch] = []
    body = "volatile const device float* p = a; o[i] = p[i / 2] + p[i / 2];"
    small(body, on_launch=seen.append)
    assert seen[0].traffic["a"] == host.Traffic(256, 512, 128, 0, 0)


def test_edge_groups_are_smaller() -> None:
    """Grids count threads: a group at the edge has what is left."""
    source = """
      uint3 p = thread_position_in_grid, n = threads_per_grid;
      uint i = (p.z * n.y + p.y) * n.x + p.x;
      size[i] = threads_per_threadgroup.x * 100 + threads_per_threadgroup.y * 10
        + dispatch_threads_per_threadgroup.x;
      place[i] = thread_index_in_threadgroup + 100 * simdgroup_index_in_threadgroup;
    """
    kernel = host.metal_kernel("ragged", [], ["size", "place"], source)
    size, place = kernel(
        inputs=[],
        output_shapes=[(2, 5, 10)] * 2,
        output_dtypes=[mx.int32] * 2,
        grid=(10, 5, 2),
        threadgroup=(8, 4, 1),
    )
    assert size[0, 0, 0].item() == 848 and size[1, 4, 9].item() == 218
    assert size[0, 0, 9].item() == 248 and place[0, 3, 7].item() == 31


# ------------------------------------------------------------------ seeded bugs


def test_off_by_one_row() -> None:
    with pytest.raises(host.KernelError) as caught:
        gather(without(GATHER, "row >= uint", 0, "row > uint"), count=9, rows=12)
    finding = caught.value.launch.findings[0]
    assert finding.kind == "out-of-bounds" and "'index'" in finding.message
    assert finding.line.endswith(".metal:5"), finding


def test_off_by_one_column() -> None:
    with pytest.raises(host.KernelError) as caught:
        gather(without(GATHER, "e < min", 0, "e <= min"), count=9)
    assert kinds(caught) & {"out-of-bounds", "race"}


def test_negative_index() -> None:
    with pytest.raises(host.KernelError, match="byte offset -"):
        small("o[i] = a[int(i) - 1];")


@pytest.mark.parametrize(
    ("number", "kind"), [(0, "uninitialised-read"), (2, "race"), (3, "race")]
)
def test_missing_barrier(number: int, kind: str, schedule: int) -> None:
    with pytest.raises(host.KernelError) as caught:
        scan(without(SCAN, BARRIER, number), seed=schedule)
    assert kind in kinds(caught)


def test_missing_barrier_between_atomics_shows_in_the_values() -> None:
    """No data race, hence no finding: the comparison with a reference has to tell."""
    ids, (counts, _) = scan(without(SCAN, BARRIER, 1))
    assert not np.array_equal(counts, np.bincount(ids, minlength=64))


def test_barrier_of_the_wrong_memory() -> None:
    with pytest.raises(host.KernelError) as caught:
        scan(SCAN.replace("mem_threadgroup)", "mem_device)"))
    assert "race" in kinds(caught)


def test_return_before_a_barrier() -> None:
    early = without(SCAN, "uint mine", 0, "if (i >= 100) return;\n  uint mine")
    with pytest.raises(host.KernelError) as caught:
        scan(early)
    assert "barrier-divergence" in kinds(caught)


def test_barrier_in_a_branch() -> None:
    body = f"threadgroup float b[64]; b[i] = 0.0f;\nif (i < 32)\n{BARRIER}{BARRIER}"
    with pytest.raises(host.KernelError) as caught:
        small(body + "o[i] = b[i];")
    assert "barrier-divergence" in kinds(caught)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("uninitialised-read", "o[i] += a[i];"),
        ("uninitialised-read", "threadgroup float b[64]; o[i] = b[i] + a[i];"),
        ("race", "o[i / 2] = a[i];"),
        ("race", "threadgroup float b[65]; b[i] = a[i]; o[i] = i ? b[i - 1] : 0.0f;"),
        ("race", "float s = simd_sum(a[i]); o[i / 32] = s;"),  # benign, yet a race
        ("out-of-bounds", "threadgroup float b[64]; b[i + 1] = a[i]; o[i] = 0.0f;"),
        ("out-of-bounds", "float v[4] = {0, 1, 2, 3}; o[i] = v[uint(a[i]) % 5];"),
        ("threadgroup-memory", "threadgroup float b[9000]; b[i] = a[i]; o[i] = b[i];"),
        ("undefined", "uint s = uint(a[i]); o[i] = float(1u << (s + 1));"),
        ("undefined", "int s = int(a[i]); o[i] = float(7 / s);"),
        ("write-to-input", "((device float*)a)[i] = 1.0f; o[i] = 0.0f;"),
        (
            "inactive-lane",
            "float v = a[i]; if (i < 8) v = simd_shuffle(v, 9); o[i] = v;",
        ),
        (
            "fail",
            "float r; if (i < 8) r = simd_sum(a[i]); else "
            "r = simd_sum(ushort(i)); o[i] = r;",
        ),
    ],
)
def test_bug_is_caught(kind: str, body: str) -> None:
    with pytest.raises(host.KernelError) as caught:
        small(body)
    assert kind in kinds(caught), caught.value


def test_output_that_is_not_written() -> None:
    """Not a finding, as it may be agreed upon: it is counted, and reads as NaN."""
    seen: list[host.Launch] = []
    o = small("if (i < 60) o[i] = a[i];", on_launch=seen.append)
    assert seen[0].traffic["o"].unwritten == 4 * 4
    assert np.isnan(o[60:]).all() and not np.isnan(o[:60]).any()


def test_race_between_threadgroups() -> None:
    with pytest.raises(host.KernelError, match="different threadgroups"):
        small("o[i % 32] = a[i];", group=32)


def test_endless_loop() -> None:
    with pytest.raises(host.KernelError) as caught:
        small("volatile int z = 0; while (z == 0) {} o[i] = a[i];", timeout=1)
    assert kinds(caught) == {"timeout"}


def test_lanes_are_ordered_by_a_simdgroup_barrier() -> None:
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    read = "o[i] = i % 32 < 31 ? b[i + 1] : 0.0f;"
    small(f"threadgroup float b[64]; b[i] = a[i];\n{barrier}\n{read}")
    with pytest.raises(host.KernelError) as caught:
        small(f"threadgroup float b[64]; b[i] = a[i];\n{read}")
    assert "race" in kinds(caught)


def test_inputs_have_no_alignment_beyond_the_element() -> None:
    """MLX passes contiguous views with their offset, so vector loads are unsafe."""
    with pytest.raises(host.KernelError) as caught:
        small("o[i] = (*(const device float4*)(a + i / 4 * 4))[i % 4];")
    assert kinds(caught) == {"misaligned"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bfloat h = a[i]; o[i] = h;", "bfloat"),
        ("double d = a[i]; o[i] = d;", "no double"),
        ("o[i] = std::exp(a[i]);", "std::"),
        ("o[i] = a[i]", "expected"),
        ("float4 v = half4(1.0h); o[i] = v.x;", "conver"),
        ("float \u00e4 = a[i]; o[i] = \u00e4;", "ASCII"),
    ],
)
def test_source_that_metal_rejects(body: str, message: str) -> None:
    with pytest.raises(host.CompileError, match=message):
        small(body)


def test_illegal_sizes() -> None:
    with pytest.raises(ValueError, match="1 to 1024"):
        small("o[i] = a[i];", group=2048)


# ------------------------------------------------------------------ language, library


def test_simd_functions() -> None:
    body = """
      float x = a[i];
      uint lane = thread_index_in_simdgroup;
      float r = simd_shuffle_down(x, 3) * (lane + 3 < 32);
      r += simd_prefix_exclusive_sum(x);
      r += 1000.0f * simd_max(x);
      r += simd_shuffle_xor(x, 1);
      r += simd_broadcast(x, 5);
      r += float(popcount(uint(simd_vote::vote_t(simd_ballot(x > 40.0f)))));
      o[i] = r;
    """
    x, lane = np.arange(64, dtype=np.float32).reshape(2, 32), np.arange(32)
    expected = np.where(lane + 3 < 32, np.roll(x, -3, 1), 0) + np.cumsum(x, 1) - x
    expected += 1000 * x.max(1, keepdims=True) + x[:, lane ^ 1] + x[:, 5:6]
    expected += (x > 40).sum(1, keepdims=True)
    assert np.array_equal(small(body).reshape(2, 32), expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["half", "bfloat"])
def test_16_bit_arithmetic_equals_mlx(dtype: mx.Dtype) -> None:
    mx.random.seed(3)
    x = mx.random.normal((4096,)).astype(dtype)
    y = (mx.random.normal((4096,)) * 100).astype(dtype)
    source = """
      uint i = thread_position_in_grid.x;
      sums[i] = x[i] + y[i];
      products[i] = x[i] * y[i];
    """
    kernel = host.metal_kernel("arithmetic", ["x", "y"], ["sums", "products"], source)
    sums, products = kernel(
        inputs=[x, y],
        output_shapes=[x.shape] * 2,
        output_dtypes=[dtype] * 2,
        grid=(4096, 1, 1),
        threadgroup=(256, 1, 1),
    )
    assert mx.array_equal(sums, x + y) and mx.array_equal(products, x * y)


def test_atomic_outputs() -> None:
    kernel = host.metal_kernel(
        "count",
        ["x"],
        ["o"],
        "atomic_fetch_add_explicit(&o[x[thread_position_in_grid.x] % 7], 1u, "
        "memory_order_relaxed);",
        atomic_outputs=True,
    )
    (counts,) = kernel(
        inputs=[mx.arange(1000).astype(mx.uint32)],
        output_shapes=[(7,)],
        output_dtypes=[mx.uint32],
        grid=(1000, 1, 1),
        threadgroup=(64, 1, 1),
        init_value=0,
    )
    assert np.array_equal(np.array(counts), np.bincount(np.arange(1000) % 7))


def test_install_replaces_the_kernel(host_kernels: list[host.Launch]) -> None:
    kernel = mx.fast.metal_kernel(
        name="double",
        input_names=["x"],
        output_names=["o"],
        source="uint i = thread_position_in_grid.x; o[i] = x[i] + T(x_shape[0]);",
    )
    x = mx.arange(12).reshape(3, 4).astype(mx.float16)
    (o,) = kernel(
        inputs=[x],
        template=[("T", x.dtype)],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        grid=(x.size, 1, 1),
        threadgroup=(256, 1, 1),
    )
    assert mx.array_equal(o, x + 3) and host_kernels[0].traffic["o"].unwritten == 0


# ------------------------------------------------------------------ address spaces


@pytest.mark.parametrize(
    ("body", "header", "message"),
    [
        ("threadgroup float b[64]; b[i] = a[i]; o[i] = b[i];", "", None),
        (
            "o[i] = f(a + i);",
            "inline float f(const device float* p) { return *p; }",
            None,
        ),
        ("o[i] = float4(1.0f, a[i], 2.0f, 3.0f).y;", "", None),
        (
            "o[i] = f(a + i);",
            "inline float f(const float* p) { return *p; }",
            "address",
        ),
        (
            "threadgroup float b[64]; device float* p = b; o[i] = p[i];",
            "",
            "cannot init",
        ),
        ("float x[2]; device float* p = x; o[i] = *p + a[i];", "", "cannot initialize"),
        ("o[i] = t[1]; t[0] = 1.0f;", "constant float t[2] = {1.0f, 2.0f};", "const"),
    ],
)
def test_lint(body: str, header: str, message: str | None) -> None:
    source = f"uint i = thread_position_in_grid.x;\n{body}"
    kernel = mx.fast.metal_kernel("small", ["a"], ["o"], source, header + "\n")
    call = {
        "output_shapes": [(64,)],
        "output_dtypes": [mx.float32],
        "grid": (64, 1, 1),
        "threadgroup": (64, 1, 1),
    }
    function, text, *_ = traced(kernel, [mx.zeros((64,))], call)
    diagnostics = lint(function, text)
    if message is None:
        assert diagnostics == ""
    else:
        assert "error" in diagnostics and message in diagnostics
