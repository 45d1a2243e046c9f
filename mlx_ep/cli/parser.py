"""The parser of the commands and the types of their flags."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

from mlx_ep.comm import UsageError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, named by rank where there are several.

    Attributes:
        raises: errors are a UsageError, for `run` to tell all ranks of.
    """

    raises = False

    def error(self, message: str) -> NoReturn:
        if self.raises:
            raise UsageError(message)
        rank = os.environ.get("MLX_RANK", "0")
        where = "" if rank == "0" else f" (rank {rank})"
        self.exit(2, f"{self.prog}{where}: error: {message} (--help lists all flags)\n")


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
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


def at_least_zero(text: str) -> float:
    """An argparse type: a number from 0 on."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return number


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return number
