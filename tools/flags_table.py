"""Every flag that mlx-lm's commands and ours both have, or only theirs: docs/flags.md.

    python -m tools.flags_table          print the page
    python -m tools.flags_table --write  write docs/flags.md

A flag of the same name has the same default and short names, or a reason stands below;
a flag of theirs that ours lack has one too. tests/unit/test_flags.py holds both.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from mlx_ep.config import ALIASES

# mlx-lm's command -> ours, with its parser.
COMMANDS = {
    "generate": ("mlx_ep.generate", "mlx_ep.generate.flags"),
    "chat": ("mlx_ep.chat", "mlx_ep.chat"),
    "server": ("mlx_ep.server", "mlx_ep.server.flags"),
    "benchmark": ("mlx_ep.benchmark e2e", "mlx_ep.benchmark.flags"),
    "perplexity": ("mlx_ep.perplexity", "mlx_ep.perplexity"),
    "cache_prompt": ("mlx_ep.cache_prompt", "mlx_ep.cache_prompt"),
}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"

_MODEL = "the model inside the package, which needs no network"

# (command, flag) -> why it is another here; "*" is every command.
REASONS = {
    ("*", "--model"): _MODEL,
    ("*", "--adapter-path"): "refused by name: an adapter changes whole layers, and a "
    "rank has a part of them; fuse it into the model first (mlx_lm.fuse)",
    ("*", "--pipeline"): "layers on other ranks: here experts are what is spread",
    ("*", "--quantize-activations"): "the experts' runners take float rows",
    ("generate", "--seed"): "none draws one, and rank 0's counts",
    ("generate", "--prompt"): "a question that the model inside the package can answer",
    ("generate", "--image"): "text only",
    ("generate", "--use-default-chat-template"): "says that it has no effect; in "
    "mlx_lm.generate nothing reads it",
    ("server", "--allowed-origins"): "none: pages of other sites may not ask unless "
    "they are listed; `*` is all",
    ("server", "--draft-model"): "a draft saves time for one sequence, not for a batch;"
    " mlx_ep.generate has it",
    ("server", "--num-draft-tokens"): "as `--draft-model`",
    ("server", "--log-level"): "the same: capitals or not; without CRITICAL",
    ("server", "--prompt-concurrency"): "one chunk of prompts is processed beside each "
    "decoded token, of as many prompts as it has room for",
    ("server", "--prefill-step-size"): "2048 tokens are seconds in which no running "
    "answer goes on",
    ("server", "--prompt-cache-size"): "the prefix cache is bounded in bytes",
    ("server", "--prompt-cache-bytes"): "a quarter of what KV caches may take, instead "
    "of no bound; also `--prefix-cache-memory`",
    ("server", "--kv-bits"): "refused by name: mlx-lm's quantized KV caches cannot be "
    "merged into a batch",
    ("server", "--kv-group-size"): "as `--kv-bits`",
    ("server", "--quantized-kv-start"): "as `--kv-bits`",
    ("benchmark", "--generation-tokens"): "several batches and arms are measured: 1024 "
    "tokens for each would take hours; also `--max-tokens`",
    ("benchmark", "--batch-size"): "a comma list, one after the other: EP pays off "
    "with several sequences; also `--batch`",
    ("benchmark", "--num-trials"): "most samples within `--budget` seconds, for "
    "medians instead of means; also `--samples`",
    ("benchmark", "--delay"): "arms are measured in turn, which a delay would not make "
    "more even",
    ("perplexity", "--data-path"): "`--text` takes a file: a data set would need the "
    "network on every host",
    ("perplexity", "--seed"): "nothing is drawn: the first `--num-samples` sequences",
}  # fmt: skip


class Flag(NamedTuple):
    """A flag of a command; `default` is as a person would type it."""

    names: tuple[str, ...]
    default: str
    required: bool
    values: str | int | None  # how many it takes, as argparse has it

    @property
    def name(self) -> str:
        return self.names[0]


class Row(NamedTuple):
    """What a flag of mlx-lm's command is in ours; `ours` None: ours lacks it."""

    theirs: Flag
    ours: Flag | None
    reason: str

    @property
    def is_same(self) -> bool:
        return (
            self.ours is not None
            and set(self.theirs.names) <= set(self.ours.names)
            and self.theirs.default == self.ours.default
            and self.theirs.required == self.ours.required
            and self.theirs.values == self.ours.values
        )


