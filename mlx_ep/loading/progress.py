"""What a rank shows of a phase that takes long: a bar in a terminal, else lines.

Each rank has a bar of its own, in the terminal's line of its number: ranks read and
fetch other bytes at other speeds, and the one that all wait for is what a user wants to
see, which one bar with the sum would hide. Ranks whose output goes through
`mlx_ep.launch` have no terminal; it tells them that it has one, and draws their bars.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal

from tqdm import tqdm

from mlx_ep.metrics import format_bytes

# Set by mlx_ep.launch: the columns of the terminal in which it draws the ranks' bars.
BARS = "MLX_EP_BARS"
_WORTH_A_LINE = 1.0  # seconds of a phase whose end is said too

Advance = Callable[[int], object]
Unit = Literal["B", "shapes"]
_log = logging.getLogger(__name__)


@contextmanager
def watch_phase(
    what: str, total: int, rank: int, unit: Unit = "B", done: int = 0, of: str = ""
) -> Iterator[Advance]:
    """Show a phase of a rank on the standard error while the body runs.

    Args:
        what: the phase, such as "loading".
        total: how much there is; 0: nothing is shown.
        done: how much of it was there before.
        of: what it belongs to, for the line.

    Yields:
        What takes how much more is done; threads may call it.
    """
    drawn = os.environ.get(BARS, "")
    if total <= 0:
        yield lambda amount: None
    elif drawn.isdecimal() or sys.stderr.isatty():
        with _bar(f"rank {rank} {what}", total, rank, unit, done, drawn) as advance:
            yield advance
    else:
        amount = format_bytes(total - done) if unit == "B" else f"{total} {unit}"
        _log.info("rank %d: %s %s%s", rank, what, amount, of)
        start = time.perf_counter()
        yield lambda amount: None
        if (seconds := time.perf_counter() - start) > _WORTH_A_LINE:
            _log.info("rank %d: %s done, %.1f s", rank, what, seconds)


@contextmanager
def _bar(
    name: str, total: int, rank: int, unit: Unit, done: int, drawn: str
) -> Iterator[Advance]:
    with tqdm(
        desc=name,
        total=total,
        initial=done,
        position=0 if drawn.isdecimal() else rank,  # the launcher places it
        ncols=int(drawn) - 1 if drawn.isdecimal() else None,
        unit="B" if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        leave=False,
        file=sys.stderr,
    ) as bar:
        mutex = Lock()

        def advance(amount: int) -> None:
            with mutex:
                bar.update(min(amount, total - bar.n))

        yield advance
