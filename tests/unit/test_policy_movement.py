"""What moves rows: the rule, agreement of ranks, the warm-up, wrong options."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_ep.comm import GroupComm
from mlx_ep.exchange import Auto
from mlx_ep.experts import switch_runner
from mlx_ep.kernels import RowFormat
from mlx_ep.placement import Placement
from mlx_ep.rows import Job, OpsMovement, Option, RowRoutes, mover
from mlx_ep.tune import (
    Finding,
    MovementProblem,
    MovementShape,
    agree,
    check,
    default_movement,
    explain,
    facts,
    measure,
    tune,
)
from mlx_ep.types import DispatchDtype
from tests.support.switches import KERNELS, D, E, K, fail, make_layer, make_switch
from tests.support.waiting import LONG

pytestmark = pytest.mark.usefixtures("own_cache")

agree_module = importlib.import_module("mlx_ep.tune.agree")
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


def problem_of(
    job: Job, num_ranks: int = 2, rank: int = 0, form: DispatchDtype = "model"
) -> MovementProblem:
    shape = replace(movement_shape(num_ranks, rank), dispatch_dtype=form)
    return MovementProblem(shape, job)


def facts_of(**results: Finding) -> dict[str, object]:
    """One rank with Metal, and what it found."""
    return {"impossible": {}, "results": {k: r.to_json() for k, r in results.items()}}


def timed(few: float, many: float) -> Finding:
    return Finding((1, 64), (few, many))


def test_ranks_agree_on_a_movement() -> None:
    """Rank 0's times count; what is wrong on any rank is used by none."""
    first = {
        "ops on cpu": timed(1.0, 9.0),
        "ops on metal": timed(2.0, 3.0),
        "metal on metal": timed(0.1, 0.2),
    }
    wrong = first | {"metal on metal": Finding(left_out="it differs by 0.5")}
    slow = first | {"ops on cpu": timed(99.0, 99.0)}
    ranks = [facts_of(**first), facts_of(**slow), facts_of(**wrong)]
    rows = agree(problem_of("rows", 3), ranks)
    assert rows.possible == (OPS_CPU, OPS_METAL)
    assert rows.left_out[KERNELS] == "rank 2: it differs by 0.5"
    assert rows.wrong == (KERNELS,)
    chosen = [rows.choose(tokens) for tokens in (0, 1, 20, 64, 9999)]
    assert chosen == [OPS_CPU, OPS_CPU, OPS_METAL, OPS_METAL, OPS_METAL]
    everyone = agree(problem_of("ranks"), [facts_of(**first)] * 2)
    assert everyone.choose(1) == KERNELS
    on_cpu = agree(problem_of("pairs"), [facts_of(**first)] * 2, "cpu")
    assert on_cpu.possible == (OPS_CPU,) and on_cpu.forced
    assert on_cpu.left_out[KERNELS] == "backend cpu is forced"
    text = explain(everyone, [1])
    assert "metal on metal: measured per call 100 ms with 1 token" in text
    assert (
        "Movement of 32 bfloat16, top 2, 2 ranks; sums of all ranks; by rank 0" in text
    )


