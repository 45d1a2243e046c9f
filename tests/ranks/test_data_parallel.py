"""Data-parallel generation: tokens of one process, KV memory of a share."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import batch_generate
from mlx_lm.sample_utils import make_sampler

import mlx_ep
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.data_parallel import assign_prompts, generate_sharded
from mlx_ep.loading import find_model
from tests.support import tiny
from tests.support.ranks import run_commands, run_ranks
from tests.support.usage import assert_usage_errors

pytestmark = pytest.mark.requires("ranks")

GENERATE = [sys.executable, "-m", "mlx_ep.generate"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("lengths", [[], [5], [1, 9, 2, 2, 8, 3], list(range(20))])
def test_every_prompt_is_on_one_rank(lengths: list[int], num_ranks: int) -> None:
    assigned = assign_prompts(lengths, num_ranks)
    assert len(assigned) == num_ranks
    assert sorted(i for mine in assigned for i in mine) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in mine) for mine in assigned]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def _prompts(count: int, longest: int) -> list[list[int]]:
    """Real questions of the embedded model, some behind many tokens of other text."""
    rng = random.Random(1)
    terms = ["bug", "daemon", "deadlock", "worm", "zombie", "patch", "cookie"]
    filler = [rng.randrange(20, 1000) for _ in range(longest)]
    prompts = []
    for index in range(count):
        length = 5 + (longest - 5) * index // max(count - 1, 1)
        rng.shuffle(filler)
        prompts.append([0, *filler[: length - 4], 2, 300 + index % len(terms), 3])
    rng.shuffle(prompts)
    return prompts


def _answers(
    group: mx.distributed.Group,
    folder: str,
    configs: list[dict[str, Any]],
    prompts: list[list[int]],
    max_tokens: int,
    step: int,
) -> list[Any]:
    results = []
    for config in configs:
        model, tokenizer = mlx_ep.load(folder, group, EPConfig(**config))
        answers, cache_bytes = generate_sharded(
            model,
            tokenizer,
            prompts,
            GroupComm(group),
            max_tokens=max_tokens,
            sampler=make_sampler(0.0),
            prefill_step_size=step,
        )
        tokens = [(answer.prompt, answer.tokens) for answer in answers]
        results.append((tokens, cache_bytes))
    return results


def _expected(
    folder: str, prompts: list[list[int]], max_tokens: int
) -> tuple[list[list[int]], int]:
    """Tokens of mlx-lm in one process, and the bytes of its KV caches."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(folder)
    response = batch_generate(
        model,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        return_token_ids=True,
        return_prompt_caches=True,
    )
    cache_bytes = sum(c.nbytes for cache in response.caches for c in cache)
    return response.token_ids, cache_bytes


STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "gathered"},
    {"strategy": "all_to_all", "mode": "normal", "round_tokens": 48,
     "low_latency_tokens": 16},
    {"strategy": "all_to_all"},
    {"strategy": "auto"},
    {"strategy": "auto", "replica_memory": "all"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("num_ranks", "transport"),
    [
        pytest.param(1, "ring", marks=pytest.mark.slow),
        (2, "ring"),
        pytest.param(2, "mpi", marks=pytest.mark.slow),
        (3, "mpi"),
    ],
)
def test_tokens_are_those_of_one_process(num_ranks: int, transport: str) -> None:
    """Prompts of 5 to 90 tokens in prefill steps of 32: ranks fall out of step."""
    folder = str(find_model("jargon-moe"))
    prompts = _prompts(9, 90)
    expected, _ = _expected(folder, prompts, 8)
    ranks = run_ranks(
        num_ranks,
        _answers,
        folder,
        STRATEGIES,
        prompts,
        8,
        32,
        transport=transport,
        timeout=240,
    )
    for rank in ranks:
        for tokens, _ in rank:
            assert tokens == list(enumerate(expected))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_more_ranks_than_prompts(count: int) -> None:
    folder = str(find_model("jargon-moe"))
    prompts = _prompts(count, 20)
    expected, _ = _expected(folder, prompts, 8)
    ranks = run_ranks(
        3, _answers, folder, STRATEGIES, prompts, 8, 32, transport="mpi", timeout=240
    )
    for tokens, cache_bytes in ranks[0]:
        assert tokens == list(enumerate(expected))
        assert sum(n == 0 for n in cache_bytes) == 3 - count


