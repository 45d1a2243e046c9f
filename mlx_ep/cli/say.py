"""What a command says beside its results: one line each, on the standard error."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

_log = logging.getLogger("mlx_ep")


def versions() -> str:
    """The package and what it runs on."""
    return ", ".join(f"{name} {version(name)}" for name in ("mlx-ep", "mlx", "mlx-lm"))


def rank_of_environment() -> int:
    """This rank as the launcher says, before ranks are connected; 0 without one."""
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


class _OneLine(logging.Formatter):
    def __init__(self, prog: str) -> None:
        super().__init__()
        rank = rank_of_environment()
        self._who = f"{prog} (rank {rank})" if rank else prog

    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().split())
        if record.levelno == logging.INFO:
            return f"{self._who}: {text}"
        return f"{self._who}: {record.levelname.lower()}: {text}"


def start_logging(prog: str, level: str) -> None:
    """Say what the package logs from `level` on; at info, rank 0 alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(prog))
    _log.handlers = [handler]
    _log.propagate = False
    wanted = logging.getLevelNamesMapping()[level.upper()]
    if wanted == logging.INFO and rank_of_environment():
        wanted = logging.WARNING
    _log.setLevel(wanted)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C in a command without ranks is one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("[mlx_ep] interrupted (Ctrl-C)", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings in the body are one line without a place in the source.

    A UserWarning is about what was asked for, the same on every rank: rank 0 says it.
    """

    def say(message: Warning | str, category: type[Warning], *_: object) -> None:
        if category is not UserWarning or rank_of_environment() == 0:
            _log.warning("%s", message)

    with warnings.catch_warnings():
        warnings.showwarning = say  # type: ignore[assignment]
        yield
