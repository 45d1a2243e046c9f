"""Plan's advice and its launch line, for random clusters and models."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_ep.cli.hosts import read_hostfile
from mlx_ep.plan.build import Plan, make_plan
from mlx_ep.plan.flags import make_parser
from mlx_ep.plan.launch_line import memory_of
from tests.support import tiny
from tests.support.waiting import LONG

STEP = 256


def plan(*flags: str) -> Plan:
    return make_plan(make_parser().parse_args(list(flags)))


def random_model(rng: random.Random, folder: Path) -> Path:
    """A config.json alone."""
    config: dict[str, Any] = dict(rng.choice([tiny.QWEN3_MOE, tiny.MIXTRAL]))
    config["num_hidden_layers"] = rng.choice([2, 3])
    if "num_local_experts" in config:
        config["num_local_experts"] = rng.choice([4, 6, 8])
    else:
        config["num_experts"] = rng.choice([4, 10, 16])
        config["head_dim"] = rng.choice([32, 64])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "count",
    [4, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_the_context_it_offers_fits_and_the_next_step_does_not(
    count: int, tmp_path: Path
) -> None:
    rng = random.Random(count)
    offered = 0
    while offered < count:
        model = random_model(rng, tmp_path / str(rng.random()))
        flags = ["--model", str(model)]
        context = rng.randrange(300, 40_000)
        ranks = rng.randrange(1, 5)
        if "head_dim" in (model / "config.json").read_text() and rng.random() < 0.3:
            flags += ["--kv-bits", "4", "--kv-group-size", "32"]
        if rng.random() < 0.3:
            flags += ["--prefill-step-size", str(rng.choice([256, 512, 4096]))]
        free = plan(*flags, "--ranks", str(ranks), "--context", str(context))
        total = max(need.total_bytes for need in free.needs) / 1e9
        memory = ",".join(f"{total * rng.uniform(0.4, 1.3):g}" for _ in range(ranks))
        flags += ["--memory", memory]
        found = plan(*flags, "--context", str(context))
        (words,) = [a for a in found.advice if a.startswith("A smaller")] or [""]
        if found.fits or not words:
            continue
        offered += 1
        best = int(words.split(": ")[1].split()[0])
        assert best < context
        assert plan(*flags, "--context", str(best)).fits, (flags, context, best)
        more = min(best + STEP, context)
        assert not plan(*flags, "--context", str(more)).fits, (flags, context, best)


@pytest.mark.requires("ranks")
@pytest.mark.parametrize(
    "more",
    [
        ["--memory", "0.2,0.1", "--context", "1000"],
        pytest.param(
            ["--ranks", "2", "--ep", "1", "--kv-bits", "4", "--kv-group-size", "32"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--memory", "0.2,0.1", "--replica-memory", "0.0005"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_launch_line_runs(more: list[str], tmp_path: Path) -> None:
    config = {**tiny.QWEN3_MOE, "head_dim": 32, "moe_intermediate_size": 64}
    config["torch_dtype"] = "float32"  # as dummy weights are without Metal
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan("--model", str(tmp_path / "config.json"), *more)
    assert found.launch[:4] == ["mlx_ep.launch", "-n", "2", "--"]
    for flag in (word for word in more if word.startswith("--")):
        assert flag in found.launch
    done = subprocess.run(
        [sys.executable, "-m", *found.launch, "--dummy-weights", "--max-tokens", "4"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    for need in found.needs:
        assert f"rank {need.rank}: {need.experts}" in done.stdout


def test_what_is_printed_fits_a_terminal_and_can_be_pasted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_ep.plan.__main__ import main

    flags = ["--model", "jargon-moe", "--memory", "0.06,0.05", "--chip", "m3-ultra"]
    monkeypatch.setattr(sys, "argv", ["mlx_ep.plan", *flags])
    main()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "Metal's default fence" in text.replace("\n", " ")
    pasted = text[text.index("    mlx_ep.launch") :].split("\n\n")[0]
    assert shlex.split(pasted.replace("\\\n", "")) == plan(*flags).launch


def test_the_memory_of_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host is asked once; ranks of one host share what it has."""
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        is_mac = "mac2" in command
        return SimpleNamespace(stdout="96000000000\n" if is_mac else "", stderr="no\n")

    hosts = [{"ssh": "mac2", "ips": ["10.0.0.2"]}] * 2
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps({"envs": ["PATH=/x y"], "hosts": hosts}))
    monkeypatch.setattr("mlx_ep.plan.launch_line.subprocess.run", run)
    assert memory_of(read_hostfile(file)) == (48.0, 48.0)
    ((*ssh, words),) = asked
    assert ssh == ["ssh", "-o", "BatchMode=yes", "mac2"]
    assert shlex.split(words)[:2] == ["env", "PATH=/x y"]
    found = plan("--model", "jargon-moe", "--hostfile", str(file))
    assert found.launch[1:3] == ["--hostfile", str(file)]
    assert [need.memory for need in found.needs] == [48_000_000_000] * 2
    file.write_text(json.dumps([{"ssh": "mac9"}]))
    with pytest.raises(ValueError, match=r"the memory of mac9 must be known.*\(no\)"):
        plan("--model", "jargon-moe", "--hostfile", str(file))
    with pytest.raises(ValueError, match="has 1 hosts, a rank on each"):
        plan("--model", "jargon-moe", "--hostfile", str(file), "--ranks", "2")


def test_this_machine_says_its_memory(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text('[{"ssh": "127.0.0.1"}]')
    (gigabytes,) = memory_of(read_hostfile(file))
    assert gigabytes > 0.1
