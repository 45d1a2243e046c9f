"""What mlx_ep.generate reuses: a prompt cache from a file, and a draft model.

The flags of mlx_lm.generate, with their meaning.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any, get_args

from mlx_lm.models.cache import make_prompt_cache

from mlx_ep import cli
from mlx_ep.api import PreparedModel, RunnerName
from mlx_ep.comm import Comm
from mlx_ep.generate.draft import Draft, check_trimmable, prepare_draft
from mlx_ep.generate.row_cache import check_row_caches


def add_reuse_flags(parser: argparse.ArgumentParser) -> None:
    """A prompt cache and a draft model, as in mlx_lm.generate."""
    group = parser.add_argument_group("prompt cache and speculative decoding")
    group.add_argument(
        "--prompt-cache-file",
        type=Path,
        help="A file of mlx_lm.cache_prompt, on every rank's disk; the prompt follows "
        "what it holds.",
    )
    group.add_argument(
        "--draft-model",
        help="A small model with the same tokens that drafts for speculative decoding; "
        "every rank holds all of it.",
    )
    group.add_argument(
        "--num-draft-tokens",
        type=cli.positive,
        default=3,
        help="Tokens it drafts at a time.",
    )
    group.add_argument(
        "--draft-runner",
        choices=get_args(RunnerName),
        help="What runs the draft's routed experts, as --runner (default: mlx-lm's own "
        "code).",
    )


def check_reuse_flags(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: flags that do not go together.
    """
    for flag in ("kv_bits", "prompt_cache_file"):
        if getattr(args, flag) is not None and args.prompts_file is not None:
            raise ValueError(
                f"--{flag.replace('_', '-')} does not go with --prompts-file: mlx-lm "
                "cannot."
            )
    if args.draft_runner is not None and args.draft_model is None:
        raise ValueError(
            f"--draft-runner {args.draft_runner} runs the experts of a draft: it needs "
            "--draft-model."
        )
    attention = args.config.attention
    if args.prompt_cache_file is not None and attention != "replicated":
        raise ValueError(
            "--prompt-cache-file holds the KV cache of all heads: it goes with "
            f"--attention replicated, got {attention}."
        )


def read_cache(args: argparse.Namespace, comm: Comm) -> cli.PromptCache | None:
    """The cache of --prompt-cache-file; None without the flag."""
    if args.prompt_cache_file is None:
        return None
    return cli.read_prompt_cache(
        args.prompt_cache_file, args.model, args.kv_bits, args.kv_group_size, comm
    )


def find_draft(
    args: argparse.Namespace, prepared: PreparedModel, comm: Comm
) -> Draft | None:
    """The model of --draft-model, not read yet; None without the flag.

    Raises:
        ValueError: on every rank: there is none, or one of both models cannot take
            tokens back.
    """
    if args.draft_model is None:
        return None
    draft = prepare_draft(args.draft_model, prepared.tokenizer, comm, args.draft_runner)
    if args.prompts_file is None:
        check_trimmable(prepared.weights.outline())
    else:
        check_row_caches(prepared.weights.outline(), "this model's")
        check_row_caches(draft.outline(), "the draft's")
    if args.max_kv_size is not None:
        warnings.warn(
            "--max-kv-size has no effect with --draft-model, as in mlx-lm.",
            stacklevel=2,
        )
    return draft


def check_cache_length(
    cache: cli.PromptCache | None, prepared: PreparedModel, draft: Draft | None
) -> None:
    """Raises:
    ValueError: the cache is not one of these models, neither of which is read yet.
    """
    if cache is None:
        return
    models = [prepared.weights.outline(), *([draft.outline()] if draft else [])]
    cache.check_length(sum(len(make_prompt_cache(model)) for model in models))


def reuse_options(
    args: argparse.Namespace,
    draft: Draft | None,
    cache: cli.PromptCache | None,
) -> dict[str, Any]:
    """The arguments of stream_generate for a prompt cache and a draft model.

    Raises:
        UsageError: on every rank: the draft model cannot be read.
    """
    options: dict[str, Any] = {}
    if draft is not None:
        with cli.usage_errors():
            options["draft_model"] = draft.load()
        options["num_draft_tokens"] = args.num_draft_tokens
    if cache is not None:
        options["prompt_cache"] = cache.layers
    return options
