"""Ranks load models from a hub: what they fetch, and how they end when they cannot."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_ep
from mlx_ep.config import EPConfig
from tests.support import tiny
from tests.support.hub_layouts import HUB_LAYOUTS
from tests.support.hub_server import HubServer, Repository, use_cache
from tests.support.ranks import run_commands, run_ranks, start_commands
from tests.support.usage import outcomes_of

pytestmark = pytest.mark.requires("ranks")

# Wide enough for headers, which every rank needs whole, to be few of the bytes.
WIDE = {"hidden_size": 128, "vocab_size": tiny.VOCABULARY}
QWEN3 = {**tiny.QWEN3_MOE, **WIDE, "moe_intermediate_size": 96}
GRANITE = {
    **WIDE,
    "model_type": "granitemoe",
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 10,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-5,
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
PROMPT = np.random.default_rng(0).integers(2, tiny.VOCABULARY, 40).tolist()
FAST = EPConfig(runner="gather", warmup=False)


def _fused(folder: Path) -> Path:
    """Gate and up in one tensor, as granitemoe is published."""
    tiny.save_checkpoint(folder, GRANITE)
    weights = dict(tree_flatten(tiny.make_model(GRANITE).parameters()))
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, HUB_LAYOUTS["granitemoe"](weights), {"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink()
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "stacked": partial(tiny.save_checkpoint, config=QWEN3, shards=2),
    "per-expert": partial(
        tiny.save_checkpoint, config=QWEN3, shards=3, layout="per_expert"
    ),
    "fused": _fused,
}
REPOSITORIES = [f"me/{name}" for name in LAYOUTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {f"me/{name}": save(root / name) for name, save in LAYOUTS.items()}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, tuple[list[int], np.ndarray]]:
    """What mlx-lm computes from the local folders."""
    return {
        name: _measure(*mlx_lm.load(str(folder))) for name, folder in folders.items()
    }


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[HubServer]:
    repositories = {name: Repository(folder) for name, folder in folders.items()}
    with HubServer(repositories) as hub:
        yield hub


def _measure(model: Any, tokenizer: Any) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits of a prompt."""
    responses = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=3)
    tokens = [response.token for response in responses]
    return tokens, np.array(model(mx.array([PROMPT])))


def _load(
    group: mx.distributed.Group, hosts: str, repositories: list[str]
) -> dict[str, tuple[int, list[int], np.ndarray]]:
    """Per repository the bytes held, greedy tokens and logits, each rank a host.

    Args:
        hosts: where the caches of the ranks are; "" for one cache, that of HF_HOME.
    """
    if hosts:
        use_cache(Path(hosts) / f"host{group.rank()}")
    os.environ["HF_TOKEN"] = f"hf_rank{group.rank()}"
    found = {}
    for repository in repositories:
        model, tokenizer = mlx_ep.load(repository, group, FAST)
        held = model.expert_parallel.reports[group.rank()].held_bytes
        found[repository] = (held, *_measure(model, tokenizer))
    return found


def _check(
    ranks: list[dict[str, tuple[int, list[int], np.ndarray]]],
    expected: dict[str, tuple[list[int], np.ndarray]],
) -> None:
    for found in ranks:
        for name, (_, tokens, logits) in found.items():
            assert tokens == expected[name][0], name
            np.testing.assert_allclose(logits, expected[name][1], atol=1e-4)


def _header_bytes(folder: Path) -> int:
    files = folder.glob("*.safetensors")
    return sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files)


def test_ranks_fetch_what_they_hold(
    hub: HubServer,
    folders: dict[str, Path],
    expected: dict[str, tuple[list[int], np.ndarray]],
    tmp_path: Path,
) -> None:
    """Two hosts, each with a cache of its own; tokens and logits of one process."""
    env = {"HF_ENDPOINT": hub.endpoint}
    ranks = run_ranks(2, _load, str(tmp_path), REPOSITORIES, env=env)
    _check(ranks, expected)
    for name, folder in folders.items():
        headers = _header_bytes(folder)
        files = {file.name for file in folder.glob("*.safetensors")}
        total = sum((folder / file).stat().st_size for file in files)
        for rank, found in enumerate(ranks):
            sent = sum(hub.sent[f"hf_rank{rank}", f"{name}/{file}"] for file in files)
            held = found[name][0]
            assert held <= sent - headers <= 1.02 * held
            assert held < 0.7 * total


@pytest.mark.slow
def test_the_next_start_is_offline(
    hub: HubServer, expected: dict[str, tuple[list[int], np.ndarray]], tmp_path: Path
) -> None:
    """After a first start on two hosts there is no request at all."""
    env = {"HF_ENDPOINT": hub.endpoint}
    run_ranks(2, _load, str(tmp_path), REPOSITORIES, env=env)
    hub.forget()
    env["HF_HUB_OFFLINE"] = "1"
    again = run_ranks(2, _load, str(tmp_path), REPOSITORIES, env=env)
    _check(again, expected)
    assert hub.requests == [] and hub.other_requests == []


def _load_other_commit(group: mx.distributed.Group, hosts: str) -> str:
    """What a rank is told when the model changes between the ranks' questions."""
    use_cache(Path(hosts) / f"host{group.rank()}")
    name = ("me/stacked", "me/changed")[group.rank()]
    try:
        mlx_ep.load(name, group, FAST)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ranks_load_one_commit(
    hub: HubServer, folders: dict[str, Path], tmp_path: Path
) -> None:
    commit = "c" * 40
    hub.repositories["me/changed"] = Repository(folders["me/stacked"], commit=commit)
    env = {"HF_ENDPOINT": hub.endpoint}
    first = hub.repositories["me/stacked"].commit
    for text in run_ranks(2, _load_other_commit, str(tmp_path), env=env):
        assert f"rank 0 has {first}, rank 1 has {commit}. Start again" in text