class _ParsedError(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of_mlx_lm(command: str) -> argparse.ArgumentParser:
    """The parser that a command of mlx-lm makes, wherever it makes it."""

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _ParsedError(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            import_module(f"mlx_lm.{command}").main()
        except _ParsedError as found:
            return found.parser
    raise AssertionError(f"mlx_lm.{command} parses no command line")


def parser_of_ours(command: str) -> argparse.ArgumentParser:
    """Of mlx_ep.benchmark, the one of level e2e."""
    parser = import_module(COMMANDS[command][1]).make_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices["e2e"]
    return parser


def flags(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    """Long names first."""
    for action in parser._actions:
        if not action.option_strings or action.default is argparse.SUPPRESS:
            continue
        names = sorted(action.option_strings, key=lambda name: (-len(name), name))
        default = action.default
        in_words = re.search(r"\(default: (.*)\)\.$", action.help or "")
        if default is None and in_words:  # made later, of other flags
            said = in_words[1]
        elif default is None or default is False or default in ((), {}):
            said = "none"
        else:
            said = str(default)
        yield Flag(tuple(names), said, action.required, action.nargs)


def rows(command: str) -> list[Row]:
    """Every flag of mlx-lm's command, in its order."""
    ours = {
        name: flag for flag in flags(parser_of_ours(command)) for name in flag.names
    }
    found = []
    for theirs in flags(parser_of_mlx_lm(command)):
        name = theirs.name
        reason = REASONS.get((command, name)) or REASONS.get(("*", name), "")
        found.append(Row(theirs, ours.get(name), reason))
    return found


def only_ours(command: str) -> list[str]:
    """The flags of our command that mlx-lm's lacks."""
    known = {name for flag in flags(parser_of_mlx_lm(command)) for name in flag.names}
    mine = flags(parser_of_ours(command))
    return [flag.name for flag in mine if not known & set(flag.names)]


def page() -> str:
    """docs/flags.md."""
    parts = [_TOP]
    for command, (ours, _) in COMMANDS.items():
        parts.append(f"## `{ours}` and `mlx_lm.{command}`\n")
        parts.append("| flag | mlx-lm | here | why |\n| --- | --- | --- | --- |")
        for row in rows(command):
            names = ", ".join(f"`{name}`" for name in row.theirs.names)
            here = "not there" if row.ours is None else _default(row.ours)
            parts.append(
                f"| {names} | {_default(row.theirs)} | "
                f"{'same' if row.is_same else here} | {row.reason} |"
            )
        more = ", ".join(f"`{name}`" for name in only_ours(command))
        parts.append(f"\nOnly here: {more}.\n")
    parts.append(_strategies())
    return "\n".join(parts).rstrip() + "\n"


def _strategies() -> str:
    """What `--strategy` takes beside its own names."""
    others: dict[str, list[str]] = {}
    for alias, (strategy, mode) in ALIASES.items():
        own = f"`--strategy {strategy}" + (f" --mode {mode}`" if mode else "`")
        others.setdefault(own, []).append(f"`{alias}`")
    lines = [f"| {own} | {', '.join(names)} |" for own, names in others.items()]
    return "\n".join([_STRATEGIES, *lines])


def _default(flag: Flag) -> str:
    return "required" if flag.required else f"`{flag.default}`"


_TOP = """\
# Flags of mlx-lm's commands, here

Made by `python -m tools.flags_table --write`; a test compares it with the parsers of
both. The columns are defaults. A flag of the same name means the same; where its
default is another, or it is not here, the reason stands beside it. `--help` of a
command explains every flag.

`--seed` gives the text of `mlx_lm.generate` with the same seed on one rank, and on
several as far as their sums round alike.
"""

_STRATEGIES = """\
## Strategies by other names

`--strategy` and `EPConfig(strategy=...)` take the names of SGLang, DeepEP, vLLM and
InfiniLM too. A command prints what runs by our name and, as InfiniLM does, as
`MoE EP backend: local_allreduce  TP=2  DP=1  EP=2`: TP ranks hold the same tokens, DP
ranks have tokens of their own, the experts are divided in EP parts. It says `disabled`
where EP is 1 (one rank, a dense model, `--strategy local`, or
`--ep 1`, where all ranks share the width of every expert); the alias
`disabled` names the strategy only and leaves the experts where `--ep` puts them.

| here | elsewhere |
| --- | --- |"""


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
