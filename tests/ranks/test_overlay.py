"""mlx-lm's own commands, unmodified, on an overlay: expert-parallel, the same text."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import sharded_load

from mlx_ep.comm import GroupComm, default_cpu_stream
from mlx_ep.config import EPConfig
from mlx_ep.loading import find_model
from mlx_ep.overlay.make import MODEL_FILE, make_overlay
from tests.support import tiny
from tests.support.launchers import free_ports
from tests.support.ranks import StartedCommands, run_commands, run_ranks, start_commands
from tests.support.waiting import LONG, until

pytestmark = pytest.mark.requires("ranks")

MLX_LM = [sys.executable, "-m", "mlx_lm"]
OVERLAY = [sys.executable, "-m", "mlx_ep.overlay"]
QUESTIONS = [
    "What is a hacker?",
    "What is a kludge? Explain it to somebody who has never seen one.",
    "Define foo.",
    "What is spaghetti code?",
]


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Overlays of the embedded model and of one that mlx-lm cannot shard."""
    root = tmp_path_factory.mktemp("overlays")
    tiny.save_checkpoint(root / "mixtral", tiny.MIXTRAL)
    for name, model in (("jargon-moe", "jargon-moe"), ("mixtral", root / "mixtral")):
        make_overlay(str(model), root / f"{name}-ep")
    return {path.name: str(path) for path in root.iterdir()}


def _run(num_ranks: int, tool: str, overlay: str, *argv: str, **options: Any) -> Any:
    command = [*MLX_LM, tool, "--model", overlay, "--trust-remote-code", *argv]
    return run_commands(num_ranks, command, **options)


def _text(model: str, question: str, max_tokens: int) -> str:
    """What mlx-lm generates in one process."""
    loaded, tokenizer = mlx_lm.load(model)[:2]
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_lm.generate(loaded, tokenizer, prompt, max_tokens=max_tokens)


def test_generate(overlays: dict[str, str]) -> None:
    short = ["--prompt", QUESTIONS[0], "--max-tokens", "12", "--verbose", "F"]
    expected = _text(overlays["mixtral"], QUESTIONS[0], 12) + "\n"
    outcomes = _run(2, "generate", overlays["mixtral-ep"], *short)
    assert [o.returncode for o in outcomes] == [0, 0], outcomes[0].stderr
    assert [o.stdout for o in outcomes] == [expected, expected]  # each rank prints
    assert "rank 0: experts 0..2 (3 of 5 per layer)" in outcomes[0].stderr
    assert "experts" not in outcomes[1].stderr
    # One rank: mlx-lm's own way, with nothing of ours.
    (alone,) = _run(1, "generate", overlays["mixtral-ep"], *short)
    assert (alone.returncode, alone.stdout) == (0, expected), alone.stderr
    assert "experts" not in alone.stderr


@contextmanager
def _server(overlay: str, num_ranks: int) -> Iterator[tuple[StartedCommands, str]]:
    """mlx_lm.server on ranks, once it answers, and its address."""
    (port,) = free_ports(1)
    command = [*MLX_LM, "server", "--model", overlay, "--trust-remote-code"]
    with start_commands(num_ranks, [*command, "--port", str(port)]) as started:
        address = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert started.outcome(0).returncode is None, started.outcome(0)
            with contextlib.suppress(OSError):
                return bool(urllib.request.urlopen(f"{address}/health", timeout=LONG))
            return False

        until(answers, lambda: started.outcome(0).stderr)
        yield started, address


def _ask(address: str, question: str, max_tokens: int, **options: Any) -> str:
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        **options,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=LONG) as response:
        return json.loads(response.read())["choices"][0]["message"]["content"]


def _serve_and_compare(overlay: str, model: str, num_ranks: int, rounds: int) -> None:
    expected = [_text(model, question, 24) for question in QUESTIONS]
    with _server(overlay, num_ranks) as (started, address), ThreadPoolExecutor() as go:
        for _ in range(rounds):
            found = list(go.map(lambda q: _ask(address, q, 24), QUESTIONS))
            assert found == expected
        # A seed makes the server leave its batches: another way through the model.
        assert _ask(address, QUESTIONS[1], 24, seed=1) == expected[1]
        assert _ask(address, QUESTIONS[0], 24) == expected[0]
        for rank in range(num_ranks):
            assert started.processes[rank].poll() is None, started.outcome(rank)
        said = started.outcome(0).stderr
        assert all(f"rank {rank}: experts " in said for rank in range(num_ranks))