def test_two_ranks_share_a_cache(
    hub: HubServer, folders: dict[str, Path], tmp_path: Path
) -> None:
    """On one host: what both need is fetched once, and cut connections change nothing.

    Through the command, which prints what it fetches where there is no terminal.
    Tokens are those of one process.
    """
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_me"}
    hub.faults.cuts, hub.faults.cut_after, hub.faults.min_bytes = 3, 5000, 6000
    hub.faults.answers = [(429, "1"), (502, None)]
    command = [sys.executable, "-m", "mlx_ep.generate", "--no-warmup", "--ranks", "2"]
    command += ["--max-tokens", "6", "--prompt", "experts", "--model", "me/stacked"]
    command += ["--ignore-chat-template"]
    outcomes = run_commands(2, command, env=env)
    for rank, outcome in enumerate(outcomes):
        assert outcome.returncode == 0, outcome.stderr
        # Without a terminal rank 0 says it for all.
        assert ("rank 0: fetching " in outcome.stderr) == (rank == 0)
        assert ("of me/stacked" in outcome.stderr) == (rank == 0)
    sent, folder = hub.bytes_of("hf_me"), folders["me/stacked"]
    files = list(folder.glob("*.safetensors"))
    assert sent <= 1.02 * sum(file.stat().st_size for file in files)
    model, tokenizer = mlx_lm.load(str(folder))
    text = mlx_lm.generate(model, tokenizer, "experts", max_tokens=6)
    assert text.strip() and text in outcomes[0].stdout


def test_what_cannot_be_had_is_one_line_on_every_rank(
    hub: HubServer, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["me/stacked"]
    hub.repositories["me/gated"] = Repository(folder, is_gated=True)
    hub.repositories["me/private"] = Repository(folder, token="hf_other")
    cases = [
        (["--model", "me/none"], "there is no such repository"),
        (["--model", "me/private"], "there is no such repository"),
        (["--model", "me/gated"], f"Open {hub.endpoint}/me/gated in a browser"),
        (["--model", "me/stacked", "--revision", "v9"], "no such revision"),
        (["--model", "me/stacked", "--memory-limit-gb", "0.0001"], "do not fit"),
    ]
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    outcomes = outcomes_of(2, [options for options, _ in cases], env=env)
    for (options, text), ranks in zip(cases, outcomes, strict=True):
        assert [code for code, _ in ranks] == [2, 2], (options, ranks)
        assert text in ranks[0][1], (options, ranks[0][1])
        assert ranks[0][1].count("\n") == 1, ranks[0][1]
    # Refused from headers alone.
    assert hub.bytes_of("") == _header_bytes(folder)


_ALONE = """
import os, sys
from pathlib import Path
from tests.support.hub_server import use_cache
rank = os.environ["MLX_RANK"]
use_cache(Path(sys.argv.pop(1)) / f"host{rank}")
os.environ["HF_TOKEN"] = f"hf_rank{rank}"
from mlx_ep.generate import main
main()
"""


@pytest.mark.slow
def test_one_ranks_failure_ends_all(hub: HubServer, tmp_path: Path) -> None:
    """The storage changes under rank 1 alone, when the headers have been read."""
    hub.faults.only_for, hub.faults.min_bytes = "hf_rank1", 6000
    hub.faults.wrong_total = 1
    argv = [sys.executable, "-c", _ALONE, str(tmp_path), "--model", "me/stacked"]
    env = {"HF_ENDPOINT": hub.endpoint}
    outcomes = run_commands(2, argv, env=env)
    assert all(outcome.returncode for outcome in outcomes)
    for outcome in outcomes:
        assert "me/stacked: " in outcome.stderr
        assert "The file changed or the server is wrong" in outcome.stderr


@pytest.mark.slow
def test_a_killed_start_is_resumed(hub: HubServer, tmp_path: Path) -> None:
    """What is fetched twice is at most what was not in a journal yet."""
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_me"}
    commit = 16 << 10
    program = (
        "from mlx_ep.loading.hub import fetch; from mlx_ep.generate import main;"
        f"fetch._COMMIT_BYTES = {commit}; fetch._PIECE_BYTES = {4 * commit}; main()"
    )
    argv = [sys.executable, "-c", program, "--model", "me/stacked", "--no-warmup"]
    hub.faults.seconds_per_chunk = 0.05
    with start_commands(1, argv, env=env) as started:
        deadline = time.monotonic() + 60
        while hub.bytes_of("hf_me") < 600_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        started.processes[0].send_signal(signal.SIGKILL)
        assert started.wait()[0].returncode == -signal.SIGKILL
    time.sleep(1)  # the server notices
    hub.faults.seconds_per_chunk = 0.0
    first = hub.bytes_of("hf_me")
    (outcome,) = run_commands(1, argv, env=env)
    assert outcome.returncode == 0, outcome.stderr
    folder = hub.repositories["me/stacked"].folder
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 600_000 <= first < 0.9 * total
    # Eight connections, each with what it had not committed and what was on the wire.
    assert total <= hub.bytes_of("hf_me") <= total + 8 * 2 * 2 * commit
