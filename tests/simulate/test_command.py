"""The command: the tutorial's line, memory, outputs, validate and calibrate."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from mlx_ep.loading import held_bytes
from mlx_ep.loading.estimate import ModelOutline
from mlx_ep.placement import Placement
from mlx_ep.simulate import calibrate, results
from mlx_ep.simulate.measured import read_measured, read_simulated
from mlx_ep.simulate.model import read_model
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.simulate.times.linear_times import StepCosts
from tests.support.simulate.data import (
    MOE,
    cluster,
    instance,
    trace_lines,
    two_members,
    write_trace,
)
from tests.support.simulate.running import make_engine, run_command
from tests.support.simulate.tutorial import TUTORIAL, tutorial_folder

HEADER = (
    "instance id,request id,model,input,output,arrival,end_time,latency,queuing_delay,"
    "TTFT,TPOT,ITL"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tutorial_folder(tmp_path, monkeypatch)


def test_tutorial(folder: Path) -> None:
    outcome = run_command(TUTORIAL.split())
    assert outcome.code == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    log = [line for line in lines if line.startswith("[INFO]")]
    assert len(log) >= 3
    for line in log:
        assert re.fullmatch(
            r"\[INFO\] step=\d+ batch=\d+ prompt_t=\d+ tok/s decode_t=\d+ tok/s "
            r"npu_mem=\d+\.\d GB",
            line,
        )
    for text in ("request throughput", "prompt throughput", "generation throughput"):
        assert any(text in line for line in lines)
    assert re.search(
        r"^Instance \[0\] : \d+ tokens / \d+ blocks \(\d+\.\d\d GiB/rank at util "
        r"0\.90\)$",
        outcome.out,
        re.MULTILINE,
    )
    for metric in ("TTFT", "TPOT", "ITL"):
        assert re.search(
            rf"^  {metric} \(ms\)  mean .* median .* P99", outcome.out, re.M
        )


def test_csv(folder: Path) -> None:
    """The header, whole numbers, and what they say of one another."""
    run_command(TUTORIAL.split())
    text = Path("out.csv").read_text()
    assert text.splitlines()[0] == HEADER
    rows = list(csv.DictReader(text.splitlines()))
    assert sorted(int(row["request id"]) for row in rows) == list(range(20))
    ends = [int(row["end_time"]) for row in rows]
    assert ends == sorted(ends)
    for row in rows:
        latency, ttft, outputs = (int(row[k]) for k in ("latency", "TTFT", "output"))
        gaps = json.loads(row["ITL"])
        assert latency == int(row["end_time"]) - int(row["arrival"])
        assert len(gaps) == outputs - 1 and latency == ttft + sum(gaps)
        wanted = (latency - ttft) // (outputs - 1) if outputs > 1 else 0
        assert int(row["TPOT"]) == wanted
        assert 0 <= int(row["queuing_delay"]) < ttft


def test_log_counts_every_token(folder: Path) -> None:
    flags = TUTORIAL.split()
    engine = make_engine(Path(flags[1]), Path(flags[7]), "--no-enable-prefix-caching")
    engine.run()
    for interval in (0.05, 1.0, 100.0):
        found = results.moments(engine, interval)
        prompts = sum(moment.prompts for moment in found) * interval
        outputs = sum(moment.outputs for moment in found) * interval
        asked = [request.asked for request in engine.requests]
        # A prompt of one token is computed as a decode is.
        assert prompts == pytest.approx(
            sum(a.input_tokens for a in asked if a.input_tokens > 1)
        )
        assert outputs == pytest.approx(sum(a.output_tokens for a in asked))
        assert found[-1].step == engine.groups[0].log.count


def test_run_id_json_and_levels(folder: Path) -> None:
    more = ["--output", "out-{run_id}.csv", "--run-id", "a1", "--json", "t.json"]
    outcome = run_command([*TUTORIAL.split(), *more, "--log-level", "WARNING"])
    assert outcome.code == 0 and "[INFO]" not in outcome.out
    assert Path("out-a1.csv").is_file()
    content = json.loads(Path("t.json").read_text())
    assert content["requests"] == 20 and content["preemptions"] == 0
    lines = Path("out-a1.csv").read_text().splitlines()
    assert content["clocks_ns"] == max(int(line.split(",")[6]) for line in lines[1:])
    few = run_command([*TUTORIAL.split(), "--num-reqs", "3", "--log-level", "DEBUG"])
    assert "debug: nodes[0].instances[0]: times from" in few.err
    assert len(Path("out.csv").read_text().splitlines()) == 4


def test_as_a_module_and_twice_the_same(folder: Path) -> None:
    """Two processes with other hash seeds write the same bytes."""
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "mlx_ep.simulate", *TUTORIAL.split()],
            capture_output=True,
            env={
                "PYTHONPATH": ":".join(sys.path),
                "PYTHONHASHSEED": seed,
                "PATH": "/usr/bin",
            },
            check=True,
        )
        found.add((Path("out.csv").read_bytes(), done.stdout))
    assert len(found) == 1


def test_all_shapes_of_clusters_run(folder: Path) -> None:
    """The kinds of the tutorial's six cluster files."""
    two_nodes = two_members(tp_size=2)
    one = two_nodes["nodes"][0]["instances"][0] | {"ep_size": 4, "num_npus": 2}
    node = two_nodes["nodes"][0] | {"num_instances": 1, "instances": [one]}
    two_nodes |= {
        "num_nodes": 2,
        "nodes": [node, node],
        "link_bw": [128, 16],
        "link_latency": [500, 20000],
    }
    kinds = {
        "dp ep": two_members(),
        "multi": cluster(instance(), instance()),
        "pd": cluster(instance(pd_type="prefill"), instance(pd_type="decode")),
        "pp": cluster(instance(tp_size=2, pp_size=2, ep_size=2, num_npus=4)),
        "two nodes": two_nodes,
    }
    for name, content in kinds.items():
        Path("c.json").write_text(json.dumps(content))
        outcome = run_command([*TUTORIAL.split(), "--cluster-config", "c.json"])
        assert outcome.code == 0, (name, outcome.err)
        assert len(Path("out.csv").read_text().splitlines()) == 21


