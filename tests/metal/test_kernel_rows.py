"""pack_rows and unpack_sum: the kernels and their twins against float64 loops."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.kernels import metal, ops
from tests.support import host, kernel_reference

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# 8: the least; 41: odd; 1024: one segment in 16 bits; 1037: a second one, barely begun
WIDTHS = [8, 41, 1024, 1037]
# of one rounding to the dtype, relative to the largest value
ROUNDING = {mx.float32: 1e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    return mx.array(values.astype(np.float32)).astype(dtype)


def int32(values: object) -> mx.array:
    return mx.array(np.array(values, np.int32))


# ------------------------------------------------------------------ pack_rows


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_pack(module: ModuleType, dtype: mx.Dtype, width: int) -> None:
    x = normal(5, width, dtype=dtype)
    tokens = int32([4, 0, 0, 3, 1, 2, -1, -1])
    packed = module.pack_rows(x, tokens, int32([6]))
    assert packed.shape == (8, width) and packed.dtype == dtype
    assert mx.array_equal(packed[:6], x[tokens[:6]])


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_pack_counts(module: ModuleType, count: int) -> None:
    """From nothing to the capacity."""
    x, tokens = normal(1, 48), int32([0] * 9)
    packed = module.pack_rows(x, tokens, int32([count]))
    assert mx.array_equal(packed[:count], mx.broadcast_to(x, (count, 48)))


def test_pack_on_schedules(scheduled_kernels: None) -> None:
    x, tokens = normal(7, 2100), int32([6, 1, 1, 0, 5])
    packed = metal.pack_rows(x, tokens, int32([5]))
    assert mx.array_equal(packed, x[tokens])


def test_pack_nothing(module: ModuleType) -> None:
    empty = module.pack_rows(normal(0, 16), int32([]), int32([0]))
    assert empty.shape == (0, 16)
    assert module.pack_rows(normal(0, 16), int32([-1]), int32([0])).shape == (1, 16)


def test_pack_takes_views(kernels: None) -> None:
    """A contiguous view starts on an element, not on 16 bytes."""
    x = mx.arange(1 + 3 * 40).astype(mx.float16)[1:].reshape(3, 40)
    packed = metal.pack_rows(x, int32([2, 0]), int32([2]))
    assert mx.array_equal(packed, x[int32([2, 0])])


def test_pack_stops_at_the_count(host_kernels: list[host.Launch]) -> None:
    x = normal(4, 1100)
    metal.pack_rows(x, int32([3, 2, 1, 0, 7777, 7777]), int32([4]))
    traffic = host_kernels[0].traffic
    assert traffic["packed"].unwritten == 2 * 1100 * 4
    assert traffic["x"].read == traffic["packed"].written == 4 * 1100 * 4


# ------------------------------------------------------------------ unpack_sum


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_unpack(module: ModuleType, dtype: mx.Dtype, width: int) -> None:
    rows = normal(6, width, dtype=dtype)
    row_ids = np.array([[0, 5, -1], [-1, -1, -1], [2, 2, 1], [-1, 4, -1]], np.int32)
    gates = mx.random.uniform(shape=row_ids.shape, key=mx.random.key(0))
    out = module.unpack_sum(rows, mx.array(row_ids), gates)
    assert out.dtype == dtype
    expected = kernel_reference.unpack_sum(rows, row_ids, gates)
    limit = ROUNDING[dtype] * np.abs(expected).max()
    assert np.abs(kernel_reference.as_float64(out) - expected).max() <= limit
    assert mx.all(out[1] == 0)


@pytest.mark.parametrize("choices", [1, 32, 33])
def test_unpack_choices(module: ModuleType, choices: int) -> None:
    """More choices than the 32 that the lanes hold at a time."""
    random = np.random.default_rng(choices)
    row_ids = random.integers(-1, 9, (3, choices)).astype(np.int32)
    rows, gates = normal(9, 24), normal(3, choices)
    out = module.unpack_sum(rows, mx.array(row_ids), gates)
    expected = kernel_reference.unpack_sum(rows, row_ids, gates)
    assert np.allclose(kernel_reference.as_float64(out), expected, rtol=0, atol=2e-5)


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_unpack_reads_two_sources(
    module: ModuleType, dtype: mx.Dtype, width: int
) -> None:
    """Rows that came back, and behind them float32 ones that never left."""
    rows, local = normal(4, width, dtype=dtype), normal(2, width)
    row_ids = np.array([[0, 5, 3], [-1, 4, -1], [4, 2, 1]], np.int32)
    gates = mx.random.uniform(shape=row_ids.shape, key=mx.random.key(0))
    both = mx.concatenate([rows.astype(mx.float32), local])
    expected = kernel_reference.unpack_sum(both, row_ids, gates)
    arguments = rows, mx.array(row_ids), gates, local
    out = module.unpack_sum(*arguments, dtype=mx.float32)
    assert out.dtype == mx.float32
    assert np.abs(np.array(out) - expected).max() <= 1e-6 * np.abs(expected).max()
    rounded = module.unpack_sum(*arguments)
    assert rounded.dtype == dtype
    assert mx.array_equal(rounded, out.astype(dtype))


@pytest.mark.parametrize("source", ["rows", "local"])
def test_unpack_with_one_source_empty(module: ModuleType, source: str) -> None:
    full, row_ids, gates = normal(3, 24), int32([[2, 0], [-1, 1]]), normal(2, 2)
    empty = mx.zeros((0, 24), mx.float16 if source == "local" else mx.float32)
    rows, local = (full, empty) if source == "rows" else (empty, full)
    out = module.unpack_sum(rows, row_ids, gates, local, dtype=mx.float32)
    expected = kernel_reference.unpack_sum(full, np.array(row_ids), gates)
    assert np.allclose(np.array(out), expected, atol=1e-6)


def test_unpack_on_schedules(scheduled_kernels: None) -> None:
    rows, gates = normal(9, 2100), normal(5, 2)
    row_ids = int32([[0, 8], [1, -1], [-1, 7], [3, 3], [2, 4]])
    out = metal.unpack_sum(rows, row_ids, gates)
    assert mx.allclose(out, ops.unpack_sum(rows, row_ids, gates), atol=1e-6)


def test_unpack_equals_its_twin(kernels: None) -> None:
    """The same order of the same float32 operations."""
    rows = normal(9, 100, dtype=mx.bfloat16)
    row_ids = int32(np.random.default_rng(5).integers(-1, 9, (6, 4)))
    gates = normal(6, 4)
    got = metal.unpack_sum(rows, row_ids, gates)
    expected = ops.unpack_sum(rows, row_ids, gates)
    # A GPU may fuse multiply and add, which can move a result across a rounding.
    difference = mx.abs(got.astype(mx.float32) - expected.astype(mx.float32))
    assert mx.all(difference <= 2**-7 * mx.abs(expected.astype(mx.float32)) + 1e-6)
    if not mx.metal.is_available():
        assert mx.array_equal(got, expected)


def test_unpack_nothing(module: ModuleType) -> None:
    none = int32([[-1], [-1]])
    assert mx.all(module.unpack_sum(normal(0, 16), none, normal(2, 1)) == 0)
    nobody = mx.zeros((0, 2))
    assert module.unpack_sum(normal(3, 16), int32(nobody), nobody).shape == (0, 16)


def test_unpack_reads_each_row_once(host_kernels: list[host.Launch]) -> None:
    rows, row_ids = normal(6, 1100), int32([[0, 1], [2, 3], [-1, 5]])
    metal.unpack_sum(rows, row_ids, normal(3, 2))
    traffic = host_kernels[0].traffic
    assert traffic["rows"].read == traffic["rows"].distinct == 5 * 1100 * 4
    assert traffic["out"].written == 3 * 1100 * 4 and not traffic["out"].unwritten


def test_unpack_copies_neither_source(host_kernels: list[host.Launch]) -> None:
    """Both are read where they are, and float32 sums are not rounded on the way."""
    rows, local = normal(4, 1100, dtype=mx.bfloat16), normal(2, 1100)
    row_ids = int32([[0, 4], [5, 3], [-1, -1]])
    metal.unpack_sum(rows, row_ids, normal(3, 2), local, dtype=mx.float32)
    (launch,) = host_kernels
    assert launch.traffic["rows"].read == 2 * 1100 * 2
    assert launch.traffic["local"].read == 2 * 1100 * 4
    assert launch.traffic["out"].written == 3 * 1100 * 4


def test_too_narrow() -> None:
    with pytest.raises(ValueError, match="at least 8; got 7"):
        metal.pack_rows(normal(3, 7), int32([0]), int32([1]))
    with pytest.raises(ValueError, match="at least 8; got 7"):
        metal.unpack_sum(normal(3, 7), int32([[0]]), normal(1, 1))
