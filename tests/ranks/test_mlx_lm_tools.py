"""mlx-lm's own tools on expert-parallel models: the tokens of one process.

Every rank calls them alike, as a user's script does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import batch_generate, stream_generate
from mlx_lm.models.cache import (
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_ep
from tests.support import tiny
from tests.support.ranks import run_commands, run_ranks
from tests.support.usage import assert_usage_errors
from tests.support.waiting import LONG

pytestmark = pytest.mark.requires("ranks")

# A KV cache is quantized in groups of 32 at least: heads that wide.
CONFIGS = {
    "qwen3_moe": {**tiny.QWEN3_MOE, "head_dim": 32},
    "mixtral": {**tiny.MIXTRAL, "hidden_size": 128},
}
DRAFT = {**tiny.DENSE, "num_hidden_layers": 1}
PROMPTS = [list(range(3, 43)), list(range(90, 99)), list(range(200, 270))]
LENGTH = 12


def _use_tools(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    drafts: dict[str, nn.Module],
    file: Path,
) -> dict[str, Any]:
    """What each tool generates, by its name."""
    prompt = PROMPTS[0]

    def stream(prompt: list[int] = prompt, **options: Any) -> list[int]:
        steps = stream_generate(model, tokenizer, prompt, LENGTH, **options)
        return [step.token for step in steps]

    found: dict[str, Any] = {"stream_generate": stream()}
    found["batch_generate"] = batch_generate(
        model, tokenizer, PROMPTS, max_tokens=LENGTH
    ).texts
    found["prefill in steps"] = stream(prefill_step_size=16)
    mx.random.seed(5)
    found["sampled"] = stream(sampler=make_sampler(temp=1.5, top_p=0.9))
    found |= _use_caches(model, stream, file)
    for name, draft in drafts.items():
        steps = stream_generate(
            model, tokenizer, prompt, LENGTH, draft_model=draft, num_draft_tokens=3
        )
        taken = [(step.token, step.from_draft) for step in steps]
        found[f"draft {name}"] = [token for token, _ in taken]
        found[f"accepted {name}"] = sum(is_draft for _, is_draft in taken)
    return found


def _use_caches(model: nn.Module, stream: Any, file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cache = make_prompt_cache(model)
    found["kv_bits"] = stream(
        prompt_cache=cache, kv_bits=4, kv_group_size=32, quantized_kv_start=8
    )
    assert all(isinstance(layer, QuantizedKVCache) for layer in cache)
    cache = make_prompt_cache(model, 16)
    found["max_kv_size"] = stream(prompt_cache=cache)
    assert all(isinstance(layer, RotatingKVCache) for layer in cache)

    cache = make_prompt_cache(model)
    found["before the cache"] = stream(prompt_cache=cache)
    save_prompt_cache(str(file), cache, {"model": "a name"})
    loaded, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata == {"model": "a name"}
    assert trim_prompt_cache(cache, 7) == 7
    found["trimmed cache"] = stream(PROMPTS[1], prompt_cache=cache)
    assert trim_prompt_cache(loaded, 7) == 7
    found["trimmed cache from a file"] = stream(PROMPTS[1], prompt_cache=loaded)
    return found


def _on_a_rank(
    group: mx.distributed.Group, folders: dict[str, str], name: str, in_memory: bool
) -> dict[str, Any]:
    model, tokenizer = _model(folders[name])
    drafts = {"itself": model, "dense": _model(folders["draft"])[0]}
    if in_memory:
        drafts["itself"] = _model(folders[name])[0]
        mlx_ep.parallelize(model, group)
    else:
        model, tokenizer = mlx_ep.load(folders[name], group)
    file = Path(folders["caches"]) / f"{name}-{in_memory}-{group.rank()}.safetensors"
    return _use_tools(model, tokenizer, drafts, file)


def _model(folder: str) -> tuple[nn.Module, TokenizerWrapper]:
    model, tokenizer = mlx_lm.load(folder)[:2]
    return model, tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tools")
    for name, config in CONFIGS.items():
        tiny.save_checkpoint(root / name, config)
    tiny.save_checkpoint(root / "draft", DRAFT)
    (root / "caches").mkdir()
    return {folder.name: str(folder) for folder in root.iterdir()}


@pytest.mark.parametrize(
    ("name", "num_ranks", "transport", "in_memory"),
    [
        ("qwen3_moe", 2, "ring", False),
        pytest.param("qwen3_moe", 2, "ring", True, marks=pytest.mark.slow),
        *(
            pytest.param(name, 3, "mpi", in_memory, marks=pytest.mark.slow)
            for name in CONFIGS
            for in_memory in (False, True)
        ),
    ],
)
def test_tools_give_the_tokens_of_one_process(
    folders: dict[str, str], name: str, num_ranks: int, transport: str, in_memory: bool
) -> None:
    model, tokenizer = _model(folders[name])
    drafts = {"itself": model, "dense": _model(folders["draft"])[0]}
    file = Path(folders["caches"]) / "expected.safetensors"
    expected = _use_tools(model, tokenizer, drafts, file)
    assert len(set(expected["stream_generate"])) > 1
    assert expected["trimmed cache"] == expected["trimmed cache from a file"]
    assert expected["sampled"] != expected["stream_generate"]
    # The drafts are of use and of none, and change nothing.
    assert expected["accepted itself"] > LENGTH // 2 > expected["accepted dense"]
    assert expected["draft itself"] == expected["draft dense"]
    ranks = run_ranks(
        num_ranks,
        _on_a_rank,
        folders,
        name,
        in_memory,
        transport=transport,
        timeout=240,
    )
    for rank in ranks:
        assert rank == expected


GENERATE = [sys.executable, "-m", "mlx_ep.generate", "--verbose", "F"]
SHORT = ["--max-tokens", "16", "--prompt", "What is a hacker?"]


def _mlx_lm(*argv: str) -> str:
    """A command of mlx-lm, as it comes, in one process."""
    command = [sys.executable, "-m", "mlx_lm", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def jargon(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The embedded model's folder, and a prompt cache of mlx_lm.cache_prompt."""
    from mlx_ep.loading import find_model

    file = tmp_path_factory.mktemp("cache") / "jargon.safetensors"
    model = str(find_model("jargon-moe"))
    prompt = ["--prompt", "What is a kludge? What is a compiler?"]
    _mlx_lm("cache_prompt", "--model", model, "--prompt-cache-file", str(file), *prompt)
    return {"model": model, "file": str(file)}