@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_what_the_loader_holds(packed: bool, tmp_path: Path) -> None:
    """EP halves the experts: within 1% of the bytes of the loader's own outline."""
    config = dict(MOE)
    if packed:
        config["quantization"] = {"bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    sizes = read_model("m", tmp_path / "config.json")
    outline = ModelOutline.open(tmp_path)
    for ranks in (1, 2, 4):
        made = outline.make(Placement.contiguous(16, ranks), 0)
        found = sizes.weight_bytes(1, ranks, 1, 2)
        assert found == pytest.approx(held_bytes(made), rel=0.01)


def test_expert_parallelism_halves_experts(folder: Path) -> None:
    engines = {}
    for name, content in (("one", cluster(instance())), ("two", two_members())):
        Path("c.json").write_text(json.dumps(content))
        engines[name] = make_engine(Path("c.json"), Path("traces/example_trace.jsonl"))
    one, two = (e.cluster.instances[0] for e in (engines["one"], engines["two"]))
    saved = one.pool.weight_bytes - two.pool.weight_bytes
    assert saved == one.model.expert_weights  # half of two bytes each
    assert two.pool.num_blocks > one.pool.num_blocks


def _measure(file: Path, simulated: Path, factor: float) -> None:
    """A recording of a server that takes `factor` times as long as was simulated."""
    found = read_simulated(simulated)
    lines = [
        {
            "request_id": f"bench-{i}",
            "input_toks": int(found.inputs[i]),
            "output_toks": int(found.outputs[i]),
            "queued_ts": 100 + found.arrival[i],
            "first_token_ts": 100
            + found.arrival[i]
            + factor * (found.first[i] - found.arrival[i]),
            "last_token_ts": 100
            + found.arrival[i]
            + factor * (found.last[i] - found.arrival[i]),
        }
        for i in range(len(found))
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))


def test_validate(folder: Path) -> None:
    run_command(TUTORIAL.split())
    _measure(Path("m.jsonl"), Path("out.csv"), 1.25)
    argv = ["validate", "--measured", "m.jsonl", "--simulated", "out.csv"]
    outcome = run_command([*argv, "--plot", "v.png", "--json", "v.json"])
    assert outcome.code == 0, outcome.err
    rows = json.loads(Path("v.json").read_text())
    assert len(rows) == 15
    assert {row["metric"] for row in rows} == {"TTFT", "TPOT", "latency"}
    for row in rows:
        assert row["difference_percent"] == pytest.approx(-20, abs=0.5)
    assert len(outcome.out.splitlines()) == 16
    assert Path("v.png").read_bytes().startswith(b"\x89PNG")
    few = Path("m.jsonl").read_text().splitlines()[:-1]
    Path("few.jsonl").write_text("\n".join(few))
    bad = run_command([*argv[:2], "few.jsonl", *argv[3:]])
    assert (
        bad.code == 2 and "must have the same requests; they have 19 and 20" in bad.err
    )


