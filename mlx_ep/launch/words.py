"""What every way to start a rank needs."""

from __future__ import annotations

import argparse
import sys

SECRET = "MLX_EP_SECRET"  # mlx_ep.comm reads it


def entries(args: argparse.Namespace) -> list[str]:
    """Variables of the hostfile and of --env, which goes first."""
    return [*args.hosts.env, *args.env]


def command(args: argparse.Namespace, is_here: bool) -> list[str]:
    """The command on a host: Python's own words get a Python before them."""
    first = args.command[0]
    python = sys.executable if is_here else args.python
    if python is None:
        return args.command
    if first.startswith("mlx_ep.") and "/" not in first:
        return [python, "-m", *args.command]
    if first == "-m" or first.endswith(".py"):
        return [python, *args.command]
    return args.command


def exit_code(returncode: int) -> int:
    """As a shell gives it: 128 and the signal that ended a process."""
    return returncode if returncode >= 0 else 128 - returncode
