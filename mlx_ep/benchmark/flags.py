"""The command line of ``mlx_ep.benchmark``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from mlx_ep import cli
from mlx_ep.benchmark.arms import ARMS
from mlx_ep.benchmark.samples import LEAST_SAMPLES
from mlx_ep.benchmark.shapes import DTYPES, MODES, NAMED_LAYERS, default_dtype
from mlx_ep.config import RunnerName

TOKENS = "1,4,16,64,256,1024,4096"


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="mlx_ep.benchmark",
        description="Measure expert against tensor parallelism, on every rank that the "
        "launcher started (mlx.launch -n 2 -- mlx_ep.benchmark layer ...). One rank "
        "alone measures arm single.",
    )
    levels = parser.add_subparsers(dest="level", required=True, metavar="LEVEL")
    levels.add_parser(
        "serve",
        add_help=False,
        help="a load on any OpenAI endpoint: TTFT, ITL, TPOT, throughput",
    )
    add_layer_flags(
        levels.add_parser(
            "layer",
            help="one MoE layer of a given shape, over a sweep of tokens",
            description="One MoE layer with random weights; nothing is downloaded.",
        )
    )
    add_model_flags(
        levels.add_parser(
            "e2e",
            help="a whole model: prompt and decode tokens per second",
            description="A whole model, or its config.json with --dummy-weights. "
            "Greedy, no stop tokens; random prompts.",
        )
    )
    return parser


def add_layer_flags(parser: argparse.ArgumentParser) -> None:
    """What level layer takes."""
    parser.add_argument(
        "--shape",
        default="qwen3-30b-a3b",
        help=f"{', '.join(NAMED_LAYERS)}, or four numbers E,D,F,K (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--scale",
        type=cli.positive,
        default=1,
        help="Divide D and F by it, for small machines (default: %(default)s).",
    )
    parser.add_argument("--tokens", default=TOKENS, help="T, of all ranks together.")
    parser.add_argument(
        "--quantization",
        choices=MODES,
        help="How the experts are quantized (default: affine, and mxfp4 for "
        "gpt-oss-120b).",
    )
    parser.add_argument("--bits", type=int, help="Of affine (default: 4).")
    parser.add_argument("--group-size", type=int, help="Of affine (default: 64).")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default=default_dtype(),
        help="Of tokens and scales (default here: %(default)s).",
    )
    parser.add_argument(
        "--skew",
        type=cli.at_least_zero,
        default=0.0,
        help="The popularity of experts falls as 1 / rank^SKEW (default: 0, uniform).",
    )
    parser.add_argument(
        "--legacy-3158",
        action="store_true",
        help="A further column: EP over TP as ml-explore/mlx#3158 counted it.",
    )
    add_common_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What level e2e takes."""
    cli.add_model_flags(parser)
    parser.add_argument(
        "--batch",
        "--batch-size",
        "-b",
        default="1,8",
        help="Sequences at once, of all ranks together; several as a comma list "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--prompt-tokens",
        "-p",
        type=cli.positive,
        default=512,
        help="Of each sequence (default: %(default)s).",
    )
    parser.add_argument(
        "--max-tokens",
        "--generation-tokens",
        "-m",
        "-g",
        type=cli.positive,
        default=64,
        help="Generated for each sequence, 2 or more (default: %(default)s).",
    )
    parser.add_argument(
        "--prefill-step-size",
        type=cli.positive,
        default=2048,
        help="Prompt tokens of a sequence processed at a time (default: %(default)s).",
    )
    add_common_flags(parser)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """What both levels take."""
    cli.add_ranks_flag(parser)
    parser.add_argument(
        "--arms",
        help=f"Of {', '.join(ARMS)} (default: all that there are).",
    )
    parser.add_argument(
        "--runner",
        dest="runners",
        default="gather",
        help="What runs the experts of the ep arms: gather, which is what mlx-lm runs "
        "in single and tp too, auto (the package's own choice), blas, metal; several "
        "as a comma list (default: %(default)s).",
    )
    parser.add_argument(
        "--budget",
        type=cli.at_least_zero,
        default=30.0,
        help="Seconds for the samples of one point, all arms; at least "
        f"{LEAST_SAMPLES} samples of each are taken (default: %(default)s).",
    )
    parser.add_argument(
        "--samples",
        "--num-trials",
        "-n",
        type=cli.positive,
        default=50,
        help="Most samples of each arm at one point (default: %(default)s).",
    )
    parser.add_argument(
        "--seed",
        type=cli.at_least(0),
        default=0,
        help="Of tokens and routing (default: 0).",
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="Give each rank cores of its own, where the system can.",
    )
    parser.add_argument(
        "--memory-limit-gb",
        type=cli.above_zero,
        help="Most GB a rank may hold (default: what the device offers).",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the records.")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="Draw them (needs matplotlib)."
    )


def chosen_arms(
    args: argparse.Namespace, why_not: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """The arms to measure, and why others are not.

    Args:
        why_not: why an arm does not exist here, or "".

    Raises:
        ValueError: an arm that was asked for does not exist, or not here.
    """
    if args.arms is None:
        reasons = {arm: why_not(arm) for arm in ARMS}
        notes = [
            f"left out: {', '.join(arm for arm in ARMS if reasons[arm] == why)}: {why}"
            for why in dict.fromkeys(reasons.values())
            if why
        ]
        return [arm for arm, why in reasons.items() if not why], notes
    arms = list(dict.fromkeys(args.arms.split(",")))
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"--arms are {', '.join(ARMS)}; got {arm!r}.")
        if why := why_not(arm):
            raise ValueError(f"There is no arm {arm} here: {why}.")
    return arms, []


def chosen_runners(text: str) -> list[RunnerName]:
    """Raises:
    ValueError: there is no such runner.
    """
    known: dict[str, RunnerName] = {runner: runner for runner in get_args(RunnerName)}
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"--runner is of {', '.join(known)}; got {name!r}.")
    return [known[name] for name in names]