def test_calibrate_finds_the_costs_of_a_server(folder: Path) -> None:
    """A server whose steps take what four numbers say: with them the equations hold
    exactly, and from elsewhere the fit comes close enough to predict requests.
    """
    true = {"step": 4e-3, "prompt_token": 2e-5, "sequence": 1e-4, "key": 1e-6}
    costs = {"format": "mlx_ep.step-costs", "version": 1} | true
    Path("true.json").write_text(json.dumps(costs))
    Path("c.json").write_text(json.dumps(cluster(instance(hardware="true.json"))))
    lines = trace_lines(80, gap_ns=4e7, outputs=(20, 80))
    write_trace(Path("t.jsonl"), lines)
    flags = ["--dataset", "t.jsonl", "--output", "out.csv"]
    assert run_command(["--cluster-config", "c.json", *flags]).code == 0
    _measure(Path("m.jsonl"), Path("out.csv"), 1.0)
    measured = read_measured(Path("m.jsonl"))
    trace = calibrate.trace_of(measured, None)
    engine, times = calibrate._run(trace, EngineSettings(), 1 << 20, StepCosts(**true))
    solved = calibrate._solve(measured, engine, times, 80)
    assert asdict(solved) == pytest.approx(true, rel=1e-6)
    argv = ["calibrate", "--measured", "m.jsonl", "--output", "fit.json"]
    outcome = run_command([*argv, "--fit", "0.5", "--json", "errors.json"])
    assert outcome.code == 0, outcome.err
    found = json.loads(Path("fit.json").read_text())
    # Prompts are few: steps and their parts are told apart by and large.
    assert found["step"] == pytest.approx(true["step"], rel=0.2)
    assert found["prompt_token"] == pytest.approx(true["prompt_token"], rel=0.3)
    errors = json.loads(Path("errors.json").read_text())
    assert max(errors["held out"].values()) < 10
    # And it is the hardware of an instance.
    Path("c.json").write_text(json.dumps(cluster(instance(hardware="fit.json"))))
    assert run_command(["--cluster-config", "c.json", *flags]).code == 0
    again = read_simulated(Path("out.csv")).metrics["latency"]
    truth = read_measured(Path("m.jsonl")).metrics["latency"]
    assert np.median(np.abs(again / truth - 1)) < 0.05


def test_a_hardware_profile_is_a_time_model(folder: Path) -> None:
    """A shipped profile through the cost model; more Macs hold less each."""
    fast, held = {}, {}
    for ranks in (1, 2):
        one = instance(hardware="m3-ultra", tp_size=ranks, ep_size=ranks)
        Path("c.json").write_text(json.dumps(cluster(one)))
        argv = [*TUTORIAL.split(), "--cluster-config", "c.json", "--json", "t.json"]
        outcome = run_command(argv)
        assert outcome.code == 0, outcome.err
        content = json.loads(Path("t.json").read_text())
        fast[ranks] = content["instances"][0]["tpot_ms"]["mean"]
        held[ranks] = content["instances"][0]["weight_bytes"]
    assert held[2] < held[1] and fast[1] > 0 and fast[2] > 0
    # With whole attention each device holds all caches and dense weights.
    whole = run_command([*argv, "--expert-exchange", "replicated"])
    assert whole.code == 0, whole.err
    replicated = json.loads(Path("t.json").read_text())["instances"][0]
    assert held[2] < replicated["weight_bytes"] < held[1]
    assert replicated["kv_blocks"] < content["instances"][0]["kv_blocks"]
    bad = run_command([*argv, "--expert-routing-policy", "RR"])
    assert bad.code == 2 and "uniform routing" in bad.err


@pytest.mark.parametrize(
    "line, text",
    [
        ({"queued_ts": 1}, "line 1: first_token_ts: is missing"),
        (
            {"queued_ts": 3, "first_token_ts": 2, "last_token_ts": 4},
            "must lie between queued_ts and last_token_ts",
        ),
        ("{", "line 1: must be JSON"),
        ("", "must hold at least one request"),
    ],
)
def test_bad_measurements(line: object, text: str, folder: Path) -> None:
    Path("m.jsonl").write_text(line if isinstance(line, str) else json.dumps(line))
    for argv in (
        ["calibrate", "--measured", "m.jsonl"],
        ["validate", "--measured", "m.jsonl", "--simulated", "none.csv"],
    ):
        outcome = run_command(argv)
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
        assert text in outcome.err and "m.jsonl" in outcome.err
