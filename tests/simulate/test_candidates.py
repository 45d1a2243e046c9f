"""mlx_ep.plan --simulate: candidates, limits, prices, the pick."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from mlx_ep.plan import __main__ as command
from mlx_ep.simulate.candidates import WAYS, Candidate, pick
from tests.support.simulate.data import MOE, trace_lines, write_trace


def _plan(monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["mlx_ep.plan", *flags])
    code, printed = 0, io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            command.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, printed.getvalue()


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(MOE | {"dtype": "bfloat16"}))
    trace = write_trace(tmp_path / "t.jsonl", trace_lines(6))
    return ["--model", str(tmp_path), "--simulate", str(trace), "--ranks", "2"]


def test_table_and_pick(
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "plan.json"
    more = ["--chip", "m3-ultra,m4-max", "--price", "m3-ultra=4000,m4-max=2500"]
    code, text = _plan(monkeypatch, *flags, *more, "--json", str(file))
    assert code == 0, text
    content = json.loads(file.read_text())
    found = content["candidates"]
    assert len(found) == 2 * len(WAYS)
    for chip in ("m3-ultra", "m4-max"):
        ways = [(one["devices"], one["way"]) for one in found if one["chip"] == chip]
        assert ways == [(1, WAYS[0].name), *((2, way.name) for way in WAYS[1:])]
    for one in found:
        price = {"m3-ultra": 4000, "m4-max": 2500}[one["chip"]]
        assert one["price"] == price * one["devices"]
        assert one["throughput"] > 0 and one["ttft"] > 0 and one["memory"] > 0
    fastest = max(found, key=lambda one: one["throughput"])
    assert content["pick"] == fastest
    assert f"Pick: {fastest['devices']} x {fastest['chip']}" in text
    # Limits that all keep: the cheapest. Limits that none keeps: exit code 1.
    easy = ["--most-ttft", "100000", "--most-tpot", "100000"]
    code, text = _plan(monkeypatch, *flags, *more, *easy)
    assert code == 0 and "Pick: 1 x m4-max, one Mac alone, 2500." in text
    code, text = _plan(monkeypatch, *flags, *more, "--most-tpot", "0.001")
    assert code == 1 and "No candidate runs and keeps the limits." in text


@pytest.mark.parametrize(
    "more, text",
    [
        ([], "--simulate needs --ranks, the most Macs, and --chip or --profile"),
        (["--chip", "m9"], "'m9'"),
        (["--chip", "m4-max", "--price", "m3-ultra=1"], "--price must name chips of"),
        (["--chip", "m4-max", "--price", "m4-max"], "--price must be CHIP=NUMBER"),
        (["--chip", "m4-max", "--memory", "8,8"], "do not go with --simulate"),
        (["--chip", "m4-max", "--ep", "1"], "--ep does not go with --simulate"),
        (["--chip", "m4-max", "--placement", "p.json"], "must be a record of routing"),
    ],
)
def test_wrong_flags(
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    more: list[str],
    text: str,
) -> None:
    code, printed = _plan(monkeypatch, *flags, *more)
    assert code == 2 and text in printed and len(printed.splitlines()) == 1


def test_limits_need_a_load(
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    few = [flags[0], flags[1], "--ranks", "2", "--most-tpot", "5"]
    code, printed = _plan(monkeypatch, *few)
    assert code == 2 and "--most-tpot goes with --simulate" in printed


def test_pick() -> None:
    one = Candidate("a", 1, "alone", throughput=10.0, ttft=500.0, tpot=50.0, price=100)
    two = Candidate("a", 2, "ep", throughput=30.0, ttft=200.0, tpot=20.0, price=200)
    broken = Candidate("b", 1, "alone", throughput=99.0, price=1, why_not="too big")
    assert pick([one, two, broken]) == two
    assert pick([one, two, broken], most_ttft=600) == one
    assert pick([one, two, broken], most_ttft=600, most_tpot=30) == two
    assert pick([one, broken], most_ttft=100) is None