def test_server_answers_several_at_once(overlays: dict[str, str]) -> None:
    model = str(find_model("jargon-moe"))
    _serve_and_compare(overlays["jargon-moe-ep"], model, 2, rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_ranks"), [("jargon-moe", 3), ("mixtral", 2)])
def test_server_for_longer(overlays: dict[str, str], name: str, num_ranks: int) -> None:
    model = overlays.get(name) or str(find_model(name))
    _serve_and_compare(overlays[f"{name}-ep"], model, num_ranks, rounds=8)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_whose_worker_is_gone_ends(
    overlays: dict[str, str], number: signal.Signals
) -> None:
    """Requests end, and nobody is told that all is well."""
    with _server(overlays["jargon-moe-ep"], 2) as (started, address):
        _ask(address, QUESTIONS[0], 4)
        started.processes[1].send_signal(number)
        start = time.monotonic()
        with pytest.raises(OSError):
            _ask(address, QUESTIONS[1], 4)
        first, _ = started.wait()
        assert time.monotonic() - start < 10
    assert first.returncode not in (0, None)
    said = "rank 1 stopped" if number == signal.SIGSTOP else "rank 1 ended without"
    assert said in first.stderr


@pytest.mark.slow
def test_a_server_that_is_interrupted_ends_all(overlays: dict[str, str]) -> None:
    with _server(overlays["jargon-moe-ep"], 2) as (started, address):
        _ask(address, QUESTIONS[0], 4)
        started.processes[0].send_signal(signal.SIGINT)
        _, second = started.wait()
    assert second.returncode not in (0, None)
    assert "rank 0 has ended its server" in second.stderr


@pytest.mark.slow
def test_chat(overlays: dict[str, str]) -> None:
    script = "".join(f"{line}\n" for line in [QUESTIONS[0], "r", QUESTIONS[3], "q"])
    outcomes = _run(
        2, "chat", overlays["jargon-moe-ep"], "--max-tokens", "24", stdin=script
    )
    assert [o.returncode for o in outcomes] == [0, 0], outcomes[0].stderr
    for question in (QUESTIONS[0], QUESTIONS[3]):
        text = _text(str(find_model("jargon-moe")), question, 24)
        assert text in outcomes[0].stdout
        assert text not in outcomes[1].stdout


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "3"])
def test_benchmark(overlays: dict[str, str], batch: str) -> None:
    sizes = ["-p", "40", "-g", "8", "-n", "2", "-b", batch]
    first, second = _run(2, "benchmark", overlays["mixtral-ep"], *sizes)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "Averages: prompt_tps=" in first.stdout
    assert second.stdout == ""


_WITH_A_FILE_PER_RANK = """
import os, sys
folder, *argv = sys.argv[1:]
file = f"{folder}/cache-{os.environ.get('MLX_RANK', '0')}.safetensors"
sys.argv = ["mlx_lm", *argv, "--prompt-cache-file", file]
from mlx_lm.cli import main
main()
"""


@pytest.mark.slow
def test_a_prompt_cache(overlays: dict[str, str], tmp_path: Path) -> None:
    """mlx_lm.cache_prompt, then mlx_lm.generate, as on hosts with their own disks."""
    command = [sys.executable, "-c", _WITH_A_FILE_PER_RANK, str(tmp_path)]
    model = ["--model", overlays["jargon-moe-ep"], "--trust-remote-code"]
    text = ["--prompt", "What is a kludge? What is a compiler?"]
    for outcome in run_commands(2, [*command, "cache_prompt", *model, *text]):
        assert outcome.returncode == 0, outcome.stderr
    text = ["--prompt", QUESTIONS[0], "--max-tokens", "8", "--verbose", "F"]
    outcomes = run_commands(2, [*command, "generate", *model, *text])
    (alone,) = run_commands(1, [*command, "generate", *model, *text])
    assert [o.stdout for o in outcomes] == [alone.stdout] * 2, outcomes
    assert alone.stdout.strip()


# ---------------------------------------------------------------- streams


def _mix_collectives(group: mx.distributed.Group, steps: int) -> bool:
    """Sums of a model in flight, and mlx-lm's own between them, as in its server."""
    comm = GroupComm(group, stream=default_cpu_stream)
    rank, size = group.rank(), group.size()
    total = size * (size + 1) // 2
    x = mx.full((64, 1024), float(rank + 1))
    for step in range(steps):
        ahead = comm.all_reduce(comm.all_reduce(x) * float(step + 1))
        mx.async_eval(ahead)
        said = mx.distributed.all_sum(mx.array([rank + 1, step * (rank == 0)]))
        if said.tolist() != [total, step]:
            return False
        if not np.all(np.array(ahead) == total * size * (step + 1)):
            return False
    return True


def test_collectives_of_mlx_lm_and_ours_keep_apart() -> None:
    assert run_ranks(2, _mix_collectives, 100) == [True, True]


# ---------------------------------------------------------------- refused


