"""Rows in 8 bits a value: kernels and twins against float64 loops, and bit for bit."""

from __future__ import annotations

from types import ModuleType
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.kernels import metal, ops
from mlx_ep.kernels.records import RowFormat, format_words
from tests.support import host
from tests.support.kernel_reference import E4M3, as_float64, calc_diff, rounded_rows

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# 8: the least; 41: odd, one group of 128; 300: three, the last one begun
WIDTHS = [8, 41, 300]
# Of rows against their exact form, by the rounding to the dtype afterwards.
ROUNDING = {"float32": 1e-7, "float16": 2**-11, "bfloat16": 2**-8}
E4M3_CODES = np.concatenate([-E4M3[:0:-1], E4M3])
forms = pytest.mark.parametrize("form", get_args(RowFormat))


def rows_of(width: int, dtype: str = "float32", num_rows: int = 5) -> mx.array:
    """Rows of a model: sizes differ, a few values stand out, one row is zero."""
    random = np.random.default_rng(width)
    values = random.standard_normal((num_rows, width)) * random.exponential(
        size=(1, width)
    )
    values[0, width // 2] = 300
    values[-1] = 0
    return mx.array(values.astype(np.float32)).astype(DTYPES[dtype])


@forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_there_and_back(
    module: ModuleType, form: RowFormat, dtype: str, width: int
) -> None:
    x = rows_of(width, dtype)
    words = module.quantize_rows(x, form)
    assert words.shape == (5, format_words(width)) and words.dtype == mx.uint32
    rows = module.dequantize_rows(words, form, width, x.dtype)
    assert rows.shape == x.shape and rows.dtype == x.dtype
    expected = rounded_rows(x, form)
    error = np.abs(as_float64(rows) - expected)
    assert (error <= ROUNDING[dtype] * np.abs(expected)).all()
    # What was rounded once stays: rows may be sent on.
    again = module.quantize_rows(rows, form)
    assert mx.array_equal(module.dequantize_rows(again, form, width, x.dtype), rows)


@forms
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_their_twins(kernels: None, form: RowFormat, dtype: str) -> None:
    for width in WIDTHS:
        x = rows_of(width, dtype)
        words = ops.quantize_rows(x, form)
        got = metal.quantize_rows(x, form)
        rows = ops.dequantize_rows(words, form, width, x.dtype)
        back = metal.dequantize_rows(words, form, width, x.dtype)
        if mx.metal.is_available():  # a GPU may divide with another last bit
            assert mx.allclose(back, rows, rtol=2**-7)
        else:
            assert mx.array_equal(got, words) and mx.array_equal(back, rows)


@forms
def test_every_code(module: ModuleType, form: RowFormat) -> None:
    """Every number that a code stands for, and the ties between neighbours."""
    codes = np.arange(-127, 128) if form == "int8" else E4M3_CODES
    ties = (codes[1:] + codes[:-1]) / 2
    for values in (codes, ties):
        # Every group has the largest number, so that all have one scale.
        x = np.zeros((16, 128 if form == "int8" else 32), np.float32)
        x[:, 0] = codes.max()
        x[:, 1:17].flat[: len(values)] = values
        words = module.quantize_rows(mx.array(x), form)
        rows = module.dequantize_rows(words, form, x.shape[1], mx.float32)
        np.testing.assert_array_equal(np.array(rows), rounded_rows(mx.array(x), form))


@forms
def test_what_is_no_number_stays_none(module: ModuleType, form: RowFormat) -> None:
    """NaN and infinity make their group NaN, and no other; next to nothing is zero."""
    x = np.ones((4, 256), np.float32)
    x[0, 3], x[1, 200], x[2, :], x[3, 128:] = np.nan, -np.inf, 2.0**-101, 3e38
    words = module.quantize_rows(mx.array(x), form)
    rows = np.array(module.dequantize_rows(words, form, 256, mx.float32))
    group = 128 if form == "int8" else 32
    assert np.isnan(rows[0, :group]).all() and np.isnan(rows).sum() == 2 * group
    assert np.isnan(rows[1, 256 - (128 if form == "int8" else 64) :]).sum() == group
    assert not rows[2].any() and np.isfinite(rows[3]).all()
    np.testing.assert_allclose(rows[3], x[3], rtol=0.07)


@forms
def test_float16_has_an_end(module: ModuleType, form: RowFormat) -> None:
    """A code may stand for more than 65504, the largest float16."""
    x = mx.array([[65504.0, -65504.0] * 16], mx.float16)
    words = module.quantize_rows(x, form)
    assert mx.array_equal(module.dequantize_rows(words, form, 32, mx.float16), x)


@forms
def test_an_8_bit_form_is_near(form: RowFormat) -> None:
    """The limit that DeepEP sets to its own, against bfloat16."""
    x = mx.random.normal((64, 1024), key=mx.random.key(0)).astype(mx.bfloat16)
    for scale in (1.0, 1e-4, 300.0):
        rows = ops.dequantize_rows(
            ops.quantize_rows(x * scale, form), form, 1024, mx.bfloat16
        )
        assert 0 < calc_diff(x * scale, rows) < 9e-4


@forms
def test_nothing(module: ModuleType, form: RowFormat) -> None:
    words = module.quantize_rows(mx.zeros((0, 40)), form)
    assert words.shape == (0, 11)
    assert module.dequantize_rows(words, form, 40, mx.float16).shape == (0, 40)


@forms
def test_on_schedules(scheduled_kernels: None, form: RowFormat) -> None:
    x = rows_of(700, num_rows=9)
    words = metal.quantize_rows(x, form)
    assert mx.array_equal(words, ops.quantize_rows(x, form))
    rows = metal.dequantize_rows(words, form, 700, mx.float32)
    assert mx.array_equal(rows, ops.dequantize_rows(words, form, 700, mx.float32))


@forms
def test_each_byte_is_moved_once(
    host_kernels: list[host.Launch], form: RowFormat
) -> None:
    x = rows_of(300, "bfloat16")
    metal.dequantize_rows(metal.quantize_rows(x, form), form, 300, mx.bfloat16)
    quantize, dequantize = (launch.traffic for launch in host_kernels)
    assert quantize["x"].read == x.nbytes
    assert quantize["words"].written == 5 * 4 * format_words(300)
    assert not quantize["words"].unwritten and not dequantize["out"].unwritten
    assert dequantize["out"].written == x.nbytes
    assert dequantize["words"].read == 5 * 4 * format_words(300)


def test_too_narrow_and_of_another_width() -> None:
    with pytest.raises(ValueError, match="at least 8; got 7"):
        metal.quantize_rows(mx.zeros((3, 7)), "int8")
    with pytest.raises(
        ValueError, match="Rows of 48 values must have 13 words; got 11"
    ):
        metal.dequantize_rows(mx.zeros((3, 11), mx.uint32), "int8", 48, mx.float32)
