"""One prompt, streamed as mlx_lm.generate does."""

from __future__ import annotations

import argparse
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep import cli
from mlx_ep.comm import Comm, note_decode, note_prefill


def stream(
    args: argparse.Namespace,
    comm: Comm,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    options: dict[str, Any],
) -> None:
    """Generate on every rank; rank 0 prints.

    Args:
        options: of mlx-lm's stream_generate.
    """

    def say(text: str = "", end: str = "\n") -> None:
        if comm.rank == 0:
            print(text, end=end, flush=True, file=cli.beside(args))

    def note(text: str = "") -> None:
        if args.verbose:
            say(text)

    note("=" * 10)
    pieces, num_accepted = [], 0
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=args.max_tokens,
        sampler=cli.shared_sampler(args, tokenizer, comm),
        prompt_progress_callback=note_prefill,
        **options,
    )
    for response in note_decode(responses):
        say(response.text, end="")
        pieces.append(response.text)
        num_accepted += response.from_draft
    say()
    note("=" * 10)
    if args.json is not None and comm.rank == 0:
        record = {
            "model": args.model,
            "ranks": comm.size,
            "text": "".join(pieces),
            "finish_reason": response.finish_reason,
            "prompt_tokens": response.prompt_tokens,
            "prompt_tokens_per_second": response.prompt_tps,
            "generation_tokens": response.generation_tokens,
            "generation_tokens_per_second": response.generation_tps,
            "peak_memory_gb": response.peak_memory,
        }
        cli.write_json(args.json, record)
    if not any(pieces):
        note("No text generated for this prompt")
        return
    note(
        f"Prompt: {response.prompt_tokens} tokens, "
        f"{response.prompt_tps:.3f} tokens-per-sec"
    )
    note(
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec"
    )
    if "draft_model" in options:
        count = response.generation_tokens
        note(f"Draft: {num_accepted} of {count} generated tokens were drafted")
    note(f"Peak memory: {response.peak_memory:.3f} GB")
