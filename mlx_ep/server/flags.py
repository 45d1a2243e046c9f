"""The command line of ``mlx_ep.server``: mlx_lm.server's flags, and its own."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from mlx_ep import cli
from mlx_ep.server.asked import Defaults, Names
from mlx_ep.server.listener import PortLimits
from mlx_ep.server.pools import EngineOptions
from mlx_ep.server.service import Access

KEY_VARIABLE = "MLX_EP_API_KEY"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)B?", re.IGNORECASE)


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.server",
        description="An OpenAI- and Anthropic-compatible endpoint over all ranks; rank "
        "0 answers. docs/server.md describes it.",
    )
    cli.add_model_flags(parser)
    parser.add_argument(
        "--model-alias",
        action="append",
        default=[],
        type=cli.not_empty,
        metavar="NAME",
        help="A further name that requests may call the model by; may be repeated.",
    )
    _add_address_flags(parser)
    _add_answer_flags(parser)
    _add_engine_flags(parser)
    cli.add_ep_flags(parser, has_data=True)
    copies = parser._option_string_actions["--replica-memory"]
    copies.default = None
    copies.help = (copies.help or "").removesuffix(".") + (
        " (default: with --attention data all, where they fit beside KV caches, else 0)"
    )
    parser.finishers.insert(0, _note_copies)
    attention = parser._option_string_actions["--attention"]
    attention.help = (attention.help or "").replace("with --prompts-file: ", "")
    parser.finishers.append(_finish)
    return parser


def _note_copies(args: argparse.Namespace) -> None:
    """Whether the server says how many copies of experts there are."""
    args.chooses_copies = args.replica_memory is None
    args.replica_memory = args.replica_memory or "0"


def _add_address_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("address and access")
    group.add_argument(
        "--host",
        type=cli.not_empty,
        default="127.0.0.1",
        help="The address to listen at; 0.0.0.0 is every network of this host.",
    )
    group.add_argument(
        "--port", type=_port, default=8080, help="0 takes a free one and says which."
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        type=cli.not_empty,
        metavar="KEY",
        help="Requests must have one of these keys; may be repeated. Others see a "
        f"command line: {KEY_VARIABLE} in the environment is better (default: "
        f"{KEY_VARIABLE}).",
    )
    group.add_argument(
        "--allowed-origins",
        type=lambda text: [part for part in text.split(",") if part],
        default=[],
        metavar="ORIGIN,...",
        help="Web pages of these origins may ask from a browser; * is all "
        "(default: none).",
    )
    group.add_argument(
        "--max-body",
        type=_size,
        default="32MB",
        metavar="SIZE",
        help="Longest body of a request.",
    )
    group.add_argument(
        "--max-connections",
        type=cli.positive,
        default=PortLimits.connections,
        help="At once; for one more, the one that idles longest is closed.",
    )
    for name, default, what in (
        ("header", PortLimits.header_seconds, "for a request's headers"),
        ("idle", PortLimits.idle_seconds, "that a connection may idle"),
        ("send", Access.send_seconds, "after which a client that does not read, or "
         "does not send its body, is given up"),
        ("keep-alive", Access.keep_alive_seconds, "between signs of life on a stream"),
    ):  # fmt: skip
        group.add_argument(
            f"--{name}-timeout",
            type=cli.above_zero,
            default=default,
            metavar="SECONDS",
            help=f"Seconds {what}.",
        )
    group.add_argument(
        "--grace",
        type=cli.at_least_zero,
        default=30.0,
        metavar="SECONDS",
        help="After SIGTERM or Ctrl-C, requests in flight get so long; a second signal "
        "ends them at once.",
    )


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a request that says nothing gets")
    group.add_argument(
        "--temp",
        type=cli.at_least_zero,
        default=Defaults.temperature,
        help="Temperature; 0 is greedy.",
    )
    group.add_argument(
        "--top-p", type=cli.fraction, default=Defaults.top_p, help="1 is off."
    )
    group.add_argument(
        "--top-k", type=cli.at_least(0), default=Defaults.top_k, help="0 is off."
    )
    group.add_argument(
        "--min-p", type=cli.fraction, default=Defaults.min_p, help="0 is off."
    )
    group.add_argument(
        "--max-tokens",
        type=cli.positive,
        default=Defaults.max_tokens,
        help="Most tokens of an answer.",
    )
    group.add_argument(
        "--seed",
        type=cli.at_least(0),
        help="Of what requests without a seed draw (default: a random one).",
    )
    group.add_argument(
        "--chat-template", default="", help="A template instead of the tokenizer's."
    )
    group.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="No effect: tokenizers bring their templates themselves.",
    )
    group.add_argument(
        "--chat-template-args",
        type=cli.json_object,
        default="{}",
        metavar="JSON",
        help="Arguments of the chat template, such as '{\"enable_thinking\":false}'.",
    )


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batches and memory")
    options = EngineOptions()
    group.add_argument(
        "--max-num-seqs",
        "--decode-concurrency",
        type=cli.positive,
        default=options.max_num_seqs,
        help="Sequences that are decoded at once, of all ranks together.",
    )
    group.add_argument(
        "--max-waiting",
        type=cli.at_least(0),
        default=options.max_waiting,
        help="Requests that may wait for a place; one more gets 429.",
    )
    group.add_argument(
        "--prefill-step-size",
        "--prefill-step",
        type=cli.positive,
        default=options.prefill_step,
        help="Prompt tokens that are processed beside one decoded token.",
    )
    group.add_argument(
        "--max-kv-memory",
        type=_size,
        metavar="SIZE",
        help="Of a rank, for KV caches of running requests (default: what "
        "--kv-fraction and the prefix cache leave).",
    )
    group.add_argument(
        "--kv-fraction",
        type=cli.fraction,
        default=options.kv_fraction,
        help="Of the memory behind the weights, for KV caches and prefix cache.",
    )
    group.add_argument(
        "--prefix-cache-memory",
        "--prompt-cache-bytes",
        type=_size,
        metavar="SIZE",
        help="Of a rank, for KV caches of earlier requests; 0 keeps none (default: a "
        "quarter of --kv-fraction).",
    )
    group.add_argument(
        "--max-context",
        type=cli.at_least(2),
        metavar="TOKENS",
        help="Most tokens of a prompt and its answer (default: the model's).",
    )
    group.add_argument("--kv-bits", type=_no_kv_bits, help="Refused: " + _NO_KV_BITS)


_NO_KV_BITS = "mlx-lm's quantized KV caches cannot be merged into a batch."


def _no_kv_bits(text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(
        f"must be left out: {_NO_KV_BITS[:-1]}; got {text}. mlx_ep.generate has it"
    )


def _port(text: str) -> int:
    number = cli.at_least(0)(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {number}")
    return number


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 8GB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _finish(args: argparse.Namespace) -> None:
    """Records instead of their flags; keys are in one that does not show them.

    Raises:
        ValueError: a value is not allowed.
    """
    cli.check_strategy(args.config, args.data)
    given = vars(args)
    args.access = make_access(args, os.environ)
    args.limits = PortLimits(
        connections=given.pop("max_connections"),
        header_seconds=given.pop("header_timeout"),
        idle_seconds=given.pop("idle_timeout"),
    )
    args.defaults = Defaults(
        temperature=given.pop("temp"),
        top_p=given.pop("top_p"),
        top_k=given.pop("top_k"),
        min_p=given.pop("min_p"),
        max_tokens=given.pop("max_tokens"),
    )
    args.options = EngineOptions(
        max_num_seqs=given.pop("max_num_seqs"),
        max_waiting=given.pop("max_waiting"),
        prefill_step=given.pop("prefill_step_size"),
        max_kv_memory=given.pop("max_kv_memory"),
        kv_fraction=given.pop("kv_fraction"),
        prefix_cache_memory=given.pop("prefix_cache_memory"),
        context=given.pop("max_context"),
        seed=given.pop("seed"),
    )


def make_access(args: argparse.Namespace, environment: Mapping[str, str]) -> Access:
    """Who may ask: keys of the command line, or else of the environment."""
    given = vars(args)
    keys = given.pop("api_key")
    if not keys and KEY_VARIABLE in environment:
        keys = [environment[KEY_VARIABLE]]
        if not keys[0].strip():
            raise ValueError(f"{KEY_VARIABLE} must not be empty; unset it for no key.")
    return Access(
        api_keys=tuple(keys),
        origins=tuple(given.pop("allowed_origins")),
        body_bytes=given.pop("max_body"),
        send_seconds=given.pop("send_timeout"),
        keep_alive_seconds=given.pop("keep_alive_timeout"),
    )


def model_names(model: str, aliases: list[str]) -> Names:
    """What requests may call a model: as it was given, its folder's name, aliases."""
    names = [model]
    if (folder := Path(model)).is_dir():
        names += [str(folder.resolve()), folder.resolve().name]
    return Names(tuple(dict.fromkeys([*names, *aliases])))