def test_a_backend_that_moves_nothing_is_refused() -> None:
    none = {"impossible": {"ops on metal": "no", "metal on metal": "no"}, "results": {}}
    with pytest.raises(ValueError, match="Nothing can move the rows of 32 bfloat16"):
        agree(problem_of("rows"), [none], "metal")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sizes are timed, also where the host is so busy that one takes long."""
    monkeypatch.setattr(check, "MAX_SECONDS", LONG)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("job", ["rows", "ranks", "pairs"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_right_movement_is_measured(job: Job, num_ranks: int) -> None:
    for rank in range(num_ranks):
        (result,) = measure(problem_of(job, num_ranks, rank), [OPS_CPU]).values()
        assert result.left_out == "" and result.error < 1e-6
        assert result.sizes == (1, 64, 512)
        assert sorted(result.seconds) == list(result.seconds)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("form", ["int8", "mxfp8"])
def test_rows_in_8_bits_are_a_job_of_their_own(form: DispatchDtype) -> None:
    """Only where they travel so; the strategy gathered has no other one."""
    problem = problem_of("format", form=form)
    (result,) = measure(problem, [OPS_CPU]).values()
    assert result.left_out == "" and result.error < 1e-6
    assert result.sizes == (1, 64, 512)
    shape = problem.shape
    assert shape.jobs == ("rows", "ranks", "pairs", "format")
    assert replace(shape, exchanges=False).jobs == ("pairs", "format")
    assert movement_shape().jobs == ("rows", "ranks", "pairs")
    assert "rows in 8 bits a value and back" in problem.title
    alone = replace(shape, placement=Placement.contiguous(E, 1))
    assert "format" not in alone.jobs
    # pack_rows gets rows of words.
    assert shape.narrowest == 9 and movement_shape().narrowest == D


def test_a_shared_width_is_moved_by_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token reaches both ranks that hold a part of its expert."""
    monkeypatch.setattr(mover, "uses_metal", lambda: True)
    placement = Placement.from_groups([E], [[8, 8]])
    shape = MovementShape(D, mx.float32, K, placement, 1, exchanges=True)
    for job in shape.jobs:
        problem = MovementProblem(shape, job)
        choice = agree(problem, [facts(problem, False, 1)])
        assert choice.possible == (OPS_CPU, OPS_METAL)
        assert "an expert lives on several ranks" in choice.left_out[KERNELS]
    (result,) = measure(MovementProblem(shape, "rows"), [OPS_CPU]).values()
    assert result.left_out == ""


class WrongMovement(OpsMovement):
    """Each method is a little wrong."""

    def pack(self, x: mx.array, plan: RowRoutes, num_rows: int) -> mx.array:
        return super().pack(x, plan, num_rows)[::-1]

    def add_ranks(self, *args: object) -> mx.array:
        return super().add_ranks(*args).at[-1, -1].add(0.01)

    def sum_pairs(self, *args: object) -> mx.array:
        return super().sum_pairs(*args) * float("nan")

    def to_format(self, x: mx.array, form: RowFormat) -> mx.array:
        return super().to_format(x, form).at[0, 0].add(1)


@pytest.mark.parametrize("job", ["rows", "ranks", "pairs", "format"])
def test_a_wrong_movement_is_left_out_for_good(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mover.MOVEMENTS, "metal", WrongMovement)
    monkeypatch.setattr(mover, "uses_metal", lambda: True)
    problem = problem_of(job, form="int8")
    found = facts(problem, True, 1)
    choice = agree(problem, [found])
    assert "differs from the reference by" in choice.left_out[KERNELS]
    assert choice.possible == (OPS_CPU, OPS_METAL)

    # The next start does not try it again.
    monkeypatch.setattr(agree_module, "measure", fail)
    again = facts(problem, True, 1)
    assert json.dumps(again) == json.dumps(found)
    assert agree(problem, [again]) == choice
    # Without a warm-up the rule holds, and it takes no kernel.
    unmeasured = agree(problem, [facts(problem, False, 1)])
    assert unmeasured.measured == {}
    assert unmeasured.choose(1) == OPS_CPU


def test_tune_sets_what_moves_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank exchanges nothing: only the sums of pairs have a choice."""
    monkeypatch.setattr(mover, "uses_metal", lambda: True)
    monkeypatch.setitem(mover.MOVEMENTS, "metal", WrongMovement)
    switch = make_switch()
    comm = GroupComm(mx.distributed.init())
    said = r"Movement of 32 float32, top 2; sums of this rank's pairs.*: metal on metal"
    with pytest.warns(UserWarning, match=said):
        policy = tune([make_layer(switch)], E, comm, moves_rows=True)
    (movement,) = policy.movement
    assert list(movement.jobs) == ["pairs"]
    assert switch_runner(switch).mover.choose == movement.choose
    assert policy.mover is None
    text = policy.with_strategy(Auto()).explain([1, 256])
    assert "left out: metal on metal, because with 1 token per call it differs" in text
    assert "T=256: low_latency with all tokens, because nearly every" in text
    assert "(gathered " in text and ", normal " in text
