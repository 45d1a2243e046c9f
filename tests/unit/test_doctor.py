"""The doctor finds what is wrong and says what it could not look at."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import mlx.core as mx
import pytest

from mlx_ep import doctor
from mlx_ep.comm import Comm, GroupComm
from mlx_ep.kernels import ops
from mlx_ep.measure import Check, CheckedLayer, check_experts, check_kernels, checks
from tests.support.host_kernels import installed
from tests.support.ranks import run_commands

SMALL = CheckedLayer(width=128, expert_width=64, slots=4, top_k=3, tokens=(3,))


@pytest.fixture
def comm() -> Comm:
    return GroupComm(mx.distributed.init())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_kernels", lambda: check_kernels(SMALL))
    monkeypatch.setattr(doctor, "check_experts", lambda: check_experts(SMALL))


@pytest.mark.usefixtures("small")
def test_a_right_machine(comm: Comm, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine(comm)
    output = capsys.readouterr().out
    assert "experts by blas on cpu, 4 bit, float32 rows" in output
    assert "Not checked: the Metal kernels on rank 0" in output
    assert "Not checked: collectives, as there is one rank" in output
    assert "All 5 checks agree." in output


@pytest.mark.requires("host_metal")
def test_the_kernels_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "REPEATS", 1)
    for _ in installed(monkeypatch):
        found = list(check_kernels(SMALL))
    assert len(found) == 1 + 2 * 3 + 4 * 2
    assert all(check.is_right for check in found), [c for c in found if not c.is_right]
    names = {check.what.split()[0] for check in found}
    assert names == {
        "route_plan", "pack_rows", "unpack_sum", "expert_glu", "expert_down",
    }  # fmt: skip


def _kernels(**wrong: object) -> ModuleType:
    """The twins in the place of the kernels, but for those that are given."""
    module = ModuleType("metal")
    vars(module).update({**vars(ops), **wrong})
    return module


def _raise(*args: object) -> None:
    raise RuntimeError("Unable to build metal library from source")


WRONG = {
    "pack_rows": lambda x, rows, count: x,
    "unpack_sum": lambda *args, **kw: ops.unpack_sum(*args, **kw).at[0, 0].add(0.5),
    "expert_glu": lambda *args: ops.expert_glu(*args) * 1.001,
    "expert_down": lambda *args: ops.expert_down(*args) * float("nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "metal", _kernels(**{name: WRONG[name]}))
    found = list(check_kernels(SMALL))
    wrong = {check.what.split()[0] for check in found if doctor.is_wrong(check)}
    assert wrong == {name}


@pytest.mark.usefixtures("small")
def test_the_exit_code_and_the_report_of_a_wrong_kernel(
    comm: Comm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "metal", _kernels(expert_glu=_raise))
    monkeypatch.setattr(doctor, "uses_metal", lambda: True)
    monkeypatch.setattr(
        doctor.cli, "run", lambda _, body: body(argparse.Namespace(), comm)
    )
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 1
    output = capsys.readouterr().out
    assert "WRONG: Unable to build metal library" in output
    assert "4 of 20 checks disagree: rank 0: expert_glu T=3 bfloat16" in output
    assert "Not checked: the Metal kernels" not in output


def test_the_table_marks_what_is_imprecise_but_not_ours() -> None:
    check = Check(what="experts by gather", error=0.1, tolerance=0.05, is_ours=False)
    assert not check.is_right and not doctor.is_wrong(check)
    assert "MLX's own, imprecise" in doctor.report_table([check])


def test_every_way_to_run_experts_is_checked() -> None:
    found = list(check_experts(SMALL))
    assert [c.what.split(",")[0] for c in found].count("experts by blas on cpu") == 3


@pytest.mark.requires("ranks")
def test_on_two_ranks() -> None:
    first, second = run_commands(2, [sys.executable, "-m", "mlx_ep.doctor"])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert second.stdout == ""
    assert "rank 1 of 2" in first.stdout
    for name in (
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
    ):
        assert first.stdout.count(f"{name} of") == 4  # two sizes, two ranks
    assert "checks agree." in first.stdout
