"""Python processes forked from one that has imported MLX, mlx-lm and this package.

Importing them takes 1.3 seconds of a core for every process, and 4 more where shapes
are checked; a fork takes none of it. What a fork cannot show is a start from nothing:
imports in another order, and sets that each process orders in its own way. Tests of
that start an interpreter (`run_commands(..., forks=False)`, `mlx.launch`, `mpirun`).
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO

from tests.support.fork_server import FOLDER, HEADER, READY
from tests.support.launchers import rank_environment

# Read where they are used, not when a module is imported: they may differ by process.
_READ_LATER = {
    "MLX_EP_BACKEND",
    "MLX_HOSTFILE",
    "MLX_RANK",
    "PYTEST_CURRENT_TEST",
    "XDG_CACHE_HOME",
}
# With which everything is imported. mlx-lm sets one when it is imported, before this
# module or after it.
import_module("mlx_lm")
_VARIABLES = rank_environment(None)


class ForkedProcess:
    """A forked process, with what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        files: Sequence[IO[bytes]],
        checks_shapes: bool = False,
    ) -> None:
        """Start it.

        Args:
            argv: a command line that `can_fork` allows.
            environment: likewise.
            files: its stdin, stdout and stderr.
            checks_shapes: whether shapes are checked in this package.
        """
        self.args = argv
        self.returncode: int | None = None
        request = {
            "argv": list(argv[1:]),
            "environment": dict(environment),
            "directory": os.getcwd(),
        }
        data = json.dumps(request).encode()
        self._status, theirs = os.pipe()
        server = _server("checked" if checks_shapes else "plain")
        numbers = [file.fileno() for file in files]
        socket.send_fds(server, [HEADER.pack(len(data))], [*numbers, theirs])
        server.sendall(data)
        os.close(theirs)
        self._text = b""
        pid = self._line(None)
        assert pid is not None  # without a timeout
        self.pid = pid

    def _line(self, timeout: float | None) -> int | None:
        """The next number that the server says of this process."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._text:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([self._status], [], [], left)[0]:
                return None
            data = os.read(self._status, 64)
            if not data:
                raise RuntimeError("the process from which others are forked is gone")
            self._text += data
        line, _, self._text = self._text.partition(b"\n")
        return int(line)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it did not within `timeout` seconds.
        """
        code = self._ended(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(list(self.args), timeout)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self._line(timeout)
            if self.returncode is not None:
                os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def prepare_forks(checks_shapes: bool = False) -> None:
    """Wait until a process can be forked: the first time, while everything is imported.

    A time limit of what is forked should begin behind it.
    """
    _server("checked" if checks_shapes else "plain")


def can_fork(argv: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a command line with these variables can run in a fork.

    Only in a test: what is timed elsewhere is a process of its own.
    """
    return (
        "PYTEST_CURRENT_TEST" in os.environ
        and argv[0] == sys.executable
        and (argv[1] in ("-m", "-c") or argv[1].endswith(".py"))
        and not other_variables(environment)
    )


def other_variables(environment: Mapping[str, str]) -> set[str]:
    """Those that are not as they were when everything was imported."""
    names = (environment.keys() | _VARIABLES.keys()) - _READ_LATER
    return {name for name in names if environment.get(name) != _VARIABLES.get(name)}


@cache
def _server(kind: str) -> socket.socket:
    """A connection to the server that has imported everything; the first starts it."""
    path = Path(os.environ[FOLDER]) / kind
    client = socket.socket(socket.AF_UNIX)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                _start(kind, listener)
            client.connect(str(path))
    atexit.register(client.close)
    assert client.recv(1) == READY, "it could not import everything"
    return client


def _start(kind: str, listener: socket.socket) -> None:
    """It may outlive this process, which therefore keeps nothing of it."""
    script = Path(__file__).with_name("fork_server.py")
    listener.set_inheritable(True)
    os.posix_spawn(
        sys.executable,
        [sys.executable, str(script), kind, str(listener.fileno())],
        _VARIABLES,
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
    )
