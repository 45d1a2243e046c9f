"""Ranks forked from one process that has imported MLX, mlx-lm and this package.

Importing them takes 2 seconds of a core for every rank, and 4 more where shapes are
checked; a fork takes none of it. That process has no threads and no group, so that a
rank has nothing but modules from it. Ranks of commands are never forked: they show what
a user starts.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from tests.support.launchers import rank_environment

_CONTEXT = multiprocessing.get_context("forkserver")
# Read where they are used, not when a module is imported: they may differ by rank.
_READ_LATER = {
    "MLX_EP_BACKEND",
    "MLX_HOSTFILE",
    "MLX_RANK",
    "PYTEST_CURRENT_TEST",
    "XDG_CACHE_HOME",
}
_VARIABLES = rank_environment(None)  # with which everything is imported


class ForkedRank:
    """A rank, with as much of subprocess.Popen as `tests.support.ranks` uses."""

    def __init__(
        self,
        main: Callable[[Path], None],
        directory: Path,
        environment: Mapping[str, str],
    ) -> None:
        arguments = (main, directory, dict(environment), os.getcwd())
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def can_fork(environment: Mapping[str, str]) -> bool:
    """Whether ranks with these variables can be forked; has all imported if they can.

    Only in a test: a benchmark must not run with checks of shapes.
    """
    names = (environment.keys() | _VARIABLES.keys()) - _READ_LATER
    if "PYTEST_CURRENT_TEST" not in os.environ or any(
        environment.get(name) != _VARIABLES.get(name) for name in names
    ):
        return False
    _import_once()
    return True


@cache
def _import_once() -> None:
    _CONTEXT.set_forkserver_preload(["tests.support.preloaded"])
    with mock.patch.dict(os.environ, _VARIABLES, clear=True):
        forkserver.ensure_running()
    first = _CONTEXT.Process(target=int)  # it runs when all has been imported
    first.start()
    first.join()


def _run(
    main: Callable[[Path], None], directory: Path, environment: dict[str, str], cwd: str
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    main(directory)
