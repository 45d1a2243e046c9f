"""Tensor attention as it is asked for: what is refused, and the commands."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlx_ep.config import EPConfig
from mlx_ep.loading import EMBEDDED_MODEL, find_model
from mlx_ep.loading.local import build_model
from mlx_ep.models.split_check import DenseSplit
from mlx_ep.models.tensor_parallel import plan_split, tensor_problem
from mlx_ep.types import LMHead
from tests.support import tiny
from tests.support.architectures import ARCHITECTURES
from tests.support.ranks import run_commands
from tests.support.usage import assert_usage_errors

pytestmark = pytest.mark.requires("ranks")


_QWEN = ARCHITECTURES["qwen3_moe"]


@pytest.mark.parametrize(
    ("config", "num_ranks", "words"),
    [
        (tiny.MIXTRAL, 2, ["mlx_lm/models/mixtral.py", "defines no shard()"]),
        (_QWEN, 3, ["3 ranks", "qwen3_moe.py", "64", "n_heads = 4, n_kv_heads = 2"]),
        # 96 / 4 = 24 divides; 2 heads of keys do not, and would become 0.
        (_QWEN, 4, ["it must divide n_kv_heads = 2"]),
        ({**_QWEN, "intermediate_size": 97}, 2, ["97"]),
        (ARCHITECTURES["gpt_oss"], 4, ["num_key_value_heads = 2"]),
        (ARCHITECTURES["minimax_m3_vl"], 3, ["4, 2, 2", "3 ranks"]),
        (
            ARCHITECTURES["prism_hadamard_qwen35"],
            2,
            ["HadamardQuantizedLinear", "cannot be split"],
        ),
    ],
)
def test_why_not(config: dict[str, Any], num_ranks: int, words: list[str]) -> None:
    model = build_model(config)
    before = dict(tree_flatten(model.parameters()))
    problem = tensor_problem(model, num_ranks)
    for word in (*words, "Use --attention replicated"):
        assert word in problem
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(before[path] is after[path] for path in before)


def test_groups_of_packed_weights_must_divide() -> None:
    model = build_model(_QWEN)
    assert tensor_problem(model, 2) == ""
    nn.quantize(model, group_size=32, bits=4)  # 96 are 3 groups
    assert "group size 32" in tensor_problem(model, 2)


def test_the_question_changes_nothing() -> None:
    model = build_model(ARCHITECTURES["qwen3_5_moe"])
    state = [(type(m), dict(vars(m)), list(m)) for m in model.modules()]
    assert tensor_problem(model, 2) == ""
    assert state == [(type(m), dict(vars(m)), list(m)) for m in model.modules()]


def _plan(name: str, num_ranks: int, lm_head: LMHead, **changed: int) -> DenseSplit:
    model = build_model({**ARCHITECTURES[name], **changed})
    return plan_split(model, num_ranks, 0, lm_head)


@pytest.mark.parametrize("wish", ["split", "auto"])
def test_the_lm_head_is_split_too(wish: LMHead) -> None:
    whole, split = (_plan("qwen3_moe", 2, wish) for wish in ("whole", wish))
    config = ARCHITECTURES["qwen3_moe"]
    head = 4 * config["vocab_size"] * config["hidden_size"]
    assert split.whole_bytes - whole.whole_bytes == head
    assert split.kept_bytes - whole.kept_bytes == head // 2
    assert split.collectives == whole.collectives + 1
    # Its own shard() does so.
    assert _plan("qwen3_5_moe", 2, wish) == _plan("qwen3_5_moe", 2, "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 129}, "over 2 ranks: it has 129 outputs"),
        ({"tie_word_embeddings": True}, "qwen3_moe.py takes its embeddings for it"),
    ],
)
def test_an_lm_head_that_cannot_be_split(changed: dict[str, int], message: str) -> None:
    assert message in _plan("qwen3_moe", 2, "split", **changed).problem
    auto, whole = (_plan("qwen3_moe", 2, wish, **changed) for wish in ("auto", "whole"))
    assert auto == whole
    assert whole.problem == ""


def test_an_lm_head_without_effect() -> None:
    with pytest.warns(UserWarning, match="lm_head='split' has no effect"):
        EPConfig(lm_head="split")


def test_strategies_for_tokens_of_their_own() -> None:
    with pytest.raises(ValueError, match="needs the same tokens on all ranks"):
        EPConfig(attention="tensor", strategy="all_to_all")


# ---------------------------------------------------------------- the commands

GENERATE = [sys.executable, "-m", "mlx_ep.generate", "--ranks", "2"]
CHAT = [sys.executable, "-m", "mlx_ep.chat", "--ranks", "2"]
ASK = ["--prompt", "What is a hacker?", "--max-tokens", "12"]

run_two = partial(run_commands, 2)


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ("tensor", "attention: tensor (as asked for)"),
        pytest.param(
            "auto",
            "attention: replicated (predicted per token",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_generate_says_what_one_process_says(attention: str, said: str) -> None:
    model, tokenizer = mlx_lm.load(str(find_model(EMBEDDED_MODEL)))
    messages = [{"role": "user", "content": "What is a hacker?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    assert len(expected) > 20
    ranks = run_two([*GENERATE, *ASK, "--attention", attention])
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert said in ranks[0].stdout
    assert ranks[0].stdout.split("==========")[1].strip() == expected.strip()
    assert ranks[1].stdout == ""


@pytest.mark.slow
def test_chat() -> None:
    """Two answers from one conversation that was forgotten: the cache is made anew."""
    script = "What is a hacker?\n/reset\nWhat is a hacker?\n/quit\n"
    options = ["--max-tokens", "12", "--attention", "tensor"]
    ranks = run_two([*CHAT, *options], stdin=script)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert "attention: tensor" in ranks[0].stdout
    answers = [part.split("\n[")[0] for part in ranks[0].stdout.split(">> ")[1:]]
    assert answers[0] == answers[2]
    assert len(answers[0]) > 20


@pytest.mark.slow
def test_many_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a hacker?\nWhat is a kluge?\nWhat is foo?\n")
    many = ["--prompts-file", str(prompts), "--max-tokens", "8"]
    answers = []
    for attention in ("replicated", "tensor"):
        ranks = run_two([*GENERATE, *many, "--attention", attention])
        assert [rank.returncode for rank in ranks] == [0, 0], ranks
        answers.append(ranks[0].stdout)
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 3


def test_wrong_usage(tmp_path: Path) -> None:
    """Before a weight is read: there is none in the folder."""
    tiny.save_checkpoint(tmp_path, tiny.MIXTRAL)
    weights = tmp_path / "model.safetensors"
    size = weights.stat().st_size
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    weights.write_bytes(weights.read_bytes()[: 8 + header])
    with weights.open("r+b") as file:
        file.truncate(size)  # a hole
    assert_usage_errors(
        2,
        [
            (
                ["--model", str(tmp_path), *ASK, "--attention", "tensor"],
                "mlx_lm/models/mixtral.py defines no shard()",
            ),
            (["--attention", "data"], "needs --prompts-file"),
        ],
    )
