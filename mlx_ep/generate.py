"""Generate text with an expert-parallel model: ``mlx_ep.generate``.

Flags that mlx_lm.generate has too mean the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import mlx.nn as nn
from mlx_lm.generate import stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep import cli
from mlx_ep.cli import (
    add_reuse_flags,
    add_sampling_flags,
    check_reuse_flags,
    find_draft,
    open_output,
    parse_prompts,
    prompt_tokens,
    rank_sampler,
    read_cache,
    reuse_options,
    seed_ranks,
    shared_sampler,
    tokens_after_cache,
    user_message,
    write_answers,
)
from mlx_ep.comm import (
    Comm,
    broadcast_object,
    gather_objects,
    note_decode,
    note_prefill,
)
from mlx_ep.config import EPConfig
from mlx_ep.data_parallel import can_batch, generate_replicated, generate_sharded
from mlx_ep.loading import EMBEDDED_MODEL
from mlx_ep.metrics import StageTimings, format_bytes, stage_table

DEFAULT_PROMPT = "What is spaghetti code?"  # the embedded model knows


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="mlx_ep.generate",
        description="Generate text with an expert-parallel model, on every rank that "
        "the launcher started (mlx.launch -n 2 -- mlx_ep.generate ...).",
    )
    cli.add_model_flags(parser)
    parser.add_argument(
        "--prompt",
        "-p",
        default=DEFAULT_PROMPT,
        help="The prompt; '-' reads it from the standard input (default: %(default)s).",
    )
    parser.add_argument(
        "--prompt-file", type=Path, help="A file to read the prompt from instead."
    )
    parser.add_argument(
        "--prompts-file",
        type=Path,
        help="A file of many prompts, one a line, or JSON lines (NAME.jsonl) with "
        '"prompt" or "messages"; the answers come as JSON lines in the same order.',
    )
    parser.add_argument(
        "--output", type=Path, help="Where the answers to --prompts-file are written."
    )
    parser.add_argument(
        "--batch-size",
        type=cli.positive,
        default=32,
        help="Prompts of --prompts-file that a rank runs at once (default: %(default)s)"
        ".",
    )
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
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=cli.positive,
        default=100,
        help="Most tokens to generate (default: %(default)s).",
    )
    parser.add_argument(
        "--verbose",
        type=lambda text: text.lower() not in ("false", "f"),
        default=True,
        help="False or F: print the response only.",
    )
    parser.add_argument(
        "--timings",
        action="store_true",
        help="Time every stage of the MoE layers (nothing overlaps then, which is a "
        "little slower) and print them at the end.",
    )
    add_generation_flags(parser)
    add_reuse_flags(parser)
    add_sampling_flags(parser)
    cli.add_ep_flags(parser, has_data=True)
    parser.set_defaults(model=None)  # a prompt cache names its model
    return parser


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Prefill and KV cache, as in mlx_lm.generate."""
    group = parser.add_argument_group("prefill and KV cache")
    group.add_argument(
        "--prefill-step-size",
        type=cli.positive,
        default=2048,
        help="Prompt tokens processed at a time (default: %(default)s).",
    )
    group.add_argument(
        "--max-kv-size", type=cli.positive, help="Most tokens the KV cache keeps."
    )
    group.add_argument(
        "--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="Quantize the KV cache."
    )
    group.add_argument(
        "--kv-group-size",
        type=int,
        choices=(32, 64, 128),
        default=64,
        help="Its group.",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=int,
        default=5000,
        help="The token from which on --kv-bits applies (default: %(default)s).",
    )


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of stream_generate that `add_generation_flags` gave."""
    return {
        "prefill_step_size": args.prefill_step_size,
        "max_kv_size": args.max_kv_size,
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
    }


def main() -> None:
    cli.run(make_parser(), _generate)


def _generate(args: argparse.Namespace, comm: Comm) -> None:
    with cli.usage_errors():
        config = cli.ep_config(args)
        _check_flags(args, config)
        read = _read_prompts(args, comm)
        cache = read_cache(args, comm)
        args.model = args.model or (cache.model if cache else EMBEDDED_MODEL)
        extra = cache.tokenizer_config if cache else None
        prepared = cli.prepare_model(args, comm, config, extra)
        draft = find_draft(args, prepared.tokenizer, comm)
    model, tokenizer = prepared.load()
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    seed_ranks(args.seed, comm)
    model.expert_parallel.group.timings.enabled = args.timings
    if args.prompts_file is None:
        if args.verbose:
            cli.print_reports(model, comm, config)
        options = generation_options(args) | reuse_options(args, model, draft, cache)
        tokens_of = prompt_tokens if cache is None else tokens_after_cache
        prompt = tokens_of(args, tokenizer, [user_message(read)])
        _stream(args, comm, model, tokenizer, prompt, options)
    else:
        if args.verbose:
            cli.print_reports(model, comm, config, sys.stderr)
        _answer_all(args, comm, model, tokenizer, read)
    if args.timings:
        file = sys.stdout if args.prompts_file is None else sys.stderr
        _print_timings(model.expert_parallel.group.timings, comm, file)


def _check_flags(args: argparse.Namespace, config: EPConfig) -> None:
    """Raises:
    ValueError: flags that do not go together.
    """
    if args.attention == "data" and args.prompts_file is None:
        raise ValueError(
            "--attention data gives each rank prompts of its own: it needs "
            "--prompts-file."
        )
    cli.check_strategy(config, args.attention)
    if args.output is not None and args.prompts_file is None:
        raise ValueError("--output is where the answers to --prompts-file go.")
    check_reuse_flags(args)


def _read_prompts(args: argparse.Namespace, comm: Comm) -> Any:
    """The prompt, or the conversations of --prompts-file: what rank 0 reads, on all.

    A launcher may feed only rank 0, and only its host may have the file.

    Raises:
        ValueError: on every rank, when it cannot be read.
    """
    read: Any = None
    problem = ""
    if comm.rank == 0:
        try:
            read = _read_on_rank_0(args)
        except (ValueError, OSError) as error:  # UnicodeDecodeError is a ValueError
            problem = str(error)
    read, problem = broadcast_object(comm, [read, problem])
    if problem:
        raise ValueError(problem)
    return read


def _read_on_rank_0(args: argparse.Namespace) -> Any:
    if args.prompts_file is not None:
        text = args.prompts_file.read_text()
        is_jsonl = args.prompts_file.suffix == ".jsonl"
        return parse_prompts(text, is_jsonl, str(args.prompts_file))
    if args.prompt_file is not None:
        prompt = args.prompt_file.read_text()
    elif args.prompt == "-":
        prompt = sys.stdin.read()
    else:
        prompt = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not prompt:
        raise ValueError("The prompt must not be empty; give one with --prompt.")
    return prompt


def _answer_all(
    args: argparse.Namespace,
    comm: Comm,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    conversations: list[list[dict[str, str]]],
) -> None:
    """Answer every prompt of a file; rank 0 writes."""
    if not can_batch(model):
        raise ValueError(
            f"mlx-lm cannot run several sequences of {args.model} at once (its KV "
            "cache does not merge); use --prompt."
        )
    prompts = [prompt_tokens(args, tokenizer, c) for c in conversations]
    start = time.perf_counter()
    is_sharded = args.attention == "data"
    result = (generate_sharded if is_sharded else generate_replicated)(
        model,
        tokenizer,
        prompts,
        comm,
        max_tokens=args.max_tokens,
        sampler=(rank_sampler if is_sharded else shared_sampler)(args, tokenizer, comm),
        prefill_step_size=args.prefill_step_size,
        max_kv_size=args.max_kv_size,
        completion_batch_size=args.batch_size,
        prefill_batch_size=min(args.batch_size, 8),
    )
    seconds = time.perf_counter() - start
    if comm.rank != 0:
        return
    with open_output(args.output) as file:
        lengths = [len(prompt) for prompt in prompts]
        write_answers(file, result.answers, conversations, lengths, tokenizer)
    if args.verbose:
        num_tokens = sum(len(answer.tokens) for answer in result.answers)
        print(
            f"Prompts: {len(prompts)}, {len(prompts) / seconds:.3f} per second\n"
            f"Generation: {num_tokens} tokens, {num_tokens / seconds:.3f} "
            "tokens-per-sec\n"
            "KV cache at most: "
            + ", ".join(
                f"rank {rank} {format_bytes(num_bytes)}"
                for rank, num_bytes in enumerate(result.cache_bytes)
            ),
            file=sys.stderr,
        )


def _stream(
    args: argparse.Namespace,
    comm: Comm,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    options: dict[str, Any],
) -> None:
    """Generate on every rank; rank 0 prints, as mlx_lm.generate does."""

    def say(text: str = "", end: str = "\n") -> None:
        if comm.rank == 0:
            print(text, end=end, flush=True)

    def note(text: str = "") -> None:
        if args.verbose:
            say(text)

    note("=" * 10)
    is_empty = True
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=args.max_tokens,
        sampler=shared_sampler(args, tokenizer, comm),
        prompt_progress_callback=note_prefill,
        **options,
    )
    for response in note_decode(responses):
        say(response.text, end="")
        is_empty = is_empty and not response.text
    say()
    note("=" * 10)
    if is_empty:
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
    note(f"Peak memory: {response.peak_memory:.3f} GB")


def _print_timings(timings: StageTimings, comm: Comm, file: TextIO) -> None:
    """Each stage's share of the MoE layers, by rank 0, one column a rank."""
    timings.enabled = False
    ranks = gather_objects(comm, timings.seconds)
    if comm.rank == 0:
        print(stage_table(ranks, timings.layer_calls), file=file, flush=True)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


if __name__ == "__main__":
    main()
