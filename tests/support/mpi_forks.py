"""Ranks of mpirun that are forked (`forked.py`), and what mpirun starts in their place.

That is this file as a script: it says with which variables mpirun starts a rank, waits
until the rank that was forked with them has ended, and ends in the same way.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.forked import ForkedProcess


def stand_in_command(directory: Path) -> list[str]:
    """What mpirun has to start: in a few milliseconds, since it imports nothing."""
    return [sys.executable, "-I", "-S", __file__, str(directory)]


class MPIForks:
    """The forked ranks of one mpirun."""

    def __init__(
        self, directory: Path, fork: Callable[[Mapping[str, str]], ForkedProcess]
    ) -> None:
        """Args:
        directory: as given to `stand_in_command`.
        fork: starts a rank that has these variables.
        """
        self._directory, self._fork = directory, fork
        self._running: dict[str, ForkedProcess] = {}

    def advance(self) -> Sequence[ForkedProcess]:
        """Fork what mpirun has started since, and tell it what has ended.

        Returns:
            The ranks that were forked now.
        """
        new = []
        for path in self._directory.glob("given.*"):
            rank = path.suffix[1:]
            self._running[rank] = self._fork(json.loads(path.read_text()))
            new.append(self._running[rank])
            path.unlink()
        for rank, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[rank]
                # mpirun may have stopped who waits for it.
                with suppress(OSError):
                    flags = os.O_WRONLY | os.O_NONBLOCK
                    pipe = os.open(self._directory / f"ended.{rank}", flags)
                    os.write(pipe, b"%d" % code)
                    os.close(pipe)
        return new


def _code(ended: str, parent: int) -> int:
    """How the forked rank ended; 1 where mpirun is gone, which nobody tells."""
    pipe = os.open(ended, os.O_RDONLY | os.O_NONBLOCK)
    while True:
        # Nothing: nobody writes yet; an error: who does has not written.
        with suppress(BlockingIOError):
            if data := os.read(pipe, 16):
                return int(data)
        if os.getppid() != parent:
            return 1
        time.sleep(0.005)


def _stand_in(directory: str) -> None:
    rank = os.environ["OMPI_COMM_WORLD_RANK"]
    ended = f"{directory}/ended.{rank}"
    os.mkfifo(ended)
    with open(f"{directory}/part.{rank}", "w") as file:
        json.dump(dict(os.environ), file)
    os.rename(file.name, f"{directory}/given.{rank}")
    code = _code(ended, os.getppid())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    _stand_in(sys.argv[1])
