"""The flags of ``mlx_ep.generate``; those of mlx_lm.generate mean the same."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from mlx_ep import cli
from mlx_ep.generate.reuse import add_reuse_flags, check_reuse_flags

DEFAULT_PROMPT = "What is spaghetti code?"  # the embedded model knows


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.generate",
        description="Generate text with an expert-parallel model, on every rank that "
        "the launcher started (mlx_ep.launch -n 2 -- mlx_ep.generate ...).",
    )
    cli.add_model_flags(parser)
    _add_prompt_flags(parser)
    _add_template_flags(parser)
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=cli.positive,
        default=100,
        help="Most tokens to generate.",
    )
    parser.add_argument(
        "--verbose",
        type=_true_or_false,
        default=True,
        help="True or T; False or F: print the response only.",
    )
    cli.add_json_flag(parser, "text, token counts and speeds of --prompt")
    parser.add_argument(
        "--timings",
        action="store_true",
        help="Time every stage of the MoE layers (nothing overlaps then, which is a "
        "little slower) and print them at the end.",
    )
    cli.add_record_flag(parser)
    cli.add_cache_flags(parser)
    add_reuse_flags(parser)
    cli.add_sampling_flags(parser)
    cli.add_ep_flags(parser, has_data=True, has_stages=True)
    # A prompt cache names its model.
    parser.set_defaults(model=None, prompt=None)
    parser.finishers.append(_check)
    return parser


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        "-p",
        type=cli.not_empty,
        help="The prompt; '-' reads it from the standard input (default: "
        f"{DEFAULT_PROMPT}).",
    )
    parser.add_argument(
        "--prompt-file", type=Path, help="A file to read the prompt from instead."
    )
    parser.add_argument(
        "--prompts-file",
        type=Path,
        help="A file of many prompts, one a line, or JSON lines (NAME.jsonl) with "
        '"prompt" or "messages", and "id", "max_tokens" and sampling flags of their '
        "own; each answer comes as a JSON line when it ends.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="A new file for the answers to --prompts-file (default: the standard "
        "output).",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on with an --output that was interrupted: prompts with an answer "
        "there are left out.",
    )
    parser.add_argument(
        "--batch-size",
        type=cli.positive,
        default=32,
        help="Prompts of --prompts-file that a rank runs at once.",
    )


def _add_template_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--system-prompt", help="A system prompt for the chat template."
    )
    parser.add_argument(
        "--prefill-response", help="How the response begins, for the chat template."
    )
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="Use the prompt as it is, without the tokenizer's chat template.",
    )
    parser.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="Of mlx_lm.generate, where it has no effect either: tokenizers bring "
        "their templates themselves.",
    )
    parser.add_argument(
        "--chat-template-config",
        type=_json_object,
        default={},
        help="Further arguments of the chat template, as a JSON object.",
    )
    parser.add_argument(
        "--extra-eos-token",
        nargs="+",
        default=(),
        help="More tokens that end the text.",
    )


def _check(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: flags that do not go together.
    """
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("prompt", "prompt_file", "prompts_file")
        if getattr(args, name) is not None
    ]
    if len(given) > 1:
        raise ValueError(
            f"Prompts must come from one place; got {' and '.join(given)}. Leave all "
            "but one out."
        )
    if args.prompt is None:
        args.prompt = DEFAULT_PROMPT
    if args.data and args.prompts_file is None:
        raise ValueError(
            "--attention data gives each rank prompts of its own: it needs "
            "--prompts-file."
        )
    cli.check_strategy(args.config, args.data)
    _check_stages(args)
    if args.output is not None and args.prompts_file is None:
        raise ValueError(
            "--output is where the answers to --prompts-file go; got --output without "
            "it. Give both."
        )
    if args.json is not None and args.prompts_file is not None:
        raise ValueError(
            "--json is of one prompt; the answers to --prompts-file are JSON lines: "
            "give --output instead."
        )
    if args.resume and args.output is None:
        raise ValueError(
            "--resume goes on with the answers in a file: it needs --output."
        )
    cli.check_cache_flags(args)
    check_reuse_flags(args)
    if args.use_default_chat_template:
        warnings.warn(
            "--use-default-chat-template has no effect: the tokenizer's own template "
            "is used.",
            stacklevel=2,
        )


def _check_stages(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: a flag needs all layers on every rank.
    """
    if args.config.pp == 1:
        return
    for name in (
        "prompts_file", "prompt_cache_file", "draft_model", "kv_bits", "max_kv_size",
        "record", "timings",
    ):  # fmt: skip
        if getattr(args, name):
            raise ValueError(
                f"--pp {args.config.pp} does not go with --{name.replace('_', '-')}. "
                "Leave one of the two out."
            )


def _true_or_false(text: str) -> bool:
    known = {"true": True, "t": True, "false": False, "f": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"must be True, T, False or F; got {text!r}")
    return known[text.lower()]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"must be a JSON object, got {text!r} ({error})"
        ) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value