@pytest.mark.parametrize(
    "config",
    [
        tiny.DEEPSEEK_V3,
        *(pytest.param(c, marks=pytest.mark.slow) for c in (tiny.GPT_OSS, tiny.OLMOE)),
    ],
)
def test_other_architectures(tmp_path: Path, config: dict[str, Any]) -> None:
    """Shared experts, biases and reshaped sums stay with the tokens' own rank."""
    folder = str(tiny.save_checkpoint(tmp_path, config))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 300, n).tolist() for n in (3, 40, 17)]
    expected, _ = _expected(folder, prompts, 6)
    ranks = run_ranks(2, _answers, folder, STRATEGIES[:2], prompts, 6, 16, timeout=240)
    for tokens, _ in ranks[0]:
        assert tokens == list(enumerate(expected))


@pytest.mark.slow
@pytest.mark.requires("mpi")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_64_prompts_of_5_to_300_tokens(num_ranks: int) -> None:
    folder = str(find_model("jargon-moe"))
    prompts = _prompts(64, 300)
    assert (min(map(len, prompts)), max(map(len, prompts))) == (5, 300)
    expected, _ = _expected(folder, prompts, 24)
    ranks = run_ranks(
        num_ranks,
        _answers,
        folder,
        STRATEGIES,
        prompts,
        24,
        64,
        transport="mpi",
        timeout=3000,
    )
    for tokens, _ in ranks[0]:
        assert tokens == list(enumerate(expected))


def test_the_command(tmp_path: Path) -> None:
    questions = ["What is a daemon?", "bug", "Define deadlock.", "foobar"]
    plain = tmp_path / "prompts.txt"
    plain.write_text("\n\n".join(questions) + "\n")
    lines = [json.dumps({"prompt": q}) for q in questions[:2]]
    lines += [
        json.dumps({"messages": [{"role": "user", "content": q}]})
        for q in questions[2:]
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    outputs = []
    for options in (
        ["--prompts-file", str(plain)],
        ["--prompts-file", str(plain), "--attention", "data"],
        ["--prompts-file", str(tmp_path / "prompts.jsonl"), "--attention", "data",
         "--strategy", "deepep", "--output", str(tmp_path / "answers.jsonl")],
    ):  # fmt: skip
        first, second = run_commands(2, [*GENERATE, "--max-tokens", "12", *options])
        assert (first.returncode, second.returncode) == (0, 0), first.stderr
        assert second.stdout == ""
        assert "KV cache at most: rank 0" in first.stderr
        assert "4/4" in first.stderr  # the progress bar
        canonical = "all_to_all (auto)" if "deepep" in options else "auto"
        by_default = "auto" if "data" in options else "replicated"
        expected = canonical if "deepep" in options else by_default
        assert f"strategy: {expected}\n" in first.stderr
        backend = {"auto": "auto", "replicated": "local_allreduce"}
        sizes = "TP=2  DP=1" if expected == "replicated" else "TP=1  DP=2"
        line = f"MoE EP backend: {backend.get(expected, 'deepep')}  {sizes}  EP=2\n"
        assert line in first.stderr
        outputs.append(first.stdout)
    assert outputs[2] == ""
    outputs[2] = (tmp_path / "answers.jsonl").read_text()
    # Each answer is written when it ends.
    records, *others = (
        sorted(map(json.loads, output.splitlines()), key=lambda r: r["index"])
        for output in outputs
    )
    assert [record["prompt"] for record in records] == questions
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert all(record["text"] for record in records)
    assert others == [records, records]


def test_rows_in_8_bits_by_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("What is a daemon?\n\nDefine deadlock.\n")
    command = [*GENERATE, "--max-tokens", "3", "--prompts-file", str(file)]
    command += ["--attention", "data", "--dispatch-dtype", "int8"]
    first, second = run_commands(2, command)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    answers = [json.loads(line) for line in first.stdout.splitlines()]
    assert answers and all(answer["text"] for answer in answers)


def test_wrong_usage(tmp_path: Path) -> None:
    contents = {
        "good": "a prompt",
        "empty": "\n\n",
        "bad.jsonl": "{",
        "other.jsonl": '{"prompt": "x"}\n{"text": "x"}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)

    def prompts(name: str, *options: str) -> list[str]:
        return ["--prompts-file", str(tmp_path / name), *options]

    data = ("--attention", "data")
    assert_usage_errors(
        2,
        [
            (data, "needs --prompts-file"),
            (prompts("good", "--strategy", "gathered"), "goes with"),
            (prompts("good", *data, "--strategy", "none"), "goes with"),
            (prompts("no-such-file"), "No such file"),
            (prompts("empty"), "at least one prompt"),
            (prompts("bad.jsonl"), "bad.jsonl, line 1 is not JSON"),
            (prompts("other.jsonl"), "line 2 must be an object with"),
            (["--output", "x"], "where the answers"),
        ],
    )
