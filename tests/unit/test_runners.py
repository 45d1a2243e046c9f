"""Every runner, every packing, against float64."""

from __future__ import annotations

import tracemalloc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import SwigluOAI
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchMLP

from mlx_ep import metrics
from mlx_ep.experts import (
    RUNNERS,
    blas_threads,
    expert_weights,
    limit_blas_threads,
    options,
    switch_runner,
)
from mlx_ep.experts import blas as blas_module
from mlx_ep.metrics import Counters
from mlx_ep.rows import Option
from mlx_ep.tune import reference as warmup_reference
from mlx_ep.types import Rows
from tests.support.host_kernels import installed
from tests.support.reference import moe_sum

L = 4
AFFINE = [
    ("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)
]
PACKINGS = [*AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
# Of the largest output. MLX's CPU quantized product sums in the dtype of the rows.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}
SLOTS = {
    "mixed": [[0, 2, -1], [-1, -1, -1], [2, 1, 0], [3, -1, 2], [0, 1, 3]],
    "one row": [[1, -1, 3]],
    "all foreign": [[-1, -1, -1]] * 3,
    "no rows": [],
    "one slot": [[-1, 2, -1]] * 7,
    "a slot twice": [[1, 1, 0], [2, 1, 1]],
}


def slot_ids(kind: str) -> mx.array:
    return mx.array(np.array(SLOTS[kind], np.int32).reshape(-1, 3))


def make_switch(
    width: int = 128,
    expert_width: int = 256,
    *,
    packing: tuple[str, int, int] | None = None,
    dtype: mx.Dtype = mx.float32,
    bias: bool = False,
    kind: type[nn.Module] = SwitchGLU,
    **options: object,
) -> nn.Module:
    mx.random.seed(11)
    switch = kind(width, expert_width, L, bias=bias, **options)
    for module in switch.children().values():
        if bias and "bias" in module:
            module.bias = mx.random.normal(module.bias.shape)
    switch.set_dtype(dtype)
    if packing is not None:
        mode, bits, size = packing
        nn.quantize(switch, size, bits, mode=mode)
    mx.eval(switch.parameters())
    return switch


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def dense(linear: nn.Module, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """The weight and bias of one slot, unpacked by MLX."""
    weight = linear.weight[slot]
    if isinstance(linear, QuantizedSwitchLinear):
        offsets, scale = linear.get("biases"), linear.get("global_scale")
        scales = linear.scales[slot]
        if offsets is not None:
            # MLX rounds to the dtype of the scales, whatever dtype is asked for.
            scales, offsets = (a.astype(mx.float32) for a in (scales, offsets[slot]))
        weight = mx.dequantize(
            weight,
            scales,
            offsets,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
            global_scale=None if scale is None else scale[slot],
            dtype=mx.float32,
        )
    bias = linear.bias[slot] if "bias" in linear else mx.zeros((weight.shape[0],))
    return float64(weight), float64(bias)


def reference(switch: nn.Module, rows: Rows) -> np.ndarray:
    names = [
        n for n in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2") if n in switch
    ]

    def expert(slot: int):
        *first, (down, down_bias) = (dense(switch[name], slot) for name in names)

        def run(x: np.ndarray) -> np.ndarray:
            hidden = [weight @ x + bias for weight, bias in first][::-1]
            arguments = (mx.array(h.astype(np.float32)) for h in hidden)
            if len(hidden) == 2 and type(switch.activation).__name__ == "SwiGLU":
                up, gate = hidden
                between = gate / (1 + np.exp(-gate)) * up
            else:
                between = float64(switch.activation(*arguments))
            return down @ between + down_bias

        return run

    ids = np.array(rows.slot_ids)
    experts = [expert(slot) for slot in range(L)]
    return moe_sum(float64(rows.x), ids, np.array(rows.gates), experts)


def make_rows(ids: mx.array, width: int, dtype: mx.Dtype = mx.float32) -> Rows:
    x = mx.random.normal((ids.shape[0], width), key=mx.random.key(1)).astype(dtype)
    return Rows(x, ids, mx.random.uniform(shape=ids.shape, key=mx.random.key(2)))


@pytest.mark.parametrize(
    "packing", [None, ("affine", 4, 64), ("mxfp4", 4, 32)], ids=str
)
@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
def test_the_warm_up_s_reference_is_right(
    kind: type[nn.Module], packing: tuple[str, int, int] | None
) -> None:
    """What decides at warm-up whether a runner is right, against this file's oracle."""
    switch = make_switch(packing=packing, kind=kind, bias=True)
    ids = mx.array([[0, 1, -1], [2, 0, 1], [-1, 1, 2]], mx.int32)
    rows = make_rows(ids, 128)
    weights = expert_weights(switch)
    assert weights is not None
    got, expected = warmup_reference(weights, 3, rows), reference(switch, rows)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def check(switch: nn.Module, name: str, rows: Rows, tolerance: float) -> None:
    got = switch_runner(switch).runner(name).partial_sum(rows, Counters())
    assert (got.dtype, got.shape) == (mx.float32, rows.x.shape)
    expected = reference(switch, rows)
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p[0]}{p[1]}-{p[2]}")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gather", "blas"])
def test_packings(name: str, dtype: mx.Dtype, packing: tuple[str, int, int]) -> None:
    switch = make_switch(packing=packing, dtype=dtype)
    # blas sums in float32 whatever the rows are.
    tolerance = TOLERANCE[dtype if name == "gather" else mx.float32]
    check(switch, name, make_rows(slot_ids("mixed"), 128, dtype), tolerance)