@pytest.mark.slow
def test_generate_goes_on_from_a_prompt_cache(jargon: dict[str, str]) -> None:
    cache = ["--prompt-cache-file", jargon["file"]]
    expected = _mlx_lm("generate", *cache, *SHORT, "--verbose", "F")
    for model in ([], ["--model", "jargon-moe"]):  # the file names its folder
        first, second = run_commands(2, [*GENERATE, *cache, *model, *SHORT])
        assert (first.returncode, second.returncode) == (0, 0), first.stderr
        assert first.stdout == expected
        assert second.stdout == ""
    (without, _) = run_commands(2, [*GENERATE, *SHORT])
    assert without.stdout != expected


@pytest.mark.slow
def test_generate_with_a_draft_model(jargon: dict[str, str]) -> None:
    draft = ["--draft-model", jargon["model"], "--num-draft-tokens", "4"]
    expected = _mlx_lm("generate", "--model", jargon["model"], *SHORT, "--verbose", "F")
    for ranks in (2, 3):
        for sampling in ([], ["--temp", "1.0", "--seed", "3"]):
            outcomes = run_commands(ranks, [*GENERATE, *draft, *SHORT, *sampling])
            assert [o.returncode for o in outcomes] == [0] * ranks, outcomes[0].stderr
            assert (outcomes[0].stdout == expected) == (not sampling)


@pytest.mark.slow
def test_wrong_usage(
    jargon: dict[str, str], folders: dict[str, str], tmp_path: Path
) -> None:
    other = {**tiny.DENSE, "model_type": "qwen3", "num_hidden_layers": 1}
    tiny.save_checkpoint(tmp_path / "dense", other)
    window = tiny.save_checkpoint(tmp_path / "window", tiny.GPT_OSS)
    (tmp_path / "text.safetensors").write_text("not a cache, but words of some length")
    (tmp_path / "prompts.txt").write_text("one\n")
    quantized = str(tmp_path / "quantized.safetensors")
    _quantized_cache(jargon["model"], quantized)
    short = str(tmp_path / "short.safetensors")
    cache = [make_prompt_cache(_model(jargon["model"])[0])[0]]
    cache[0].update_and_fetch(mx.zeros((1, 2, 4, 32)), mx.zeros((1, 2, 4, 32)))
    save_prompt_cache(short, cache, _metadata(jargon["model"]))
    file = ["--prompt-cache-file", jargon["file"]]
    assert_usage_errors(
        2,
        [
            (
                ["--draft-model", str(tmp_path / "dense")],
                "must have the model's tokens",
            ),
            (
                ["--draft-model", "no/such/folder"],
                "--draft-model must be a model folder",
            ),
            (
                ["--model", str(window), "--draft-model", folders["draft"]],
                "from which tokens can be taken back",
            ),
            (["--prompt-cache-file", "no-such-file"], "there is no no-such-file"),
            (
                ["--prompt-cache-file", str(tmp_path / "text.safetensors")],
                "is not one that cache_prompt made",
            ),
            ([*file, "--model", folders["qwen3_moe"]], "was made with --model"),
            (
                ["--prompt-cache-file", quantized, "--kv-bits", "4"],
                "is quantized with --kv-bits 8 --kv-group-size 32",
            ),
            (["--prompt-cache-file", short], "a KV cache for each layer"),
            (
                [*file, "--prompts-file", str(tmp_path / "prompts.txt")],
                "--prompt-cache-file does not go with --prompts-file",
            ),
            ([*file, "--draft-model", jargon["model"]], "and of --draft-model"),
            ([*file, "--attention", "tensor"], "the KV cache of all heads"),
        ],
    )


def _metadata(model: str) -> dict[str, str]:
    return {"model": model, "tokenizer_config": json.dumps({})}


def _quantized_cache(model: str, file: str) -> None:
    loaded, tokenizer = _model(model)
    cache = make_prompt_cache(loaded)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    for _ in stream_generate(
        loaded, tokenizer, PROMPTS[1], 2, prompt_cache=cache, **options
    ):
        pass
    save_prompt_cache(file, cache, _metadata(model))
