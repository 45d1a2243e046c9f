"""mlx_ep.cache_prompt: one file for mlx-lm, for overlays and for every way to start."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.loading import find_model
from tests.support.ranks import run_commands
from tests.support.usage import outcomes_of

pytestmark = pytest.mark.requires("ranks")

PREFIX = "What is a kludge? What is a compiler?"
ASK = ["--prompt", "What is a hacker?", "--max-tokens", "12", "--verbose", "F"]


def run(num_ranks: int, module: str, *options: str) -> str:
    """What rank 0 prints."""
    outcomes = run_commands(num_ranks, [sys.executable, "-m", module, *options])
    assert [o.returncode for o in outcomes] == [0] * num_ranks, outcomes[0].stderr
    return outcomes[0].stdout


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("overlay") / "jargon-moe-ep")
    run(1, "mlx_ep.overlay", "jargon-moe", "--output", folder)
    return folder


def test_a_cache_through_an_overlay(overlay: str, tmp_path: Path) -> None:
    """Made with the overlay, used with its model: one file is both's."""
    file = tmp_path / "cache.safetensors"
    options = ["--prompt-cache-file", str(file)]
    run(2, "mlx_ep.cache_prompt", "--model", overlay, *options, "--prompt", PREFIX)
    ours = run(2, "mlx_ep.generate", "--model", "jargon-moe", *options, *ASK)
    assert len(ours) > 20
    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    cache = make_prompt_cache(model)
    tokens = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], **end)
        for text, end in (
            (PREFIX, {"continue_final_message": True}),
            ("What is a hacker?", {"add_generation_prompt": True}),
        )
    ]
    model(mx.array([tokens[0]]), cache=cache)
    # Of the second message, what comes behind the template's beginning.
    begin = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], continue_final_message=True
    )
    rest = tokens[1][len(begin) :]
    expected = mlx_lm.generate(
        model, tokenizer, rest, max_tokens=12, prompt_cache=cache
    )
    assert ours == expected + "\n"


@pytest.mark.slow
def test_caches_are_those_of_one_process(overlay: str, tmp_path: Path) -> None:
    model = str(find_model("jargon-moe"))
    theirs, ours, of_overlay = (
        ["--prompt-cache-file", str(tmp_path / f"{name}.safetensors")]
        for name in ("theirs", "ours", "overlay")
    )
    text = ["--prompt", PREFIX]
    run(1, "mlx_lm", "cache_prompt", "--model", model, *theirs, *text)
    expected = run(1, "mlx_lm", "generate", *theirs, *ASK)
    assert len(expected) > 20
    said = run(2, "mlx_ep.cache_prompt", "--model", model, *ours, *text)
    assert "Prompt: " in said
    run(2, "mlx_ep.cache_prompt", "--model", overlay, *of_overlay, *text)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "ours.safetensors", "overlay.safetensors", "theirs.safetensors",
    ]  # fmt: skip
    for options in (
        theirs,
        ours,
        [*ours, "--model", "jargon-moe"],
        [*ours, "--model", overlay],
        of_overlay,
        [*of_overlay, "--model", model],
    ):
        assert run(2, "mlx_ep.generate", *options, *ASK) == expected, options
    # And mlx-lm takes ours, alone and through the overlay on two ranks.
    assert run(1, "mlx_lm", "generate", *ours, *ASK) == expected
    trusted = [*of_overlay, "--trust-remote-code"]
    assert run(2, "mlx_lm", "generate", *trusted, *ASK) == expected


def test_wrong_usage(tmp_path: Path) -> None:
    file = ["--prompt-cache-file", str(tmp_path / "cache")]
    prompt = ["--prompt", "x"]
    cases = [
        (file, "required: --prompt"),
        (prompt, "required: --prompt-cache-file"),
        ([*file, "--prompt", ""], "must not be empty"),
        ([*prompt, "--prompt-cache-file", str(tmp_path)], "must be a file in a folder"),
        ([*prompt, "--prompt-cache-file", "/no/such/cache"], "must be a file in a"),
        ([*file, *prompt, "--attention", "tensor"], "--attention replicated"),
        ([*file, *prompt, "--eos-token", "<no>"], "--eos-token must be a token of"),
        ([*file, *prompt, "--kv-bits", "4", "--max-kv-size", "9"], "does not go with"),
        ([*file, *prompt, "--kv-bits", "4", "--kv-group-size", "128"], "be quantized"),
    ]
    found = outcomes_of(1, [options for options, _ in cases], "mlx_ep.cache_prompt")
    for (options, text), [(code, said)] in zip(cases, found, strict=True):
        assert code == 2 and text in said, (options, said)
        assert len(said.splitlines()) == 1
