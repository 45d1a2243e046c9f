"""The flags that commands share; their defaults are those of EPConfig."""

from __future__ import annotations

import argparse
from typing import get_args

from mlx_ep.cli.parser import Parser, gigabytes, positive
from mlx_ep.config import (
    ALIASES,
    Attention,
    Backend,
    Download,
    EPConfig,
    Mode,
    Reduction,
    Runner,
    SharedRouting,
    Sums,
)
from mlx_ep.exchange import STRATEGIES
from mlx_ep.loading.source import EMBEDDED_MODEL

_ATTENTION_HELP = (
    "How attention and the other dense layers run. replicated: whole on every rank; "
    "tensor: split over the ranks by the model's own shard(); auto: the one of these "
    "that fits and is predicted to be faster"
)
_DATA_HELP = (
    "; data, with --prompts-file: each rank runs attention and KV cache of its own "
    "sequences only"
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model and what belongs to it."""
    parser.add_argument(
        "--model",
        default=EMBEDDED_MODEL,
        help="A model folder, a hub repository, or the model inside the package "
        f"(default: {EMBEDDED_MODEL}).",
    )
    parser.add_argument(
        "--revision", help="A branch, tag or commit of the hub repository."
    )
    parser.add_argument(
        "--dummy-weights",
        action="store_true",
        help="Random weights for the architecture in the model's config.json; no "
        "weight file is needed or read.",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run code that comes with the model.",
    )


def add_ep_flags(parser: argparse.ArgumentParser, has_data: bool = False) -> None:
    """Expert parallelism; the defaults are those of EPConfig.

    Args:
        has_data: whether ``--attention data`` is possible.
    """
    defaults = EPConfig()
    group = parser.add_argument_group("expert parallelism")
    group.add_argument(
        "--ranks",
        type=int,
        help="The number of ranks this run must have; an error if the launcher started "
        "another number (default: whatever it started).",
    )
    group.add_argument(
        "--strategy",
        choices=(*STRATEGIES, *ALIASES),
        metavar="NAME",
        help="How tokens meet the experts of other ranks: "
        f"{', '.join(STRATEGIES)}, or an alias ({', '.join(ALIASES)}) (default: "
        f"{defaults.strategy}, with --attention data auto).",
    )
    group.add_argument(
        "--attention",
        choices=(*get_args(Attention), *(["data"] if has_data else [])),
        default=defaults.attention,
        help=_ATTENTION_HELP
        + (_DATA_HELP if has_data else "")
        + " (default: %(default)s).",
    )
    group.add_argument(
        "--mode",
        choices=get_args(Mode),
        default=defaults.mode,
        help="Of the strategy all_to_all (default: %(default)s).",
    )
    group.add_argument(
        "--low-latency-tokens",
        type=positive,
        default=defaults.low_latency_tokens,
        help="Most tokens of a rank in mode low_latency (default: %(default)s).",
    )
    group.add_argument(
        "--round-tokens",
        type=positive,
        default=defaults.round_tokens,
        help="Most tokens of a rank exchanged at once (default: %(default)s).",
    )
    group.add_argument(
        "--sums",
        choices=get_args(Sums),
        default=defaults.sums,
        help="The dtype in which all_to_all sends sums back (default: %(default)s).",
    )
    group.add_argument(
        "--capacity",
        type=positive,
        help="Most tokens of a rank that one expert takes; the rest is dropped and "
        "counted (default: nothing is dropped).",
    )
    group.add_argument(
        "--reduction",
        choices=get_args(Reduction),
        default=defaults.reduction,
        help="per_slot is bit-identical to one process, for K times the bytes "
        "(default: %(default)s).",
    )
    group.add_argument(
        "--shared-routing",
        choices=get_args(SharedRouting),
        default=defaults.shared_routing,
        help="Send rank 0's routing to all ranks; auto: where the ranks' chips differ "
        "(default: %(default)s).",
    )
    group.add_argument(
        "--runner",
        choices=get_args(Runner),
        default=defaults.runner,
        help="What runs the experts of a rank (default: %(default)s).",
    )
    group.add_argument(
        "--backend",
        choices=get_args(Backend),
        default=defaults.backend,
        help="What computes them; MLX_EP_BACKEND goes first (default: %(default)s).",
    )
    group.add_argument(
        "--no-warmup",
        dest="warmup",
        action="store_false",
        help="Do not check and time the ways to run experts; a fixed rule chooses.",
    )
    group.add_argument(
        "--memory-limit-gb",
        type=float,
        default=defaults.memory_limit_gb,
        help="Most GB of weights a rank may hold (default: what the device offers).",
    )
    group.add_argument(
        "--download",
        choices=get_args(Download),
        default=defaults.download,
        help="Of a hub repository: ranges fetches what this rank needs, full all files "
        "(default: %(default)s).",
    )
    add_placement_flags(group)
    group.add_argument(
        "--context",
        type=positive,
        default=0,
        metavar="TOKENS",
        help="With --memory: leave room for the KV cache of that many tokens, and for "
        "computing them.",
    )


def add_placement_flags(group: argparse._ActionsContainer) -> None:
    """Which rank holds which experts; the defaults are those of EPConfig."""
    group.add_argument(
        "--memory",
        type=gigabytes,
        metavar="GB,GB,...",
        help="GB that each rank may hold, in rank order: gives each its share of the "
        "experts (default: the same number for every rank).",
    )
    group.add_argument(
        "--placement",
        dest="placement_file",
        metavar="FILE",
        help="A JSON file that says which rank holds which experts (docs/plan.md).",
    )
    group.add_argument(
        "--ep",
        dest="ep_size",
        type=positive,
        metavar="N",
        help="With strategy replicated: N groups of ranks; experts belong to a group, "
        "whose ranks share their width (default: as many as ranks).",
    )


def add_ranks_flag(parser: argparse.ArgumentParser) -> None:
    """--ranks, for a command that makes no model expert-parallel by flags.

    The others of `add_ep_flags` get their defaults, which `run` looks at.
    """
    hidden = Parser(add_help=False)
    add_ep_flags(hidden)
    parser.set_defaults(**vars(hidden.parse_args([])))
    parser.add_argument(
        "--ranks",
        type=int,
        help="The number of ranks this run must have (default: whatever was started).",
    )


def ep_config(args: argparse.Namespace) -> EPConfig:
    """The EPConfig that the flags say.

    Raises:
        ValueError: a value is not allowed.
    """
    is_data = args.attention == "data"
    by_default = "auto" if is_data else EPConfig().strategy
    return EPConfig(
        strategy=args.strategy or by_default,
        mode=args.mode,
        low_latency_tokens=args.low_latency_tokens,
        round_tokens=args.round_tokens,
        sums=args.sums,
        capacity=args.capacity,
        reduction=args.reduction,
        runner=args.runner,
        backend=args.backend,
        warmup=args.warmup,
        shared_routing=args.shared_routing,
        attention="replicated" if is_data else args.attention,
        memory_limit_gb=args.memory_limit_gb,
        memory=args.memory,
        context=args.context,
        placement_file=args.placement_file,
        ep_size=args.ep_size,
        download=args.download,
    )


def check_strategy(config: EPConfig, attention: str) -> None:
    """Raises:
    ValueError: the strategy is for tokens that the ranks do not have so.
    """
    if (attention == "data") == (config.strategy == "replicated"):
        raise ValueError(
            "--strategy replicated goes with --attention replicated, tensor or auto "
            "(every rank holds the same tokens), the others with --attention data; got "
            "--strategy "
            f"{config.strategy} and attention {attention}."
        )
