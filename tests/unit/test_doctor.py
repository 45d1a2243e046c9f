"""The doctor finds what is wrong and says what it could not look at."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import pytest

from mlx_ep.comm import Comm, GroupComm
from mlx_ep.doctor import __main__ as doctor
from mlx_ep.doctor import facts
from mlx_ep.doctor.answers import answers
from mlx_ep.doctor.facts import machine, unlike
from mlx_ep.doctor.report import link_table, machine_lines, report_table
from mlx_ep.kernels import ops
from mlx_ep.loading import find_model
from mlx_ep.measure import Check, CheckedLayer, check_experts, check_kernels, checks
from mlx_ep.measure.links import LARGE, LinkTime, _link, with_expectation
from mlx_ep.measure.links import SMALL as SMALL_BYTES
from tests.support.host_kernels import installed
from tests.support.ranks import run_commands

SLOW = pytest.mark.slow
NO_FLAGS = argparse.Namespace(json=None, model=None)
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
    assert doctor.examine(NO_FLAGS, comm)
    output = capsys.readouterr().out
    assert "experts by blas on cpu, 4 bit, float32" in output
    assert "24 tokens of jargon-moe" in output
    assert "Not checked: the Metal kernels on rank 0" in output
    assert "Not checked: collectives, as there is one rank" in output
    assert "All 6 checks agree." in output
    assert max(map(len, output.splitlines())) <= 80


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
    for module in (doctor, facts):
        monkeypatch.setattr(module, "uses_metal", lambda: True)
    monkeypatch.setattr(doctor.cli, "run", lambda _, body: body(NO_FLAGS, comm))
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 1
    output = capsys.readouterr().out
    said = " ".join(output.split())
    assert "WRONG: expert_glu T=3 bfloat16: Unable to build metal library" in said
    assert "4 of 21 checks disagree: rank 0: expert_glu T=3 bfloat16" in said
    assert "Not checked: the Metal kernels" not in output


def test_the_table_marks_what_is_imprecise_but_not_ours() -> None:
    check = Check(what="experts by gather", error=0.1, tolerance=0.05, is_ours=False)
    assert not check.is_right and not doctor.is_wrong(check)
    assert "rough: MLX's own sums in 16 bits" in report_table([check])


def test_every_way_to_run_experts_is_checked() -> None:
    found = list(check_experts(SMALL))
    assert [c.what.split(",")[0] for c in found].count("experts by blas on cpu") == 3


def rank_facts(rank: int, **changes: object) -> dict[str, object]:
    """Of a Mac in a cluster of two."""
    return {
        "rank": rank,
        "size": 2,
        "host": f"mac{rank}",
        "host_id": f"mac{rank}/{rank}",
        "system": "Darwin 25.0 arm64",
        "macos": "26.2",
        "python": "3.12.1",
        "versions": {"mlx": "0.32.4", "mlx-lm": "0.32.2"},
        "chip": "Apple M3 Ultra",
        "metal": True,
        "transport": "ring",
        "variables": {},
        "memory_bytes": 512 * 10**9,
        "available_bytes": 400 * 10**9,
        "limit_bytes": 384 * 10**9,
        "wired_limit_mb": 0,
        "cores": 32,
        "load_average": 1.0,
        **changes,
    }


def rank_checks(experts: float, reduce: float) -> list[Check]:
    small = {"error": 0.0, "tolerance": 1.0}
    return [
        Check(what="experts by metal, 4 bit, bfloat16", seconds=experts, **small),
        Check(what="all_reduce of 512 bytes", seconds=reduce, num_bytes=512, **small),
    ]


def test_a_link_whose_large_message_is_no_slower_has_no_rate() -> None:
    assert _link((0, 1), [3e-4, 2e-4], steps=2.0, volume=2.0).bandwidth is None
    rated = _link((0, 1), [0.5, 1.5], steps=2.0, volume=2.0)
    assert (rated.latency, rated.bandwidth) == (0.25, 2.0 * (LARGE - SMALL_BYTES))


LINK = LinkTime(ranks=(0, 1), latency=3e-3, bandwidth=1e8)


def test_answers_are_of_what_was_measured() -> None:
    facts = [
        rank_facts(0),
        rank_facts(
            1,
            limit_bytes=64 * 10**9,
            available_bytes=20 * 10**9,
            wired_limit_mb=500_000,
            load_average=90.0,
            variables={"MLX_METAL_FAST_SYNCH": "1"},
            versions={"mlx": "0.32.3", "mlx-lm": "0.32.2"},
        ),
    ]
    hosts = [str(rank["host_id"]) for rank in facts]
    links = [with_expectation(LINK, "ring", hosts)]
    checks = [rank_checks(1e-3, 2e-3), rank_checks(2e-3, 1e-3)]
    found = answers(facts, checks, links, "")
    backend = " ".join(found["backend not working"])
    assert "ring connects 2 ranks; its collectives are all right" in backend
    assert "--backend jaccl" in backend and "Versions differ" in backend
    assert "Rank 1 has MLX_METAL_FAST_SYNCH set" in backend
    balance = " ".join(found["poor load balance"])
    assert "read 5.0 where even would be 4.0, 1.26 times" in balance
    assert "2.00 ms on rank 1 and 1.00 ms on rank 0, 2.00 times as long" in balance
    assert "64.00 GB to 384.00 GB a rank" in balance
    slow = " ".join(found["low throughput"])
    assert "takes 2000 us. With one in each of 48 MoE layers that is 96.0 ms" in slow
    assert "at most 10 tokens/s" in slow
    assert "ranks 0 and 1 is slow: 3000 us and 0.10 GB/s, expected 288 us" in slow
    assert "had a load of 90.0 on 32 cores" in slow
    assert "20.00 GB of 512.00 GB memory are free" in slow
    assert "iogpu.wired_limit_mb is 500000, above 0.85" in slow
    # Of one host neither rank is slower, and both have its memory together.
    shared = [rank_facts(rank, host_id="mac") for rank in range(2)]
    balance = " ".join(answers(shared, checks, links, "")["poor load balance"])
    assert "They share a host" in balance and "--placement with" not in balance
    (_, memory, _) = machine_lines(shared[0], sharing=2)
    assert "384.00 GB for weights of the 2 ranks here" in " ".join(memory.split())
    # Where all is well none of that is said.
    alike = [rank_facts(0), rank_facts(1)]
    fast = [with_expectation(LinkTime(ranks=(0, 1), latency=3e-5, bandwidth=6e9),
                             "jaccl", hosts)]  # fmt: skip
    found = answers(alike, [rank_checks(1e-3, 1e-4)] * 2, fast, "")
    assert found["low throughput"][1:] == [
        "The links give what their transport should."
    ]
    assert len(found["poor load balance"]) == 3


def test_what_a_link_should_give() -> None:
    hosts = ["a", "b", "b"]
    jaccl = with_expectation(LINK, "jaccl", hosts)
    assert (jaccl.expected_latency, jaccl.expected_bandwidth) == (2.9e-5, 6.3e9)
    assert "omlx/issues/3118" in jaccl.source and jaccl.is_slow
    text = link_table([jaccl])
    row = text.splitlines()[2].split()
    assert row == ["0-1", "3000", "29", "0.10", "6.3", "SLOW"]
    # A rate that cannot be told is neither a number nor slow.
    untold = replace(jaccl, latency=2.9e-5, bandwidth=None)
    assert not untold.is_slow
    row = link_table([untold]).splitlines()[2].split()
    assert row == ["0-1", "29", "29", "-", "6.3", "ok"]
    same_host = LinkTime(ranks=(1, 2), latency=1.0, bandwidth=1.0)
    for link, transport in ((LINK, "mpi"), (same_host, "ring")):
        found = with_expectation(link, transport, hosts)
        assert found.source.startswith("no expectation") and not found.is_slow
        assert found.expected_latency is None


def test_what_differs_between_ranks_is_a_table(comm: Comm) -> None:
    assert unlike([machine(comm)] * 2) == ""
    variables = {"MLX_METAL_FAST_SYNCH": "1"}
    table = unlike([rank_facts(0), rank_facts(1, chip="Apple M4", variables=variables)])
    assert table.splitlines()[0].split() == [
        "|",
        "|",
        "rank",
        "0",
        "|",
        "rank",
        "1",
        "|",
    ]
    assert "| chip                 | Apple M3 Ultra | Apple M4 |" in table
    assert "| MLX_METAL_FAST_SYNCH | -              | 1        |" in table


def test_a_secret_is_not_shown(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLX")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLX_EP_SECRET", "0123456789abcdef")
    monkeypatch.setenv("MLX_EP_BACKEND", "cpu")
    found = machine(comm)
    assert found["variables"] == {"MLX_EP_BACKEND": "cpu"}
    assert "0123456789abcdef" not in json.dumps(found)


def test_everything_fits_80_columns() -> None:
    rank = rank_facts(0, host="a-mac-with-a-long-name.in.a.long.domain.example.org")
    lines = [line for text in machine_lines(rank) for line in text.splitlines()]
    what = "unpack_sum (8, 2048) bfloat16+float32 x8"
    check = Check(
        what=what,
        error=float("nan"),
        tolerance=1e-4,
        seconds=0.1234567,
        plain_seconds=1.2345,
        num_bytes=10**9,
        why="it is wrong " * 20,
    )
    lines += report_table([check]).splitlines()
    assert max(map(len, lines)) <= 80


# ``python -m mlx_ep.doctor``, but that the experts it checks are small.
WITH_SMALL_EXPERTS = f"""
import os, runpy, sys
from mlx_ep import measure
from mlx_ep.measure import CheckedLayer, check_experts
measure.check_experts = lambda: check_experts({SMALL})
sys.argv = ["mlx_ep.doctor", *(word.format(**os.environ) for word in sys.argv[1:])]
sys.modules.pop("mlx_ep.doctor.__main__", None)
runpy.run_module("mlx_ep.doctor", run_name="__main__", alter_sys=True)
"""


@pytest.mark.requires("ranks")
@pytest.mark.parametrize(
    "started",
    [["-c", WITH_SMALL_EXPERTS], pytest.param(["-m", "mlx_ep.doctor"], marks=SLOW)],
    ids=["small experts", "its own"],
)
def test_on_two_ranks(started: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *started, "--model", "jargon-moe"]
    first, second = run_commands(2, [*command, "--json", str(tmp_path / "d.json")])
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
    assert first.stdout.count("24 tokens of jargon-moe") == 2
    assert "checks agree." in first.stdout
    assert "(no expectation: ranks of one host)" in first.stdout
    assert max(map(len, first.stdout.splitlines())) <= 80
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["is_right"] and found["model_problem"] == ""
    (link,) = found["links"]
    assert link["ranks"] == [0, 1] and not link["is_slow"]
    # No rate where the host was so busy that a long message took no longer.
    rate = link["bandwidth"] or 1e9
    assert 1e-7 < link["latency"] < 100 and 1e3 < rate < 1e12
    assert len(found["ranks"]) == len(found["checks"]) == 2
    assert set(found["answers"]) == {
        "backend not working", "poor load balance", "low throughput",
    }  # fmt: skip


@pytest.mark.requires("ranks")
def test_ranks_with_other_files_of_a_model_are_told(tmp_path: Path) -> None:
    """Exit code 1, the table, and the report of the cluster all the same."""
    for rank in range(2):
        folder = tmp_path / str(rank)
        shutil.copytree(find_model("jargon-moe"), folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 1', '"rope_theta": 2'))
    flags = ["--model", f"{tmp_path}/{{MLX_RANK}}", "--json", "-"]
    ranks = run_commands(2, [sys.executable, "-c", WITH_SMALL_EXPERTS, *flags])
    assert [rank.returncode for rank in ranks] == [1, 1], ranks[0].stderr
    found = json.loads(ranks[0].stdout)  # --json - leaves the output to JSON alone
    assert not found["is_right"]
    assert "| config.json |" in found["model_problem"]
    assert "The model cannot be loaded: All ranks must have the same" in ranks[0].stderr
