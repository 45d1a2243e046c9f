"""Keep what a prompt left in the KV cache: ``mlx_ep.cache_prompt``.

As mlx_lm.cache_prompt, expert-parallel: the file is one for ``mlx_ep.generate`` and,
with the same model, for ``mlx_lm.generate``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_ep import cli
from mlx_ep.comm import Comm, agreed, gather_objects, host_id, note_prefill


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.cache_prompt",
        description="Run a prompt through an expert-parallel model and keep its KV "
        "cache in a file, for mlx_ep.generate --prompt-cache-file.",
    )
    cli.add_model_flags(parser)
    parser.add_argument(
        "--eos-token",
        type=cli.not_empty,
        help="The token that ends a text, for the tokenizer.",
    )
    parser.add_argument(
        "--prompt-cache-file",
        type=Path,
        required=True,
        help="The file to write, on every host; it is replaced if it is there.",
    )
    parser.add_argument(
        "--prompt",
        "-p",
        type=cli.not_empty,
        required=True,
        help="The prompt; '-' reads it from the standard input.",
    )
    cli.add_cache_flags(parser)
    cli.add_ep_flags(parser)
    parser.finishers.append(_check)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: flags that do not go together.
    """
    cli.check_strategy(args.config)
    cli.check_cache_flags(args)
    if args.config.attention != "replicated":
        raise ValueError(
            "A prompt cache holds the KV cache of all heads: it goes with --attention "
            f"replicated, got {args.config.attention}."
        )


def main() -> None:
    cli.run(make_parser(), _cache_prompt)


def _cache_prompt(args: argparse.Namespace, comm: Comm) -> None:
    config = {} if args.eos_token is None else {"eos_token": args.eos_token}
    with cli.usage_errors():
        text = cli.read_text(args.prompt, None, comm, "--prompt")
        writes = _writes(args.prompt_cache_file, comm)
        prepared = cli.prepare_model(args, comm)
        if args.eos_token is not None:
            # Not by `config`: transformers would make an unknown token a new one.
            if args.eos_token not in prepared.tokenizer.get_vocab():
                raise ValueError(
                    "--eos-token must be a token of the model; got "
                    f"{args.eos_token!r}, which its tokenizer does not have."
                )
            prepared.tokenizer.eos_token = args.eos_token
        cli.check_cache(args, prepared)
        tokens = _tokens(text, prepared.tokenizer)
        cli.check_context([tokens], prepared, "--prompt")
    model, _ = prepared.load()
    cli.print_reports(model, comm, args.config)
    cache = make_prompt_cache(model, args.max_kv_size)
    with tqdm(total=len(tokens), unit="token", disable=comm.rank != 0) as progress:

        def show(num_done: int, num_tokens: int) -> None:
            progress.update(num_done - progress.n)
            note_prefill(num_done, num_tokens)

        for _ in generate_step(
            mx.array(tokens),
            model,
            max_tokens=0,
            prompt_cache=cache,
            prefill_step_size=args.prefill_step_size,
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
            prompt_progress_callback=show,
        ):
            pass
    # sync: on every rank, the ones that do not write included: a layer is one
    # collective of all.
    mx.eval([layer.state for layer in cache])
    metadata = {"model": args.model, "tokenizer_config": json.dumps(config)}
    if writes:
        # Beside it first: a file that is there is whole.
        partial = args.prompt_cache_file.with_name(
            f".{args.prompt_cache_file.name}.{os.getpid()}.safetensors"
        )
        save_prompt_cache(str(partial), cache, metadata)
        partial.rename(args.prompt_cache_file)
    if comm.rank == 0:
        print(f"Prompt: {len(tokens)} tokens")
        print(f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB")
        print(f"KV cache written to {args.prompt_cache_file}", flush=True)


def _tokens(text: str, tokenizer: TokenizerWrapper) -> list[int]:
    """As mlx_lm.cache_prompt makes them: the user's message, which goes on."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=False,
        continue_final_message=True,
    )


def _writes(file: Path, comm: Comm) -> bool:
    """Whether this rank writes: the first on its host. Every rank must call it.

    Raises:
        ValueError: on every rank: a rank that writes could not.
    """
    hosts = gather_objects(comm, host_id())
    writes = hosts.index(hosts[comm.rank]) == comm.rank

    def check() -> bool:
        if writes:
            cli.check_output("--prompt-cache-file", file)
        return writes

    return agreed(comm, check)


if __name__ == "__main__":
    main()
