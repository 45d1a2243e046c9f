"""Sampling that is the same on every rank."""

from __future__ import annotations

import argparse
import random

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep.cli.parser import at_least_zero, fraction
from mlx_ep.comm import Comm, broadcast_object
from mlx_ep.types import Sampler


def add_sampling_flags(
    parser: argparse.ArgumentParser, seed: int | None = None
) -> None:
    """The sampling flags of mlx_lm.generate, with its defaults."""
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
        "--min-tokens-to-keep", type=int, default=1, help="Least that --min-p keeps."
    )
    group.add_argument("--top-k", type=int, default=0, help="Top-k; 0 is off.")
    group.add_argument(
        "--xtc-probability", type=fraction, default=0.0, help="Probability of XTC."
    )
    group.add_argument(
        "--xtc-threshold", type=fraction, default=0.0, help="Threshold of XTC."
    )
    group.add_argument(
        "--seed",
        type=int,
        default=seed,
        help="Seed of the random numbers (default: %(default)s, None draws one).",
    )


def rank_sampler(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, comm: Comm
) -> Sampler:
    """A sampler for sequences that this rank alone runs."""
    return make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )


def shared_sampler(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, comm: Comm
) -> Sampler:
    """A sampler whose token is rank 0's on every rank.

    Ranks that sampled for themselves could part at a near-tie, where chips round
    differently, and would then wait for each other for ever. Costs one small collective
    per token.
    """
    sampler = rank_sampler(args, tokenizer, comm)
    return lambda logprobs: comm.broadcast(sampler(logprobs))


def seed_ranks(seed: int | None, comm: Comm) -> None:
    """Seed MLX's random numbers alike on every rank."""
    if seed is None:
        seed = broadcast_object(comm, random.randrange(2**31))
    mx.random.seed(seed)
