"""The flags that commands share. Those of EPConfig are made from its fields."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from mlx_ep.cli.parser import (
    Parser,
    above_zero,
    at_least,
    fraction,
    gigabytes,
    not_empty,
)
from mlx_ep.config import ALIASES, EPConfig, Setting, settings
from mlx_ep.exchange import STRATEGIES
from mlx_ep.loading.source import EMBEDDED_MODEL

# Which rank holds which experts.
PLACEMENT = ("memory", "replica_memory", "placement_file", "ep_size")
_DATA_HELP = (
    "; data, with --prompts-file: each rank runs attention and KV cache of its own "
    "sequences only"
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model and what belongs to it."""
    parser.add_argument(
        "--model",
        type=not_empty,
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
    parser.add_argument(
        "--adapter-path",
        type=_no_adapter,
        help="Refused: an adapter changes whole layers, of which a rank has a part. "
        "Fuse it into the model first (mlx_lm.fuse).",
    )


def _no_adapter(path: str) -> NoReturn:
    raise argparse.ArgumentTypeError(
        "must be left out: an adapter changes whole layers, of which a rank has a "
        f"part; got {path}. Fuse it into the model first (mlx_lm.fuse)"
    )


def add_ranks_flag(parser: argparse._ActionsContainer) -> None:
    """--ranks: an error if the launcher started another number."""
    parser.add_argument(
        "--ranks",
        type=at_least(1),
        metavar="N",
        help="The number of ranks this run must have; an error if the launcher started "
        "another number (default: whatever it started).",
    )


def add_ep_flags(
    parser: Parser, has_data: bool = False, has_stages: bool = False
) -> None:
    """Expert parallelism: --ranks, and every field of EPConfig.

    What was parsed has the EPConfig as ``config`` and none of its fields beside it;
    with `has_data` also ``data``, whether ``--attention data`` was given, and
    --dispatch-dtype, which needs it. --pp is there with `has_stages` only.
    """
    group = parser.add_argument_group("expert parallelism")
    add_ranks_flag(group)
    names = [setting.name for setting in settings()]
    there = {"pp": has_stages, "dispatch_dtype": has_data}
    for name in (name for name, is_there in there.items() if not is_there):
        names.remove(name)
        parser.set_defaults(**{name: getattr(EPConfig(), name)})
    add_config_flags(group, names)
    if has_data:
        attention = parser._option_string_actions["--attention"]
        attention.choices = (*(attention.choices or ()), "data")
        attention.help = attention.help.removesuffix(".") + _DATA_HELP  # type: ignore[union-attr]
    parser.finishers.append(_finish_config)


def add_config_flags(group: argparse._ActionsContainer, names: Sequence[str]) -> None:
    """The flags of some fields of EPConfig."""
    for setting in settings():
        if setting.name in names:
            group.add_argument(setting.flag_name, **_options(setting))


def _options(setting: Setting) -> dict[str, Any]:
    """The arguments of add_argument for a field of EPConfig."""
    flag, kind = setting.flag, setting.kind
    options: dict[str, Any] = {"dest": setting.name, "help": flag.help}
    if flag.otherwise:
        options["help"] += f" (default: {flag.otherwise})."
    if kind is bool:  # those that are on by default begin with --no-
        return options | {"action": f"store_{not setting.default}".lower()}
    options |= {"default": setting.default, "metavar": flag.metavar}
    if setting.name == "strategy":
        return options | {
            "choices": (*STRATEGIES, *ALIASES),
            "metavar": "NAME",
            "default": None,  # --attention data has another default
            "help": f"{flag.help}: {', '.join(STRATEGIES)}, or an alias "
            f"({', '.join(ALIASES)}) (default: {setting.default}, with --attention "
            "data auto).",
        }
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    if int in (kind, *get_args(kind)):
        return options | {"type": at_least(flag.least or 0)}
    if kind is float:
        return options | {"type": fraction}
    if float in get_args(kind):
        return options | {"type": above_zero}
    if tuple[float, ...] in get_args(kind):
        return options | {"type": gigabytes}
    return options


def _finish_config(args: argparse.Namespace) -> None:
    """One EPConfig instead of its fields.

    Raises:
        ValueError: a value is not allowed.
    """
    values = {s.name: vars(args).pop(s.name) for s in settings()}
    args.data = values["attention"] == "data"
    if args.data:
        values["attention"] = EPConfig().attention
    by_default = "auto" if args.data else EPConfig().strategy
    values["strategy"] = values["strategy"] or by_default
    args.config = EPConfig(**values)


def check_strategy(config: EPConfig, is_data: bool = False) -> None:
    """Raises:
    ValueError: the strategy is for tokens that the ranks do not have so.
    """
    if is_data == (config.strategy == "replicated"):
        attention = "data" if is_data else config.attention
        raise ValueError(
            "--strategy replicated goes with --attention replicated, tensor or auto "
            "(every rank holds the same tokens), the others with --attention data; got "
            f"--strategy {config.strategy} and --attention {attention}."
        )