@pytest.mark.slow
def test_evaluate_is_refused(overlays: dict[str, str], tmp_path: Path) -> None:
    """The real mlx_lm.evaluate, over a stand-in for the package that it imports."""
    for name in ("lm_eval/__init__", "lm_eval/api/__init__"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "lm_eval/tasks.py").write_text("class TaskManager: pass")
    (tmp_path / "lm_eval/api/model.py").write_text("class LM: pass")
    (tmp_path / "lm_eval/api/registry.py").write_text(
        "def register_model(name): return lambda kind: kind"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "sys.argv = ['mlx_lm', 'evaluate', *sys.argv[1:]]; "
        "from mlx_lm.cli import main; main()"
    )
    argv = ["--model", overlays["mixtral-ep"], "--trust-remote-code", "--tasks", "x"]
    argv += ["--output-dir", str(tmp_path / "results")]
    outcomes = run_commands(2, [sys.executable, "-c", program, *argv])
    for outcome in outcomes:
        assert outcome.returncode == 1
        assert "mlx_lm.evaluate cannot run expert-parallel: it is data-parallel by" in (
            outcome.stderr
        )


@pytest.mark.slow
def test_what_cannot_work_is_refused_on_all_ranks(overlays: dict[str, str]) -> None:
    overlay = overlays["jargon-moe-ep"]
    for outcome in _run(2, "benchmark", overlay, "--pipeline", "-p", "8"):
        assert outcome.returncode == 1
        assert "--pipeline spreads layers and not experts" in outcome.stderr
    without_trust = [*MLX_LM, "generate", "--model", overlay]
    for outcome in run_commands(2, without_trust):
        assert outcome.returncode == 1
        assert "trust_remote_code=True" in outcome.stderr


def _refused(group: mx.distributed.Group, overlay: str) -> str:
    model, _ = sharded_load(overlay, None, group, trust_remote_code=True)
    with pytest.raises(ValueError) as refused:
        model.load_weights("adapters.safetensors", strict=False)
    return str(refused.value)


@pytest.mark.slow
def test_adapters_are_refused(overlays: dict[str, str]) -> None:
    for text in run_ranks(2, _refused, overlays["mixtral-ep"]):
        assert "takes no further weights: adapters" in text


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all(overlays: dict[str, str]) -> None:
    command = [*MLX_LM, "generate", "--model", overlays["mixtral-ep"]]
    command += ["--trust-remote-code", "--max-tokens", "100000", "--prompt", "x"]
    with start_commands(2, command) as started:
        until(lambda: "=====" in started.outcome(0).stdout, lambda: started.outcome(0))
        time.sleep(0.5)
        started.processes[1].kill()
        first, _ = started.wait()
    assert first.returncode == 1
    assert "rank 1 ended without a word" in first.stderr


# ---------------------------------------------------------------- making


@pytest.mark.slow
def test_the_command_makes_it_once_on_a_host(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    model = str(find_model("jargon-moe"))
    argv = [*OVERLAY, model, "--output", str(folder), "--runner", "gather"]
    first, second = run_commands(2, [*argv, "--ranks", "2"])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert second.stdout == ""
    for tool in ("server", "chat", "generate", "benchmark"):
        line = f"mlx.launch --hostfile hosts.json -- mlx_lm.{tool} --model {folder}"
        assert line in first.stdout
    config = json.loads((folder / "config.json").read_text())
    original = json.loads((Path(model) / "config.json").read_text())
    assert config == {**original, "model_file": MODEL_FILE}
    for file in Path(model).iterdir():
        if file.name != "config.json":
            assert (folder / file.name).resolve() == file.resolve()
    settings = json.loads((folder / "mlx_ep.json").read_text())
    assert settings["config"]["runner"] == "gather"
    assert settings["ranks"] == 2
    # Again, over itself; and the number of ranks is held to.
    assert make_overlay(model, folder, ranks=3) == folder.resolve()
    for outcome in _run(2, "generate", str(folder), "--prompt", "x"):
        assert outcome.returncode == 1
        assert "made with --ranks 3, got 2" in outcome.stderr


def test_wrong_usage(tmp_path: Path) -> None:
    dense = tiny.save_checkpoint(tmp_path / "dense", tiny.DENSE)
    model = str(tiny.save_checkpoint(tmp_path / "model", tiny.MIXTRAL))
    overlay = str(make_overlay(model, tmp_path / "overlay"))
    with pytest.raises(ValueError, match="no routed experts"):
        make_overlay(str(dense), tmp_path / "new")
    with pytest.raises(ValueError, match="--overlap none or single, got two"):
        make_overlay(model, tmp_path / "new", config=EPConfig(overlap="two"))
    with pytest.raises(ValueError, match="is an overlay already"):
        make_overlay(overlay, tmp_path / "new")
    with pytest.raises(ValueError, match="new or empty folder, or an overlay"):
        make_overlay(model, dense)
    with pytest.raises(ValueError, match="--strategy replicated only, got gathered"):
        make_overlay(model, tmp_path / "new", EPConfig(strategy="gathered"))
    argv = [*OVERLAY, model, "--output", str(tmp_path / "x"), "--strategy", "auto"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mlx_ep.overlay: error: mlx-lm's commands give every")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()
