"""What runs the experts: the default rule, the warm-up, its cache, wrong options."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.experts import RUNNERS, switch_runner
from mlx_ep.experts.blas import BlasRunner
from mlx_ep.experts.table import BACKENDS
from mlx_ep.metrics import Counters
from mlx_ep.rows import Option
from mlx_ep.tune import (
    ExpertsPolicy,
    Measured,
    ModelPolicy,
    Wish,
    default_backend,
    default_option,
    default_strategy,
    measure,
    tune,
)
from mlx_ep.tune.cache import cache_folder, cache_key, read_cache, write_cache
from mlx_ep.types import Rows, TokenCounts
from tests.switches import KERNELS, D, E, F, K, fail, make_layer, make_switch

pytestmark = pytest.mark.usefixtures("own_cache")

tune_module = importlib.import_module("mlx_ep.tune.tune")
GATHER, BLAS = Option("gather", "cpu"), Option("blas", "cpu")
GPU = Option("gather", "metal")


def quantize(switch: nn.Module, bits: int) -> None:
    """Not the down projection, whose width no group size divides."""
    for name in ("gate_proj", "up_proj"):
        switch[name] = switch[name].to_quantized(32, bits)


def run_tune(*switches: nn.Module, wish: Wish = Wish()) -> ModelPolicy:  # noqa: B008
    layers = [make_layer(switch) for switch in switches]
    return tune(layers, E, GroupComm(mx.distributed.init()), wish)


def outputs(switch: nn.Module) -> np.ndarray:
    ids = mx.array([[0, 5], [-1, 3], [2, 1]], mx.int32)
    x = mx.random.normal((3, D), key=mx.random.key(3))
    rows = Rows(x, ids, mx.ones((3, 2)))
    return np.array(switch_runner(switch).partial_sum(rows, Counters()))


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("num_tokens", "row_bytes", "expected"),
    [
        (1, 1 << 30, "cpu"),
        (64, 1 << 30, "cpu"),
        (65, 8192, "cpu"),
        (255, 8192, "cpu"),
        (256, 8192, "metal"),  # 2 MiB
        (319, 8, "cpu"),
        (320, 8, "metal"),
    ],
)
def test_default_backend(num_tokens: int, row_bytes: int, expected: str) -> None:
    assert default_backend(num_tokens, row_bytes) == expected


def test_default_option_takes_no_unmeasured_kernel() -> None:
    everything = [GPU, GATHER, BLAS, KERNELS]
    assert default_option(1, 8192, everything) == BLAS
    assert default_option(2048, 8192, everything) == GPU
    assert default_option(2048, 8192, [GATHER, BLAS]) == BLAS
    assert default_option(1, 8192, [GATHER]) == GATHER
    assert default_option(1, 8192, [KERNELS]) == KERNELS  # it was forced


def test_default_strategy_is_that_of_auto() -> None:
    config = EPConfig(strategy="auto")
    few, many = TokenCounts((1, 1)), TokenCounts((500, 500))
    assert default_strategy(few, 8, "ring", config) == "LowLatency"
    assert default_strategy(many, 1, "ring", config) == "Normal"


# ---------------------------------------------------------------- predictions


def test_times_between_and_beyond_measurements() -> None:
    times = Measured((1, 4, 16), (1.0, 4.0, 10.0))
    values = [times.per_slot(rows) for rows in (1, 2.5, 4, 10, 16, 18)]
    assert values == pytest.approx([1.0, 2.5, 4.0, 7.0, 10.0, 11.0])
    assert times.per_slot(0.5) == 1.0
    assert Measured((2,), (3.0,)).per_slot(4) == 6.0


def test_the_fastest_is_chosen_by_hand() -> None:
    """All 2 experts are visited by every row: m = T on each of 2 ranks' one slot."""
    policy = ExpertsPolicy(
        name="",
        num_experts=2,
        num_ranks=2,
        row_bytes=4,
        possible=(GATHER, BLAS),
        left_out={},
        measured={
            GATHER: Measured((1, 4), (1.0, 4.0)),
            BLAS: Measured((1, 4), (3.0, 3.6)),
        },
    )
    assert policy.predicted(GATHER, 4, 2) == pytest.approx(4.0)
    assert policy.predicted(BLAS, 4, 2) == pytest.approx(3.6)
    assert [policy.choose(rows, 2) for rows in (1, 3, 4, 64)] == [
        GATHER, GATHER, BLAS, BLAS,
    ]  # fmt: skip
    assert policy.crossover(2, BLAS, GATHER) == 4
    assert policy.crossover(2, GATHER, BLAS) is None
    assert policy.choose(0, 2) == GATHER  # a rank without rows


# ---------------------------------------------------------------- the warm-up


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_right_options_are_measured(bits: int | None, dtype: mx.Dtype) -> None:
    switch = make_switch(dtype)
    if bits:
        quantize(switch, bits)
    results = measure(switch, dtype, K, [BLAS])
    assert results[BLAS].left_out == ""
    assert results[BLAS].rows[:2] == (1, 4)
    assert results[BLAS].error < 1e-5
    assert sorted(results[BLAS].seconds) == list(results[BLAS].seconds)


class WrongRunner(BlasRunner):
    """A kernel that is fast and forgets something."""

    broken: Callable[[mx.array], mx.array] = staticmethod(lambda total: total * 1.01)

    def partial_sum(self, rows: Rows, counters: Counters) -> mx.array:
        return type(self).broken(super().partial_sum(rows, counters))


