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
from mlx_ep.exchange import Auto
from mlx_ep.metrics import Counters
from mlx_ep.movement import Job, OpsMovement, RowPlan, mover
from mlx_ep.placement import Placement
from mlx_ep.policy import (
    ExpertsPolicy,
    Layer,
    Measured,
    ModelPolicy,
    MovementShape,
    Result,
    Wish,
    default_backend,
    default_movement,
    default_option,
    default_strategy,
    measure,
    measure_movement,
    move,
    tune,
)
from mlx_ep.policy.cache import cache_folder, cache_key, read_cache, write_cache
from mlx_ep.policy.explain import explain_movement
from mlx_ep.policy.move import agree_movement, movement_facts
from mlx_ep.runners import RUNNERS, Option, switch_runner
from mlx_ep.runners.blas import BlasRunner
from mlx_ep.runners.table import BACKENDS
from mlx_ep.types import Rows, TokenCounts

tune_module = importlib.import_module("mlx_ep.policy.tune")
GATHER, BLAS = Option("gather", "cpu"), Option("blas", "cpu")
GPU, KERNELS = Option("gather", "metal"), Option("metal", "metal")
D, F, E, K = 32, 16, 6, 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLX_EP_BACKEND", raising=False)


def make_switch(dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(1)
    switch = SwitchGLU(D, F, E)
    switch.set_dtype(dtype)
    mx.eval(switch.parameters())
    return switch


def quantize(switch: nn.Module, bits: int) -> None:
    """Not the down projection, whose width no group size divides."""
    for name in ("gate_proj", "up_proj"):
        switch[name] = switch[name].to_quantized(32, bits)


def make_layer(switch: nn.Module, dtype: mx.Dtype = mx.float32) -> Layer:
    return Layer(switch, dtype, K)


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


def _fail(total: mx.array) -> mx.array:
    raise RuntimeError("[metal] Unable to build the kernel")


WRONGS = {
    "slightly": (lambda total: total * 1.01, "differs from the reference by"),
    "one column": (lambda total: total.at[:, 0].add(1.0), "differs from the reference"),
    "NaN": (lambda total: total + float("nan"), "differs from the reference by nan"),
    "only many rows": (
        lambda total: total if total.shape[0] < 16 else total * 0,
        "with 16 rows per slot",
    ),
    "fails": (_fail, "it failed: .*Unable to build"),
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
    monkeypatch.setattr(tune_module, "measure", _fail)
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
    monkeypatch.setattr(tune_module, "measure", _fail)
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


# ---------------------------------------------------------------- movement

OPS_CPU, OPS_METAL = Option("ops", "cpu"), Option("ops", "metal")


def test_default_movement_takes_no_unmeasured_kernel() -> None:
    everything = [OPS_CPU, OPS_METAL, KERNELS]
    for tokens, expected in ((1, OPS_CPU), (255, OPS_CPU), (256, OPS_METAL)):
        assert default_movement(tokens, 8192, everything) == expected
    assert default_movement(2048, 8192, [OPS_CPU]) == OPS_CPU
    assert default_movement(1, 8192, [KERNELS]) == KERNELS


def movement_shape(num_ranks: int = 2, rank: int = 0) -> MovementShape:
    placement = Placement.contiguous(E, num_ranks)
    return MovementShape(D, mx.bfloat16, K, placement, rank, exchanges=num_ranks > 1)


def facts_of(**results: Result) -> dict[str, object]:
    """One rank with Metal, that found the same for each job."""
    found = {"impossible": {}, "results": {k: r.to_json() for k, r in results.items()}}
    return dict.fromkeys(("rows", "ranks", "pairs"), found)


def timed(few: float, many: float) -> Result:
    return Result((1, 64), (few, many))


def test_ranks_agree_on_a_movement() -> None:
    """Rank 0's times count; what is wrong on any rank is used by none."""
    first = {
        "ops on cpu": timed(1.0, 9.0),
        "ops on metal": timed(2.0, 3.0),
        "metal on metal": timed(0.1, 0.2),
    }
    wrong = first | {"metal on metal": Result(left_out="it differs by 0.5")}
    slow = first | {"ops on cpu": timed(99.0, 99.0)}
    ranks = [facts_of(**first), facts_of(**slow), facts_of(**wrong)]
    policy, agreed = agree_movement(movement_shape(3), ranks, None)
    rows = policy.jobs["rows"]
    assert rows.possible == (OPS_CPU, OPS_METAL)
    assert rows.left_out[KERNELS] == "rank 2: it differs by 0.5"
    assert agreed["rows"].wrong == (KERNELS,)
    chosen = [policy.choose("rows", tokens) for tokens in (0, 1, 20, 64, 9999)]
    assert chosen == [OPS_CPU, OPS_CPU, OPS_METAL, OPS_METAL, OPS_METAL]
    everyone = agree_movement(movement_shape(), [facts_of(**first)] * 2, None)[0]
    assert everyone.choose("ranks", 1) == KERNELS
    on_cpu = agree_movement(movement_shape(), [facts_of(**first)] * 2, "cpu")[0]
    assert on_cpu.jobs["pairs"].possible == (OPS_CPU,) and on_cpu.forced
    assert on_cpu.jobs["pairs"].left_out[KERNELS] == "backend cpu is forced"
    text = explain_movement(everyone, [1])
    assert "metal on metal: measured per call 100 ms with 1 token" in text
    assert (
        "Movement of 32 bfloat16, top 2, 2 ranks; sums of all ranks; by rank 0" in text
    )


def test_a_backend_that_moves_nothing_is_refused() -> None:
    none = {"impossible": {"ops on metal": "no", "metal on metal": "no"}, "results": {}}
    ranks = [dict.fromkeys(("rows", "ranks", "pairs"), none)]
    with pytest.raises(ValueError, match="Nothing can move the rows of 32 bfloat16"):
        agree_movement(movement_shape(), ranks, "metal")


@pytest.mark.parametrize("job", ["rows", "ranks", "pairs"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_right_movement_is_measured(job: Job, num_ranks: int) -> None:
    for rank in range(num_ranks):
        shape = movement_shape(num_ranks, rank)
        (result,) = measure_movement(shape, job, [OPS_CPU]).values()
        assert result.left_out == "" and result.error < 1e-6
        assert result.rows == (1, 64, 512)
        assert sorted(result.seconds) == list(result.seconds)


def test_a_shared_width_is_moved_by_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token reaches both ranks that hold a part of its expert."""
    monkeypatch.setattr(mover, "uses_metal", lambda: True)
    placement = Placement.from_groups([E], [[8, 8]])
    shape = MovementShape(D, mx.float32, K, placement, 1, exchanges=True)
    policy = agree_movement(shape, [movement_facts(shape, False, 1)], None)[0]
    for job in policy.jobs.values():
        assert job.possible == (OPS_CPU, OPS_METAL)
        assert "an expert lives on several ranks" in job.left_out[KERNELS]
    (result,) = measure_movement(shape, "rows", [OPS_CPU]).values()
    assert result.left_out == ""


class WrongMovement(OpsMovement):
    """Each method is a little wrong."""

    def pack(self, x: mx.array, plan: RowPlan, num_rows: int) -> mx.array:
        return super().pack(x, plan, num_rows)[::-1]

    def add_ranks(self, *args: object) -> mx.array:
        return super().add_ranks(*args).at[-1, -1].add(0.01)

    def sum_pairs(self, *args: object) -> mx.array:
        return super().sum_pairs(*args) * float("nan")


@pytest.mark.parametrize("job", ["rows", "ranks", "pairs"])
def test_a_wrong_movement_is_left_out_for_good(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mover.MOVEMENTS, "metal", WrongMovement)
    monkeypatch.setattr(mover, "uses_metal", lambda: True)
    shape = movement_shape()
    facts = [movement_facts(shape, True, 1)]
    policy = agree_movement(shape, facts, None)[0]
    assert "differs from the reference by" in policy.jobs[job].left_out[KERNELS]
    assert policy.jobs[job].possible == (OPS_CPU, OPS_METAL)

    # The next start does not try it again.
    monkeypatch.setattr(move, "measure_movement", _fail)
    again = movement_facts(shape, True, 1)
    assert again == json.loads(json.dumps(facts[0]))
    assert agree_movement(shape, [again], None)[0] == policy
    # Without a warm-up the rule holds, and it takes no kernel.
    unmeasured = agree_movement(shape, [movement_facts(shape, False, 1)], None)[0]
    assert unmeasured.jobs[job].measured == {}
    assert unmeasured.choose(job, 1) == OPS_CPU


def test_tune_sets_what_moves_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank exchanges nothing: only the sums of pairs have a choice."""
    monkeypatch.setattr(mover, "uses_metal", lambda: True)
    monkeypatch.setitem(mover.MOVEMENTS, "metal", WrongMovement)
    switch, strategy = make_switch(), Auto()
    comm = GroupComm(mx.distributed.init())
    with pytest.warns(UserWarning, match="Movement of 32 float32, top 2, pairs: metal"):
        policy = tune([make_layer(switch)], E, comm, strategy=strategy)
    (movement,) = policy.movement
    assert list(movement.jobs) == ["pairs"]
    assert switch_runner(switch).mover.choose == movement.choose
    assert strategy.mover.choose is None
    text = policy.explain([1, 256])
    assert "left out: metal on metal, because with 1 tokens it differs" in text
    assert "T=256: low_latency with all tokens, because nearly every" in text
    assert "(gathered " in text and ", normal " in text


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
