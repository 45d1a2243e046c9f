"""Sampling, prefill and KV cache: the flags of mlx_lm.generate that several commands
have, with its defaults and meaning, and what is made of them.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep.api import PreparedModel
from mlx_ep.cli.parser import at_least, at_least_zero, fraction, half, positive, seed
from mlx_ep.comm import Comm, broadcast_object
from mlx_ep.types import Sampler

# What mlx.core.quantize takes.
KV_BITS = (2, 3, 4, 5, 6, 8)
KV_GROUP_SIZES = (32, 64, 128)


def add_sampling_flags(
    parser: argparse.ArgumentParser, by_default: int | None = None
) -> None:
    """The sampling flags of mlx_lm.generate, with its defaults.

    Args:
        by_default: the seed without --seed; None draws one.
    """
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temp", type=at_least_zero, default=0.0, help="Temperature; 0 is greedy."
    )
    group.add_argument(
        "--top-p", type=fraction, default=1.0, help="Nucleus sampling; 1 is off."
    )
    group.add_argument(
        "--min-p", type=fraction, default=0.0, help="Minimum probability, scaled."
    )
    group.add_argument(
        "--min-tokens-to-keep",
        type=positive,
        default=1,
        help="Least that --min-p keeps.",
    )
    group.add_argument("--top-k", type=at_least(0), default=0, help="Top-k; 0 is off.")
    group.add_argument(
        "--xtc-probability",
        type=fraction,
        default=0.0,
        help="Probability of XTC at each token.",
    )
    group.add_argument(
        "--xtc-threshold",
        type=half,
        default=0.1,
        help="Tokens from this probability on may be excluded by XTC; 0 to 0.5.",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=by_default,
        help="Seed of the random numbers (default: "
        + ("a random one)." if by_default is None else f"{by_default})."),
    )


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """Prefill and KV cache, as in mlx_lm.generate."""
    group = parser.add_argument_group("prefill and KV cache")
    group.add_argument(
        "--prefill-step-size",
        type=positive,
        default=2048,
        help="Prompt tokens processed at a time.",
    )
    group.add_argument(
        "--max-kv-size", type=positive, help="Most tokens the KV cache keeps."
    )
    group.add_argument(
        "--kv-bits", type=int, choices=KV_BITS, help="Quantize the KV cache."
    )
    group.add_argument(
        "--kv-group-size",
        type=int,
        choices=KV_GROUP_SIZES,
        default=64,
        help="Numbers that share a scale, with --kv-bits.",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=at_least(0),
        default=5000,
        help="The token from which on --kv-bits applies.",
    )


def cache_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of stream_generate that `add_cache_flags` gave."""
    return {
        "prefill_step_size": args.prefill_step_size,
        "max_kv_size": args.max_kv_size,
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
    }


def rank_sampler(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> Sampler:
    """A sampler for sequences that this rank alone runs.

    With --check-nan it raises FloatingPointError where NaN is among the logits.
    """
    sampler: Sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    if not args.config.check_nan:
        return sampler

    def checked(logprobs: mx.array) -> mx.array:
        # sync: only with --check-nan.
        if bool(mx.isnan(logprobs).any().item()):
            raise FloatingPointError("NaN in the logits, behind the last layer")
        return sampler(logprobs)

    return checked


def shared_sampler(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, comm: Comm
) -> Sampler:
    """A sampler whose token is rank 0's on every rank.

    Ranks that sampled for themselves could part at a near-tie, where chips round
    differently, and would then wait for each other for ever. Costs one small collective
    per token.
    """
    sampler = rank_sampler(args, tokenizer)
    return lambda logprobs: comm.broadcast(sampler(logprobs))


def seed_ranks(number: int | None, prepared: PreparedModel) -> None:
    """Seed MLX's random numbers alike on every rank, after the model was loaded.

    Args:
        number: None draws one. With a number a text is that of mlx_lm.generate on one
            rank, which seeds before it makes the model: the numbers that making the
            layers draws are drawn here too.
    """
    if number is None:
        drawn = broadcast_object(prepared.comm, random.randrange(2**31))
        mx.random.seed(drawn)
        return
    mx.random.seed(number)
    prepared.weights.outline()
