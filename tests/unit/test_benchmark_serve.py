"""`mlx_ep.benchmark serve`: a load on a server that says given texts."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_ep.benchmark import load
from mlx_ep.benchmark.__main__ import main
from mlx_ep.benchmark.serve import make_parser, summary
from mlx_ep.server.requests import Request
from mlx_ep.simulate.calibrate import main as calibrate
from mlx_ep.simulate.measured import read_measured
from tests.support.http_serving import Serving, end_token, ids, serving

SAID = [*ids("word " * 40), end_token()]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(lambda _: SAID, step_seconds=0.001) as found:
        yield found


def _run(monkeypatch: pytest.MonkeyPatch, server: Serving, *flags: str) -> None:
    url = f"{server.address}/v1"
    argv = ["mlx_ep.benchmark", "serve", "--base-url", url, *flags]
    monkeypatch.setattr(sys, "argv", argv)
    main()


def _sizes(requests: list[Request]) -> list[int]:
    return [len(request.tokens) for request in requests]


def test_lengths_counts_and_files(
    server: Serving,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    before = len(server.engine.requests)
    flags = ["-n", "6", "--concurrency", "1,3", "--input-tokens", "120"]
    flags += ["--output-tokens", "9", "--json", str(out), "--plot", str(plot)]
    _run(monkeypatch, server, *flags)
    found = json.loads(out.read_text())["loads"]
    assert [one["concurrency"] for one in found] == [1, 3]
    for one in found:
        assert (one["requests"], one["failed"], one["output_tokens"]) == (6, 0, 54)
        assert one["ttft"]["p50"] <= one["ttft"]["p99"] <= one["latency"]["p99"]
        assert one["output_tokens_per_second"] == pytest.approx(54 / one["seconds"])
    asked = server.engine.requests[before + 4 :]  # behind two probes and the warm-up
    assert len({request.tokens for request in asked}) == 12  # no prompt twice
    assert all(100 < size < 140 for size in _sizes(asked))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| 3 | 6 | 0 |" in " ".join(capsys.readouterr().out.split())


def test_a_trace_and_a_recording_that_calibrates(
    server: Serving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trace, record = tmp_path / "trace.jsonl", tmp_path / "record.jsonl"
    lines: list[dict[str, Any]] = [
        {
            "input_toks": 4 + index,
            "output_toks": 3 + index,
            "arrival_time_ns": index * 5_000_000,
            "input_tok_ids": list(range(20, 24 + index)),
        }
        for index in range(8)
    ]
    parts = [
        {"input_toks": 30, "output_toks": 4, "tool_duration_ns": 1e7,
         "input_tok_ids": [30] * 30},
        {"input_toks": 40, "output_toks": 5, "input_tok_ids": [40] * 40},
    ]  # fmt: skip
    session = {"session_id": "s", "arrival_time_ns": 0, "sub_requests": parts}
    trace.write_text("\n".join(map(json.dumps, [*lines, session])))
    before = len(server.engine.requests)
    flags = ["--dataset", str(trace), "--token-ids", "--record", str(record)]
    _run(monkeypatch, server, *flags)
    asked = sorted(server.engine.requests[before + 4 :], key=lambda r: r.tokens)
    assert [len(r.tokens) for r in asked if r.tokens[0] == 20] == [*range(4, 12)]
    measured = read_measured(record)
    assert sorted(measured.inputs) == [*range(4, 12), 30, 40]
    assert list(measured.outputs[:8]) == [*range(3, 11)]
    # The second of the session came behind the first.
    assert measured.arrival[9] >= measured.last[8] + 0.01
    assert all(
        gap >= -0.002 for gap in measured.arrival[:8] - [i * 5e-3 for i in range(8)]
    )
    costs = tmp_path / "costs.json"
    calibrate(["--measured", str(record), "--output", str(costs)])
    assert costs.exists()


def test_poisson_times() -> None:
    asked = load.arrivals([load.Ask(1, 1)] * 4000, rate=50.0, seed=1)
    times = [one.at or 0.0 for one in asked]
    assert times == sorted(times) and times[0] == 0
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert load.arrivals([load.Ask(1, 1)] * 4, 50.0, 1) == asked[:4]


def test_failures_are_counted_and_said(
    server: Serving, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, server, "--model", "other", "-n", "2")
    assert ended.value.code == 1
    assert "model must be one of" in capsys.readouterr().err
    good = load.Reply(0, 1.0, 5, 2, [1.5, 1.75], 2.0)
    bad = load.Reply(1, 1.0, ended=1.1, error="HTTP 500: x")
    found = summary([good, bad], 2)
    assert (found["requests"], found["failed"]) == (1, 1)
    assert found["errors"] == ["HTTP 500: x"]
    assert (found["ttft"]["mean"], found["tpot"]["mean"]) == (0.5, 0.25)
    with pytest.raises(ValueError, match="HTTP 500"):
        summary([bad], 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base-url", "ftp://x"], "--base-url must be"),
        (["--rate", "2", "--dataset", "x"], "--rate has no effect"),
        (["--concurrency", "1,2", "--record", "r"], "--record takes one"),
        (["--concurrency", "0"], "--concurrency"),
        (["--token-ids"], "needs the ids"),
        (["--body", "[]"], "must be a JSON object"),
        (["--plot", "x.txt"], "must end in"),
    ],
)
def test_wrong_usage(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(flags)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