WRONGS = {
    "slightly": (lambda total: total * 1.01, "differs from the reference by"),
    "one column": (lambda total: total.at[:, 0].add(1.0), "differs from the reference"),
    "NaN": (lambda total: total + float("nan"), "differs from the reference by nan"),
    "only many rows": (
        lambda total: total if total.shape[0] < 16 else total * 0,
        "with 16 rows per slot",
    ),
    "fails": (fail, "it failed: .*Unable to build"),
}


@pytest.mark.parametrize("how", WRONGS)
def test_a_wrong_kernel_is_left_out_for_good(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, reason = WRONGS[how]
    monkeypatch.setattr(WrongRunner, "broken", staticmethod(broken))
    monkeypatch.setitem(RUNNERS, "wrong", WrongRunner)
    monkeypatch.setitem(BACKENDS, "wrong", ("cpu",))
    right, switch = make_switch(), make_switch()
    with pytest.warns(UserWarning, match=f"wrong on cpu is left out, .*{reason}"):
        policy = run_tune(switch)
    wrong = Option("wrong", "cpu")
    shape = policy.shapes[0]
    assert wrong not in shape.possible and wrong in shape.left_out
    np.testing.assert_allclose(outputs(switch), outputs(right), atol=1e-6)
    assert "left out: wrong on cpu, because" in policy.explain()

    # The next start does not try it again.
    monkeypatch.setattr(tune_module, "measure", fail)
    again = make_switch()
    with pytest.warns(UserWarning, match="wrong on cpu is left out"):
        assert run_tune(again).shapes[0].left_out == shape.left_out
    # Nor can it be forced.
    with pytest.raises(ValueError, match="Nothing can run the experts"):
        run_tune(again, wish=Wish(runner="wrong"))


def test_layers_of_one_shape_share_a_policy() -> None:
    first, second, other = make_switch(), make_switch(), make_switch()
    quantize(other, 8)
    policy = run_tune(first, second, other)
    assert len(policy.shapes) == 2
    choices = [switch_runner(s).choose for s in (first, second, other)]
    assert choices[0] == choices[1] != choices[2]
    assert policy.explain().count("Experts ") == 2


def test_without_warmup_the_rule_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "measure", fail)
    policy = run_tune(make_switch(), wish=Wish(warmup=False))
    assert policy.shapes[0].measured == {}
    assert policy.shapes[0].choose(1, K) == BLAS
    assert "not measured" in policy.explain()
    assert not cache_folder().exists()


def test_unknown_switches_are_gathered() -> None:
    class Doubled(SwitchGLU):
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            return 2 * super().__call__(x, indices)

    policy = run_tune(Doubled(D, F, E))
    assert policy.shapes[0].possible == (GATHER,)


def test_16_bit_models_are_not_gathered_on_a_cpu() -> None:
    switch = make_switch(mx.bfloat16)
    comm = GroupComm(mx.distributed.init())
    policy = tune([make_layer(switch, mx.bfloat16)], E, comm)
    assert policy.shapes[0].possible == (BLAS,)
    assert "float32 only" in policy.shapes[0].left_out[GATHER]


# ---------------------------------------------------------------- forcing


def test_a_runner_can_be_forced() -> None:
    policy = run_tune(make_switch(), wish=Wish(runner="gather"))
    assert policy.shapes[0].possible == (GATHER,)
    assert "runner gather is forced" in policy.explain()


def test_a_backend_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(
        run_tune(make_switch(), wish=Wish(backend="cpu")).shapes[0].possible
    ) == {
        GATHER,
        BLAS,
    }
    with pytest.raises(ValueError, match=r"backend='metal'.*through Metal"):
        run_tune(make_switch(), wish=Wish(backend="metal"))
    monkeypatch.setenv("MLX_EP_BACKEND", "metal")
    with pytest.raises(ValueError, match="backend='metal'"):
        run_tune(make_switch(), wish=Wish(backend="cpu"))
    monkeypatch.setenv("MLX_EP_BACKEND", "gpu")
    with pytest.raises(ValueError, match="must be cpu, metal or auto; got 'gpu'"):
        run_tune(make_switch())


# ---------------------------------------------------------------- the report


def test_explain_shows_every_option() -> None:
    text = run_tune(make_switch()).explain([1, 256])
    for name in ("gather on cpu", "gather on metal", "blas on cpu", "metal on metal"):
        assert name in text
    assert "measured per slot" in text and "32 x 16, float32, SwiGLU" in text
    # What is chosen for T = 1 and for T = 256: experts, and sums of their outputs.
    assert text.count("*") == 4
    assert "sums of this rank's pairs (runner gather); by the default rule" in text


# ---------------------------------------------------------------- the cache


def test_cache(tmp_path: Path) -> None:
    key, other = cache_key({"width": 1}), cache_key({"width": 2})
    assert read_cache(key) is None
    write_cache(key, {"a": 1})
    assert read_cache(key) == {"a": 1} and read_cache(other) is None
    (file,) = (tmp_path / "mlx_ep" / "experts").iterdir()
    for text in ("{", "[]", json.dumps({"key": other, "results": {}})):
        file.write_text(text)
        assert read_cache(key) is None


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept for the next start"):
        run_tune(make_switch())


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("darwin", "Library/Caches/mlx_ep"), ("linux", ".cache/mlx_ep")],
)
def test_cache_folder(
    platform: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("sys.platform", platform)
    assert cache_folder() == Path.home() / expected
