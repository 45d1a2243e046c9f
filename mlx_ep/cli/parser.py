"""The parser of the commands and the types of their flags."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn

from mlx_ep.cli.say import (
    one_line_warnings,
    rank_of_environment,
    start_logging,
    versions,
)
from mlx_ep.comm import UsageError

# MLX's random numbers take an unsigned number of 64 bits.
_LARGEST_SEED = 2**64 - 1


class _Help(argparse.HelpFormatter):
    """Help in which every flag says its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        is_flag = bool(action.option_strings) and not action.required
        if text is None or not is_flag or action.default is argparse.SUPPRESS:
            return text
        if "default" in text:
            return text
        if isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
            said = "off"
        elif action.default in (None, (), {}):
            said = "none"
        else:
            said = "%(default)s"
        return f"{text.removesuffix('.')} (default: {said})."


class _Level(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        if Parser.raises:
            raise UsageError(message)
        rank = rank_of_environment()
        where = f" (rank {rank})" if rank else ""
        # One line, and below it what the ranks have (`mlx_ep.comm.symmetry`).
        text, *rows = message.split("\n|")
        line = " ".join(text.split())
        table = "".join(f"|{row}\n" for row in rows)
        hint = "(--help lists all flags)"
        self.exit(2, f"{self.prog}{where}: error: {line} {hint}\n{table}")


class Parser(_Level):
    """The parser of a command, with the flags that every command has.

    Attributes:
        raises: errors are a UsageError, for `run` to tell all ranks of.
        finishers: called with what was parsed; a ValueError is an error of the command
            line. Here flags become records.
    """

    raises = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.finishers: list[Callable[[argparse.Namespace], None]] = []
        self.add_argument("--version", action="version", version=versions())
        self.add_argument(
            "--log-level",
            type=str.lower,  # mlx-lm's are in capitals
            choices=("debug", "info", "warning", "error"),
            default="info",
            help="What is said on the standard error beside bars and results.",
        )

    def add_subparsers(self, **options: Any) -> Any:
        return super().add_subparsers(**{"parser_class": _Level, **options})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found = super().parse_args(args, namespace)
        start_logging(self.prog, found.log_level)
        with one_line_warnings():
            for finish in self.finishers:
                try:
                    finish(found)
                except ValueError as error:
                    self.error(str(error))
        return found


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a whole number, got {text!r}"
        ) from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` on."""

    def parse(text: str) -> int:
        number = _whole(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {number}")
        return number

    return parse


positive = at_least(1)


def seed(text: str) -> int:
    """An argparse type: what MLX's random numbers start from."""
    number = _whole(text)
    if not 0 <= number <= _LARGEST_SEED:
        raise argparse.ArgumentTypeError(
            f"must be from 0 to {_LARGEST_SEED}, got {number}"
        )
    return number


def gigabytes(text: str) -> tuple[float, ...]:
    """An argparse type: numbers above 0 between commas."""
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = (0.0,)
    if not all(0 < number < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError(
            f"must be GB per rank, such as 512,128,64; got {text!r}"
        )
    return numbers


def above_zero(text: str) -> float:
    """An argparse type: a number above 0."""
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def at_least_zero(text: str) -> float:
    """An argparse type: a number from 0 on."""
    number = _number(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return number


def part(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return number


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return number


def half(text: str) -> float:
    """An argparse type: a number from 0 to 0.5."""
    number = _number(text)
    if not 0 <= number <= 0.5:
        raise argparse.ArgumentTypeError(f"must be between 0 and 0.5, got {text}")
    return number


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: an object in JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return found


def not_empty(text: str) -> str:
    """An argparse type: a text that says something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text
