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
from mlx_ep.experts import RUNNERS, switch_runner
from mlx_ep.experts.blas import BlasRunner
from mlx_ep.experts.gather import GatherRunner
from mlx_ep.experts.table import BACKENDS
from mlx_ep.metrics import Counters
from mlx_ep.rows import Option
from mlx_ep.tune import (
    Choice,
    ExpertsProblem,
    Finding,
    ModelPolicy,
    Wish,
    cache,
    default_backend,
    default_option,
    measure,
    tune,
)
from mlx_ep.tune.cache import cache_folder, cache_key, read_findings, write_findings
from mlx_ep.types import CompleteRows, Rows
from tests.support.switches import KERNELS, D, E, F, fail, make_layer, make_switch

pytestmark = pytest.mark.usefixtures("own_cache")

agree_module = importlib.import_module("mlx_ep.tune.agree")
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


# ---------------------------------------------------------------- predictions


def test_times_between_and_beyond_measurements() -> None:
    times = Finding((1, 4, 16), (1.0, 4.0, 10.0))
    values = [times.of_size(rows) for rows in (1, 2.5, 4, 10, 16, 18)]
    assert values == pytest.approx([1.0, 2.5, 4.0, 7.0, 10.0, 11.0])
    assert times.of_size(0.5) == 1.0
    assert Finding((2,), (3.0,)).of_size(4) == 6.0


def choice_of(gather: Finding, blas: Finding) -> Choice:
    """2 experts that every row visits, on 2 ranks."""
    problem = ExpertsProblem(make_layer(make_switch()), num_experts=2, num_ranks=2)
    measured = {GATHER: gather, BLAS: blas}
    return Choice("", (GATHER, BLAS), {}, measured, (), False, problem)


def test_the_fastest_is_chosen_by_hand() -> None:
    """All 2 experts are visited by every row: m = T on each of 2 ranks' one slot."""
    choice = choice_of(Finding((1, 4), (1.0, 4.0)), Finding((1, 4), (3.0, 3.6)))
    assert choice.predicted(GATHER, 4) == pytest.approx(4.0)
    assert choice.predicted(BLAS, 4) == pytest.approx(3.6)
    assert [choice.choose(rows) for rows in (1, 3, 4, 64)] == [
        GATHER, GATHER, BLAS, BLAS,
    ]  # fmt: skip
    assert choice.crossover(BLAS, GATHER) == 4
    assert choice.crossover(GATHER, BLAS) is None
    assert choice.choose(0) == GATHER  # a rank without rows


def test_mlx_s_own_way_is_left_for_clearly_faster_ones_only() -> None:
    """Within the noise of a warm-up nothing replaces what mlx-lm itself does."""
    own = Finding((1, 4), (1.0, 4.0))
    for share, expected in ((0.94, BLAS), (0.96, GATHER), (1.0, GATHER)):
        other = Finding((1, 4), (share, 4 * share))
        assert choice_of(own, other).choose(4) == expected


# ---------------------------------------------------------------- the warm-up


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_right_options_are_measured(bits: int | None, dtype: mx.Dtype) -> None:
    switch = make_switch(dtype)
    if bits:
        quantize(switch, bits)
    results = measure(ExpertsProblem(make_layer(switch, dtype), E, 1), [BLAS])
    assert results[BLAS].left_out == ""
    assert results[BLAS].sizes[:2] == (1, 4)
    assert results[BLAS].error < 1e-5
    assert sorted(results[BLAS].seconds) == list(results[BLAS].seconds)