def test_nvfp4_with_a_global_scale() -> None:
    switch = make_switch()
    for projection in ("gate_proj", "up_proj", "down_proj"):
        old = switch[projection]
        switch[projection] = old.to_quantized(16, 4, mode="nvfp4", global_scale=True)
    assert "global scale" in RUNNERS["gather"].why_not(switch, "cpu")
    check(switch, "blas", make_rows(slot_ids("mixed"), 128), 1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SLOTS)
@pytest.mark.parametrize("name", ["gather", "blas"])
def test_dense_and_routings(name: str, kind: str, dtype: mx.Dtype) -> None:
    """Odd widths: nothing divides them."""
    switch = make_switch(29, 13, dtype=dtype)
    if RUNNERS[name].why_not(switch, "cpu"):
        assert name == "gather" and dtype != mx.float32
        return
    check(switch, name, make_rows(slot_ids(kind), 29, dtype), 1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_16_bit_models_run_on_a_cpu(dtype: mx.Dtype) -> None:
    """MLX's gather_mm raises there."""
    switch = make_switch(29, 13, dtype=dtype)
    runner = switch_runner(switch)
    ids = slot_ids("mixed")
    rows = make_rows(ids, 29, dtype)
    np.testing.assert_allclose(
        np.array(runner.partial_sum(rows, Counters())),
        reference(switch, rows),
        atol=1e-4,
    )
    slots = mx.array([0, 2, 2], mx.int32)
    outputs = runner(rows.x[:3], slots)
    assert outputs.dtype == dtype
    for row, slot in enumerate([0, 2, 2]):
        one = Rows(rows.x[row][None], mx.array([[slot]], mx.int32), mx.ones((1, 1)))
        expected = reference(switch, one)[0]
        np.testing.assert_allclose(float64(outputs[row]), expected, atol=2e-3)


@pytest.mark.parametrize("packing", [None, ("affine", 4, 64)], ids=["dense", "affine4"])
@pytest.mark.parametrize("name", ["gather", "blas"])
@pytest.mark.parametrize("form", ["bias", "gpt-oss", "gelu", "relu2"])
def test_forms(name: str, form: str, packing: tuple[str, int, int] | None) -> None:
    forms = {
        "bias": {"bias": True},
        "gpt-oss": {"bias": True, "activation": SwigluOAI()},
        "gelu": {"kind": SwitchMLP, "bias": True},
        "relu2": {"kind": SwitchMLP, "activation": nn.ReLU2()},
    }
    switch = make_switch(packing=packing, **forms[form])
    rows = make_rows(slot_ids("mixed"), 128)
    # Large enough for the clamp of gpt-oss to matter.
    check(switch, name, rows._replace(x=rows.x * 4), 1e-5)


def test_large_and_small_numbers_overflow_nothing() -> None:
    """exp(-gate) is inf for a gate of -100; silu is then -0, with no warning."""
    switch = make_switch(32, 16)
    rows = make_rows(slot_ids("mixed"), 32)
    check(switch, "blas", rows._replace(x=rows.x * 100), 1e-5)


def test_counters() -> None:
    switch = make_switch(32, 16)
    for name in ("gather", "blas"):
        counters = Counters()
        rows = make_rows(slot_ids("mixed"), 32)
        switch_runner(switch).runner(name).partial_sum(rows, counters)
        assert (counters.layer_calls, counters.pairs_routed) == (1, 15)
        assert counters.pairs_computed == 10


@pytest.mark.requires("host_metal")
def test_kernels_are_counted_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the device knows how many pairs there were; a call does not wait for it."""
    monkeypatch.setattr(metrics, "MOST_UNCOUNTED", 4)
    switch, counters = make_switch(32, 16), Counters()
    rows = make_rows(slot_ids("mixed"), 32)
    for _ in installed(monkeypatch):
        runner = switch_runner(switch).runner("metal")
        for call in range(1, 4):
            runner.partial_sum(rows, counters)
            assert len(counters._uncounted) == call and not counters._counted_pairs
        assert counters.pairs_computed == 30 and not counters._uncounted
        for _ in range(5):  # more than are kept: the older half is counted
            runner.partial_sum(rows, counters)
        assert counters._counted_pairs == 50 and len(counters._uncounted) == 3
        switch_runner(switch).runner("gather").partial_sum(rows, counters)
        assert counters.pairs_computed == 90
        assert (counters.layer_calls, counters.pairs_routed) == (9, 9 * 15)
        runner.partial_sum(rows, counters)
        counters.reset()
        assert (counters.layer_calls, counters.pairs_computed) == (0, 0)


def test_many_rows_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = make_switch(packing=("affine", 4, 64))
    ids = mx.array(np.tile(np.array([[0, 1, 2], [1, 2, -1]], np.int32), (40, 1)))
    rows = make_rows(ids, 128)
    whole = switch_runner(switch).runner("blas").partial_sum(rows, Counters())
    monkeypatch.setattr(blas_module, "SCRATCH_BYTES", 150_000)
    parts = make_switch(packing=("affine", 4, 64))
    runner = switch_runner(parts).runner("blas")
    assert runner.experts.max_rows < 10
    check(parts, "blas", rows, 1e-5)
    np.testing.assert_allclose(
        np.array(whole), np.array(runner.partial_sum(rows, Counters())), atol=1e-5
    )


@pytest.mark.parametrize(
    "packing",
    [pytest.param(("affine", 4, 64), marks=pytest.mark.slow), ("affine", 6, 64)],
    ids=str,
)
def test_scratch_memory_is_bounded(
    packing: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of what NumPy allocates, without the sum that is returned."""
    limit = 4 << 20
    monkeypatch.setattr(blas_module, "SCRATCH_BYTES", limit)
    switch = make_switch(512, 1024, packing=packing)
    ids = mx.array(np.tile(np.array([[0, 1, 2]], np.int32), (3000, 1)))
    rows = make_rows(ids, 512)
    runner = switch_runner(switch).runner("blas")
    mx.eval(rows)
    tracemalloc.start()
    try:
        total = runner.partial_sum(rows, Counters())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    index_bytes = 100 * ids.size  # sorting the pairs
    assert peak - total.nbytes < limit + index_bytes
    # One row at a time would not be bounded memory but a slow program.
    assert runner.experts.max_rows > 50


def test_the_weights_may_be_replaced() -> None:
    switch = make_switch(128, 64)
    rows = make_rows(slot_ids("mixed"), 128)
    check(switch, "blas", rows, 1e-5)
    nn.quantize(switch, 64, 4)
    check(switch, "blas", rows, 1e-5)


def test_a_switch_of_another_form_is_gathered() -> None:
    class Doubled(SwitchGLU):
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            return 2 * super().__call__(x, indices)

    switch = make_switch(32, 16, kind=Doubled)
    assert expert_weights(switch) is None
    possible = options(switch)
    assert possible[Option("gather", "cpu")] == ""
    assert "form" in possible[Option("blas", "cpu")]
    plain = make_switch(32, 16)
    rows = make_rows(slot_ids("mixed"), 32)
    got = switch_runner(switch).partial_sum(rows, Counters())
    expected = 2 * switch_runner(plain).partial_sum(rows, Counters())
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-6)


