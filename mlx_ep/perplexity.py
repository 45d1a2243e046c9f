"""Perplexity of an expert-parallel model on a text: ``mlx_ep.perplexity``.

As mlx_lm.perplexity measures it, on a file instead of a data set from the network: the
text's tokens in a row, cut into sequences of one length; every token of a sequence but
its first is predicted from those before it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Int

from mlx_ep import cli
from mlx_ep.comm import Comm
from mlx_ep.types import to_host


@dataclass(frozen=True)
class Perplexity:
    """What a text costs a model.

    Attributes:
        value: e to the mean negative log-likelihood of a token, in nats.
        standard_error: of `value`, by the delta method, tokens taken as independent.
        num_tokens: that were predicted.
        seconds: it took.
    """

    value: float
    standard_error: float
    num_tokens: int
    seconds: float


def perplexity(
    model: nn.Module, sequences: Int[mx.array, "samples length"], batch_size: int = 8
) -> Perplexity:
    """Predict every token of every sequence but the first. Every rank calls it alike.

    Args:
        sequences: token ids.
        batch_size: sequences that run at once.
    """
    start = time.perf_counter()
    losses = []
    for first in range(0, len(sequences), batch_size):
        batch = sequences[first : first + batch_size]
        logits = model(batch[:, :-1]).astype(mx.float32)
        loss = nn.losses.cross_entropy(logits, batch[:, 1:], reduction="none")
        # sync: one batch at a time, so that one batch of logits at most is held.
        losses.append(to_host(loss).ravel())
    seconds = time.perf_counter() - start
    all_losses = np.concatenate(losses).astype(np.float64)
    value = math.exp(all_losses.mean())
    deviation = all_losses.std(ddof=1) if all_losses.size > 1 else 0.0
    error = value * deviation / math.sqrt(all_losses.size)
    return Perplexity(value, error, all_losses.size, seconds)


def cut(
    tokens: Sequence[int], length: int, num_samples: int
) -> Int[mx.array, "samples length"]:
    """The first sequences of a text; what is left over at its end is not used.

    Args:
        length: of a sequence.
        num_samples: most sequences; -1 is all.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    if length < 2:
        raise ValueError(f"--sequence-length must be 2 or more, got {length}.")
    if num_samples < 1 and num_samples != -1:
        raise ValueError(f"--num-samples must be 1 or more, or -1; got {num_samples}.")
    found = len(tokens) // length
    if found == 0:
        raise ValueError(
            f"The text must have at least --sequence-length {length} tokens; it has "
            f"{len(tokens)}."
        )
    samples = found if num_samples == -1 else min(found, num_samples)
    return mx.array(list(tokens[: samples * length])).reshape(samples, length)


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.perplexity",
        description="Perplexity of an expert-parallel model on a text file, as "
        "mlx_lm.perplexity measures it.",
    )
    cli.add_model_flags(parser)
    parser.add_argument(
        "--text",
        type=Path,
        help="A text file, read by rank 0 (default: some entries of the Jargon File, "
        "which the embedded model was trained on).",
    )
    parser.add_argument(
        "--sequence-length",
        type=cli.positive,
        default=512,
        help="Tokens of a sequence.",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=256,
        help="Most sequences, from the beginning of the text; -1 is all.",
    )
    parser.add_argument(
        "--batch-size",
        type=cli.positive,
        default=8,
        help="Sequences that run at once.",
    )
    cli.add_json_flag(parser, "the results")
    cli.add_ep_flags(parser)
    parser.finishers.append(lambda args: cli.check_strategy(args.config))
    return parser


def main() -> None:
    cli.run(make_parser(), _perplexity)


def _perplexity(args: argparse.Namespace, comm: Comm) -> None:
    with cli.usage_errors():
        shipped = files("mlx_ep") / "embedded" / "jargon.txt"
        file = args.text or shipped
        cli.check_outputs(args, comm)
        text = cli.on_rank_0(lambda: file.read_text("utf-8"), comm, "--text")
        prepared = cli.prepare_model(args, comm)
        tokens = prepared.tokenizer.encode(text)
        sequences = cut(tokens, args.sequence_length, args.num_samples)
    model, _ = prepared.load()
    cli.print_reports(model, comm, args.config, cli.beside(args))
    found = perplexity(model, sequences, args.batch_size)
    if comm.rank != 0:
        return
    if args.json is not None:
        record = {
            "model": args.model,
            "ranks": comm.size,
            "perplexity": found.value,
            "standard_error": found.standard_error,
            "tokens": found.num_tokens,
            "sequences": len(sequences),
            "tokens_per_second": found.num_tokens / found.seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        cli.write_json(args.json, record)
    if str(args.json) != "-":
        print(f"Perplexity: {found.value:.3f} ± {found.standard_error:.3f}")
        print(f"Tokens: {found.num_tokens}, in {len(sequences)} sequences")
        print(f"Tokens per second: {found.num_tokens / found.seconds:.0f}")
        print(f"Peak memory: {mx.get_peak_memory() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