@pytest.mark.parametrize(("num_ranks", "size"), [(1, 1), (1, 16), (2, 1)])
def test_one_rank_is_timed_as_it_decodes(
    num_ranks: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers in a row on complete rows, where an option that waits does so in each."""
    seen: list[type] = []

    class Recorded(GatherRunner):
        def partial_sum(self, rows: Rows, counters: Counters) -> mx.array:
            seen.append(type(rows))
            return super().partial_sum(rows, counters)

    monkeypatch.setitem(RUNNERS, "gather", Recorded)
    problem = ExpertsProblem(make_layer(make_switch()), E, num_ranks)
    expected = problem.reference()[size][0]
    (found,) = problem.solver(GATHER)(size)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
    kind = CompleteRows if num_ranks == 1 else Rows
    assert seen == [kind] * problem.case_calls(size)
    assert problem.case_calls(size) == (4 if (num_ranks, size) == (1, 1) else 1)


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
    shape = policy.experts[0]
    assert wrong not in shape.possible and wrong in shape.left_out
    np.testing.assert_allclose(outputs(switch), outputs(right), atol=1e-6)
    assert "left out: wrong on cpu, because" in policy.explain()

    # The next start does not try it again.
    monkeypatch.setattr(agree_module, "measure", fail)
    again = make_switch()
    with pytest.warns(UserWarning, match="wrong on cpu is left out"):
        assert run_tune(again).experts[0].left_out == shape.left_out
    # Nor can it be forced.
    with pytest.raises(ValueError, match="Nothing can run the experts"):
        run_tune(again, wish=Wish(runner="wrong"))


def test_layers_of_one_shape_share_a_policy() -> None:
    first, second, other = make_switch(), make_switch(), make_switch()
    quantize(other, 8)
    policy = run_tune(first, second, other)
    assert len(policy.experts) == 2
    choices = [switch_runner(s).choose for s in (first, second, other)]
    assert choices[0] == choices[1] != choices[2]
    assert policy.explain().count("Experts ") == 2


def test_without_warmup_the_rule_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agree_module, "measure", fail)
    policy = run_tune(make_switch(), wish=Wish(warmup=False))
    assert policy.experts[0].measured == {}
    assert policy.experts[0].choose(1) == BLAS
    assert "not measured" in policy.explain()
    assert not cache_folder().exists()


def test_unknown_switches_are_gathered() -> None:
    class Doubled(SwitchGLU):
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            return 2 * super().__call__(x, indices)

    policy = run_tune(Doubled(D, F, E))
    assert policy.experts[0].possible == (GATHER,)


def test_16_bit_models_are_not_gathered_on_a_cpu() -> None:
    switch = make_switch(mx.bfloat16)
    comm = GroupComm(mx.distributed.init())
    policy = tune([make_layer(switch, mx.bfloat16)], E, comm)
    assert policy.experts[0].possible == (BLAS,)
    assert "float32 only" in policy.experts[0].left_out[GATHER]


# ---------------------------------------------------------------- forcing


def test_a_runner_can_be_forced() -> None:
    policy = run_tune(make_switch(), wish=Wish(runner="gather"))
    assert policy.experts[0].possible == (GATHER,)
    assert "runner gather is forced" in policy.explain()


def test_a_backend_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(
        run_tune(make_switch(), wish=Wish(backend="cpu")).experts[0].possible
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
    assert read_findings(key) is None
    found = {"blas on cpu": Finding((1, 4), (0.5, 0.75), 1e-6)}
    write_findings(key, found)
    assert read_findings(key) == found and read_findings(other) is None


FINE = Finding((1,), (0.5,)).to_json()
MALFORMED = {
    "half a file": '{"key": ',
    "no record": "[]",
    "no results": '{"key": KEY}',
    "another key": '{"key": {}, "results": {}}',
    "deeply nested": "[" * 100_000,
    "results of another form": '{"key": KEY, "results": [1]}',
    "a finding of another form": '{"key": KEY, "results": {"blas on cpu": 3}}',
    "fields missing": '{"key": KEY, "results": {"blas on cpu": {"sizes": [1]}}}',
} | {
    f"{name} {value}": '{"key": KEY, "results": {"blas on cpu": FOUND}}'.replace(
        "FOUND", json.dumps({**FINE, name: value})
    )
    for name, value in (
        ("sizes", "1"), ("sizes", [2, 1]), ("sizes", ["a"]), ("sizes", None),
        ("seconds", [-1.0]), ("seconds", [float("nan")]), ("seconds", []),
        ("error", "x"), ("left_out", 1),
    )
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_cache_file_is_measured_again(what: str, tmp_path: Path) -> None:
    switch = make_switch()
    first = run_tune(switch)
    files = (tmp_path / "mlx_ep" / "experts").iterdir()
    keys = {file: json.loads(file.read_text())["key"] for file in files}
    ((file, key),) = (f for f in keys.items() if "blas_threads" not in f[1])
    file.write_text(MALFORMED[what].replace("KEY", json.dumps(key)))
    with pytest.warns(UserWarning, match="is not what a warm-up has written") as said:
        again = run_tune(switch)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert again.experts[0].possible == first.experts[0].possible
    assert again.experts[0].measured
    assert read_findings(key)  # written anew


def test_the_cache_s_key_is_of_the_code_that_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of a runner's Python source is measured again."""
    for room in cache.TIMED_ROOMS:
        (tmp_path / room).mkdir()
    file = tmp_path / "experts" / "blas.py"
    file.write_text("x = 1")
    monkeypatch.setattr(cache.mlx_ep, "__file__", str(tmp_path / "__init__.py"))
    keys = []
    for text in ("x = 1", "x = 2", "x = 1"):
        file.write_text(text)
        cache._code_digest.cache_clear()
        keys.append(cache_key({}))
    cache._code_digest.cache_clear()
    assert keys[0] == keys[2] != keys[1]


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
