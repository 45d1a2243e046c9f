"""The commands, as a user runs them: launch forms, wrong usage, failure of a rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_ep.loading import find_model
from tests.support import tiny
from tests.support.launchers import MPI_AS_ROOT, free_ports, rank_environment
from tests.support.ranks import run_commands, start_commands
from tests.support.usage import assert_usage_errors
from tests.support.waiting import LONG, until

pytestmark = pytest.mark.requires("ranks")

BIN = Path(sys.executable).parent
GENERATE = [sys.executable, "-m", "mlx_ep.generate"]
CHAT = [sys.executable, "-m", "mlx_ep.chat"]
ASK = ["--prompt", "What is a hacker?", "--max-tokens", "12", "--ranks"]


@pytest.fixture(scope="module")
def expected() -> str:
    """What mlx-lm generates in one process."""
    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    messages = [{"role": "user", "content": "What is a hacker?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    assert len(text) > 20
    return text


def _launch(*argv: str) -> subprocess.CompletedProcess[str]:
    """mlx.launch, as from a shell in which the environment is activated."""
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment = rank_environment(MPI_AS_ROOT | path)
    return subprocess.run(
        [str(BIN / "mlx.launch"), *argv],
        capture_output=True,
        text=True,
        timeout=LONG,
        env=environment,
        input="",
    )


@pytest.mark.parametrize(
    "form",
    [
        ["-n", "2", "--", "mlx_ep.generate"],
        ["-n", "2", "--python", sys.executable, "-m", "mlx_ep.generate"],
        ["-n", "2", "--python", sys.executable, "--", "-m", "mlx_ep.generate"],
        pytest.param(
            [
                "--backend", "mpi", "-n", "2", "--mpi-arg=--oversubscribe", "--",
                "mlx_ep.generate",
            ],
            marks=pytest.mark.requires("mpi"),
        ),
    ],
    ids=["script", "module", "module after --", "mpi"],
)  # fmt: skip
def test_launch_forms(form: list[str], expected: str) -> None:
    port = [] if "mpi" in form else ["-p", str(free_ports(2)[0])]
    done = _launch(*port, *form, *ASK, "2")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("rank 0: experts 0..7 (8 of 16 per layer), "), done
    assert lines[2].startswith("rank 1: experts 8..15 (8 of 16 per layer), ")
    # In 80 columns: what follows of a rank is in a line of its own.
    assert all(line.startswith("  ") for line in (lines[1], lines[3]))
    assert max(map(len, lines[:4])) <= 80
    assert lines[4] == "strategy: replicated"
    assert lines[5] == "MoE EP backend: local_allreduce  TP=2  DP=1  EP=2"
    assert lines[6] == "=" * 10
    assert "\n".join(lines[7:]).startswith(expected)
    assert [line.split(":")[0] for line in lines[-3:]] == [
        "Prompt", "Generation", "Peak memory",
    ]  # fmt: skip
    assert done.stdout.count(expected) == 1  # rank 0 alone prints


@pytest.mark.parametrize("command", [GENERATE, [str(BIN / "mlx_ep.generate")]])
def test_one_rank_without_launcher(command: list[str], expected: str) -> None:
    done = subprocess.run(
        [*command, *ASK, "1", "--verbose", "F"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"


def test_prompt_from_stdin_and_from_a_file(tmp_path: Path, expected: str) -> None:
    options = ["--max-tokens", "12", "--verbose", "F"]
    question = "What is a hacker?"
    (stdin, other) = run_commands(
        2, [*GENERATE, "--prompt", "-", *options], stdin=question
    )
    assert stdin.stdout == expected + "\n"
    assert other.stdout == ""
    (tmp_path / "prompt.txt").write_text(question)
    prompt_file = ["--prompt-file", str(tmp_path / "prompt.txt")]
    (from_file,) = run_commands(1, [*GENERATE, *prompt_file, *options])
    assert from_file.stdout == expected + "\n"


def test_sampling_is_seeded_and_shared() -> None:
    """A seed gives mlx_lm.generate's text with that seed, on any number of ranks."""
    options = ["--prompt", "What is a hacker?", "--temp", "1.5", "--max-tokens", "20"]
    options += ["--xtc-probability", "0.3", "--top-k", "40", "--verbose", "F"]
    mx.random.seed(1)
    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    messages = [{"role": "user", "content": "What is a hacker?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    special = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
    sampler = make_sampler(
        1.5, top_k=40, xtc_probability=0.3, xtc_special_tokens=special
    )
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=20, sampler=sampler)
    texts = [
        run_commands(ranks, [*GENERATE, *options, "--seed", seed])[0].stdout
        for ranks, seed in ((1, "1"), (2, "1"), (2, "2"))
    ]
    assert texts[0] == texts[1] == expected + "\n" != texts[2]


def test_chat_remembers_and_forgets() -> None:
    asked = "What is a hacker?\n"
    long = "bug " * 6000 + "\n"  # beyond the context: refused, and the chat goes on
    script = f"{asked}/reset\n{long}{asked}What is a kludge?\n/quit\n"
    first, second = run_commands(2, [*CHAT, "--max-tokens", "16"], stdin=script)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert second.stdout == ""
    answers = [a.strip() for a in first.stdout.split(">> ")[1:]]
    assert answers[1] == "The conversation is forgotten."
    assert "must fit the model's context of 4096 tokens; with this" in answers.pop(2)
    text = [a.rsplit("[", 1)[0] for a in answers]
    assert text[0] == text[2] != text[3]
    assert len(text[3]) > 10


def test_chat_ends_with_the_input() -> None:
    for outcome in run_commands(2, CHAT, stdin=""):
        assert outcome.returncode == 0


def test_wrong_usage_known_on_all_ranks(tmp_path: Path) -> None:
    broken = {name: str(path) for name, path in _broken_models(tmp_path).items()}
    assert_usage_errors(
        2,
        [
            (["--model", "no/such/folder/here"], "no folder 'no/such/folder/here'"),
            (["--prompt-file", "no-such-file"], "No such file"),
            (["--prompt", ""], "must not be empty"),
            (["--model", broken["DENSE"], "--record", "x.npz"], "dense"),
            (["--model", broken["UNKNOWN"]], "not supported"),
            (
                ["--model", broken["INCOMPLETE"]],
                "does not describe a model of type 'qwen3_moe'",
            ),
            (["--model", broken["MISSING"]], "lacks 1 of the 2 weight files"),
            (["--model", broken["TRUNCATED"]], "is truncated"),
            (
                ["--memory-limit-gb", "0.001"],
                "do not fit: it needs 4.49 MB, 1.00 MB",
            ),
        ],
    )


def _broken_models(root: Path) -> dict[str, Path]:
    good = tiny.save_checkpoint(root / "good", tiny.QWEN3_MOE, shards=2)
    dense = tiny.save_checkpoint(root / "dense", tiny.DENSE)
    folders = {"DENSE": dense}
    for name in ("UNKNOWN", "INCOMPLETE", "MISSING", "TRUNCATED"):
        folders[name] = shutil.copytree(good, root / name)
    config = json.loads((good / "config.json").read_text())
    changed = {**config, "model_type": "no_such_type"}
    (folders["UNKNOWN"] / "config.json").write_text(json.dumps(changed))
    del config["moe_intermediate_size"]
    (folders["INCOMPLETE"] / "config.json").write_text(json.dumps(config))
    (folders["MISSING"] / "model-00002-of-00002.safetensors").unlink()
    cut = folders["TRUNCATED"] / "model-00001-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    return folders


def test_wrong_flags() -> None:
    assert_usage_errors(
        1,
        [
            (["--temp", "warm"], "--temp"),
            (["--max-tokens", "0"], "must be 1 or more"),
            (["--top-p", "1.5"], "between 0 and 1"),
            (["--reduction", "none"], "invalid choice"),
            (["--memory-limit-gb", "-1"], "a number above 0"),
            (["--no-such-flag"], "unrecognized arguments"),
            (["--ranks", "0"], "must be 1 or more, got 0"),
            (["--ranks", "3"], "got 3"),
        ],
    )


def test_another_number_of_ranks_than_asked_for() -> None:
    first, second = run_commands(2, [*GENERATE, "--ranks", "3"])
    assert (first.returncode, second.returncode) == (2, 2)
    assert "the launcher for ring started 2" in first.stderr


def test_more_ranks_than_the_transport_allows(tmp_path: Path) -> None:
    devices = [[None if i == j else "rdma_en1" for j in range(9)] for i in range(9)]
    (tmp_path / "devices.json").write_text(json.dumps(devices))
    environment = {
        "MLX_RANK": "0",
        "MLX_IBV_DEVICES": str(tmp_path / "devices.json"),
        "MLX_JACCL_COORDINATOR": "127.0.0.1:1",
    }
    done = subprocess.run(
        GENERATE, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "jaccl connects at most 8 ranks, got 9" in done.stderr


def test_a_folder_broken_on_one_rank_only(tmp_path: Path) -> None:
    """Each rank looks at its own disk: here, another working directory."""
    tiny.save_checkpoint(tmp_path / "model", tiny.QWEN3_MOE)
    program = (
        "import os, sys; rank = os.environ['MLX_RANK']; "
        f"os.chdir({str(tmp_path)!r} if rank == '0' else '/'); "
        "sys.argv = ['mlx_ep.generate', '--model', './model']; "
        "from mlx_ep.generate import main; main()"
    )
    first, second = run_commands(2, [sys.executable, "-c", program])
    assert (first.returncode, second.returncode) == (2, 2)
    assert "error: rank 1: --model must be a model folder" in first.stderr
    assert len(first.stderr.splitlines()) == 1
    assert second.stderr == ""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_rank_that_is_killed_ends_all(
    tmp_path: Path, victim: int, number: signal.Signals
) -> None:
    # Random weights do not come to an end by themselves.
    model = str(tiny.save_checkpoint(tmp_path, tiny.QWEN3_MOE))
    command = [*GENERATE, "--max-tokens", "100000", "--model", model]
    with start_commands(3, command) as started:
        until(lambda: "=====" in started.outcome(0).stdout, lambda: started.outcome(0))
        time.sleep(0.5)
        started.processes[victim].send_signal(number)
        outcomes = started.wait()
    assert all(outcome.returncode != 0 for outcome in outcomes)
    said = "interrupted" if number == signal.SIGINT else f"rank {victim} ended without"
    for rank in {0, 1, 2} - {victim}:
        assert said in outcomes[rank].stderr


def test_a_rank_that_raises_ends_all(tmp_path: Path) -> None:
    """The checkpoint of rank 1 shrinks after its headers were checked."""
    for rank in "012":
        tiny.save_checkpoint(tmp_path / rank, tiny.QWEN3_MOE)
    program = f"""
import os, sys
from pathlib import Path
rank = os.environ["MLX_RANK"]
os.chdir({str(tmp_path)!r})
import mlx_ep.loading.weights as weights
load_local = weights.load_local
def cut_and_load(*args):
    if rank == "1":
        file = Path(rank, "model.safetensors")
        file.write_bytes(file.read_bytes()[:100_000])
    return load_local(*args)
weights.load_local = cut_and_load
sys.argv = ["mlx_ep.generate", "--model", f"./{{rank}}"]
from mlx_ep.generate import main
main()
"""
    outcomes = run_commands(3, [sys.executable, "-c", program])
    assert [outcome.returncode for outcome in outcomes] == [1, 1, 1]
    for outcome in outcomes:
        assert "rank 1 failed: RuntimeError: [load_safetensors]" in outcome.stderr