def test_options_say_why_not() -> None:
    found = {str(o): why for o, why in options(make_switch(29, 13)).items()}
    assert found["gather on cpu"] == found["blas on cpu"] == ""
    assert "through Metal" in found["metal on metal"]
    half = {str(o): why for o, why in options(make_switch(dtype=mx.float16)).items()}
    assert "float32 only" in half["gather on cpu"] and half["blas on cpu"] == ""


@pytest.mark.requires("host_metal")
@pytest.mark.parametrize(
    "packing", [None, ("affine", 4, 32), ("mxfp4", 4, 32)], ids=str
)
def test_the_kernels(
    packing: tuple[str, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with every access checked."""
    switch = make_switch(32, 32, packing=packing, bias=True, activation=SwigluOAI())
    assert RUNNERS["metal"].why_not(switch, "metal") == ""
    for _ in installed(monkeypatch):
        for kind in SLOTS:
            check(switch, "metal", make_rows(slot_ids(kind), 32), 1e-5)
        rows, slots = mx.random.normal((3, 32)), mx.array([0, 1, 1], mx.int32)
        got = switch_runner(switch).runner("metal").slot_outputs(rows, slots)
        expected = switch_runner(switch)(rows, slots)
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-5)


def test_threads_of_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    before = blas_threads()
    if before is None:  # macOS's own BLAS
        assert not limit_blas_threads(1)
        return
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    try:
        assert limit_blas_threads(1) and blas_threads() == 1
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
        assert not limit_blas_threads(2) and blas_threads() == 1  # it is the user's
    finally:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
        limit_blas_threads(before)


def test_why_there_is_no_kernel() -> None:
    why_not = RUNNERS["metal"].why_not
    assert "nvfp4" in why_not(make_switch(packing=("nvfp4", 4, 16)), "metal")
    assert "3 bits" in why_not(make_switch(packing=("affine", 3, 32)), "metal")
    assert "form" in why_not(make_switch(kind=SwitchMLP), "metal")
    assert "no GELU" in why_not(make_switch(activation=nn.GELU()), "metal")
    other = SwigluOAI(limit=9.0)
    assert "no SwigluOAI" in why_not(make_switch(activation=other), "metal")
    assert "widths" in why_not(make_switch(7, 16), "metal")
    mixed = make_switch()
    mixed.up_proj = mixed.up_proj.to_quantized(32, 4)
    assert "but up affine" in why_not(mixed, "metal")
