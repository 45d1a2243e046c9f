"""Run code on N real ranks: one subprocess a rank, every exit code looked at.

`run_ranks` calls a function of a test module on every rank, `run_commands` starts
a command line on every rank. Neither goes through `mlx.launch`, which returns 0
even when every rank fails.

In a test, ranks and commands are forked (`tests/support/forked.py`), and ranks of
`run_ranks` check all shapes. Those that start from nothing cost more: there rank 0
checks the shapes of the rooms in `CHECKED`.

pytest is not needed here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from tests.support.forked import ForkedProcess, can_fork, prepare_forks
from tests.support.launchers import (
    mpirun_command,
    rank_environment,
    ring_variables,
)
from tests.support.link import Link
from tests.support.mpi_forks import MPIForks, stand_in_command
from tests.support.processes import Process, stop
from tests.support.waiting import LONG, until

__all__ = [
    "RankOutcome",
    "Process",
    "RanksError",
    "StartedCommands",
    "run_commands",
    "run_ranks",
    "start_commands",
]

# A rank that failed leaves its peers waiting for it; they get this long to end on
# their own (a peer that notices says more than a stack does) before being stopped.
GRACE_SECONDS = 1.5
# The rooms whose arrays travel between ranks: their shapes are checked over MPI too.
CHECKED = [f"mlx_ep.{room}" for room in ("types", "rows", "experts", "exchange", "moe")]


class RanksError(RuntimeError):
    """A rank raised, ended with an error, or did not end in time."""


@dataclass(frozen=True)
class RankOutcome:
    """How the process of one rank ended, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


@dataclass
class StartedCommands:
    """Running ranks; `processes[rank]` is the process of a rank."""

    processes: list[Process]
    directory: Path

    def wait(self, timeout: float = LONG) -> list[RankOutcome]:
        """Wait for every rank to end; a rank that failed does not stop the others.

        Raises:
            RanksError: not all ended within `timeout` seconds; the ranks are
                stopped and the message holds their stacks.
        """
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                hung = [r for r, p in enumerate(self.processes) if p.poll() is None]
                stop([process.pid for process in self.processes], self.processes)
                raise RanksError(
                    f"ranks {hung} did not end within {timeout} s\n"
                    + "\n".join(
                        _section(rank, self.outcome(rank).stderr)
                        for rank in range(len(self.processes))
                    )
                )
            time.sleep(0.01)
        for rank in range(len(self.processes)):
            until(partial(self._is_silent, rank), lambda: "a watch does not end")
        return [self.outcome(rank) for rank in range(len(self.processes))]

    def _is_silent(self, rank: int) -> bool:
        """Whether nobody can print for a rank: its watch does after its end, too."""
        with (self.directory / f"stderr.{rank}").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def outcome(self, rank: int) -> RankOutcome:
        """What a rank printed so far, and its exit code (None while it runs)."""
        return RankOutcome(
            self.processes[rank].poll(),
            _read(self.directory / f"stdout.{rank}"),
            _read(self.directory / f"stderr.{rank}"),
        )


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    transport: str = "ring",
    timeout: float = LONG,
    env: Mapping[str, str] | None = None,
    checks_shapes: bool = True,
    link: Link | None = None,
) -> list[Any]:
    """Call `function(group, *args)` on `num_ranks` ranks.

    Args:
        num_ranks: how many processes; one rank is a process too.
        function: a top-level function of a test module. It, its arguments and its
            results travel pickled, so results are Python or NumPy objects.
        transport: "ring" or "mpi"; one rank uses neither, its group is a singleton.
        timeout: seconds for everything, from the start of the processes.
        env: environment variables added for the ranks.
        checks_shapes: whether shapes are checked in a test; not where something is
            timed. Ranks without these checks start an interpreter each.
        link: what all goes through, where it is not to be this machine's memory.

    Returns:
        The results, in rank order.

    Raises:
        RanksError: a rank raised or hung. The message holds the end of every
            rank's output: tracebacks, and the stacks of ranks that had to be stopped.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    for attempt in range(2):
        with tempfile.TemporaryDirectory(prefix="ranks-") as name:
            directory = Path(name)
            call = pickle.dumps((function, args))
            (directory / "job").write_bytes(
                pickle.dumps((sys.path, transport, num_ranks, call))
            )
            problem = _run_job(
                num_ranks, transport, timeout, env, directory, checks_shapes, link
            )
            if problem is None:
                return [_result(directory, rank) for rank in range(num_ranks)]
            outputs = [_read(directory / f"output.{r}") for r in range(num_ranks)]
            launcher = _read(directory / "launcher")
            if attempt == 0 and _is_of_the_host(outputs, launcher):
                continue
            raise RanksError(
                "\n".join(
                    [f"{num_ranks} ranks over {transport}: {problem}"]
                    + [_section(rank, output) for rank, output in enumerate(outputs)]
                    + ([f"--- launcher ---\n{launcher[-3000:]}"] if launcher else [])
                )
            )
    raise AssertionError("unreachable")


def run_commands(
    num_ranks: int,
    argv: Sequence[str],
    transport: str = "ring",
    timeout: float = LONG,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    forks: bool = True,
) -> list[RankOutcome]:
    """Run the command line `argv` on every rank and return how each one ended.

    Args:
        argv: the command; start it with `sys.executable` for a Python module.
        stdin: text that every rank reads, as `mlx.launch` hands it to all.
        forks: False: every rank starts an interpreter, as a user's does.

    Raises:
        RanksError: not all ranks ended within `timeout` seconds.
    """
    with start_commands(num_ranks, argv, transport, env, stdin, forks) as started:
        return started.wait(timeout)


@contextlib.contextmanager
def start_commands(
    num_ranks: int,
    argv: Sequence[str],
    transport: str = "ring",
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    forks: bool = True,
) -> Iterator[StartedCommands]:
    """Start `argv` on every rank; ranks still running at the end are killed."""
    if transport != "ring":
        # mpirun owns its ranks: there would be no Popen object for each of them.
        raise ValueError(f'transport must be "ring" for commands, got {transport!r}')
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        directory = Path(name)
        started = StartedCommands([], directory)
        (directory / "stdin").write_text(stdin or "")
        try:
            for rank, variables in enumerate(ring_variables(num_ranks, directory)):
                environment = rank_environment(env) | variables
                with _files_of(rank, directory) as files:
                    started.processes.append(
                        ForkedProcess(argv, environment, files)
                        if forks and can_fork(argv, environment)
                        else subprocess.Popen(
                            list(argv),
                            env=environment,
                            stdin=files[0],
                            stdout=files[1],
                            stderr=files[2],
                        )
                    )
            yield started
        finally:
            stop([], started.processes)


@contextlib.contextmanager
def _files_of(rank: int, directory: Path) -> Iterator[list[IO[bytes]]]:
    with (
        (directory / "stdin").open("rb") as stdin,
        (directory / f"stdout.{rank}").open("wb") as stdout,
        (directory / f"stderr.{rank}").open("wb") as stderr,
    ):
        # Until the last process that has this very file open closes it.
        fcntl.flock(stderr, fcntl.LOCK_EX)
        yield [stdin, stdout, stderr]


def _run_job(
    num_ranks: int,
    transport: str,
    timeout: float,
    env: Mapping[str, str] | None,
    directory: Path,
    checks_shapes: bool,
    link: Link | None,
) -> str | None:
    """Start the ranks and wait; returns what went wrong, or None."""
    command = [sys.executable, str(Path(__file__).resolve()), str(directory)]
    environment = rank_environment(env)
    if not checks_shapes:
        environment.pop("PYTEST_CURRENT_TEST", None)
    is_forked = checks_shapes and can_fork(command, environment)
    if is_forked:
        prepare_forks(checks_shapes=True)
    deadline = time.monotonic() + timeout
    with (
        (directory / "launcher").open("wb") as log,
        Path(os.devnull).open("rb") as nothing,
    ):

        def fork(variables: Mapping[str, str]) -> ForkedProcess:
            return ForkedProcess(command, variables, (nothing, log, log), True)

        forks = MPIForks(directory, fork)
        # mlx 0.32.4 under mpirun -n 1 calls MPI_Init and never MPI_Finalize, which
        # mpirun reports as a failure: one rank needs no launcher anyway.
        processes: list[Process]
        if transport == "ring" or (transport == "mpi" and num_ranks == 1):
            ring = ring_variables(num_ranks, directory)
            if link is not None and num_ranks > 1:
                ring = link.between(ring, directory)
            environments = [environment | variables for variables in ring]
            if is_forked:
                processes = [fork(variables) for variables in environments]
            else:
                processes = [
                    subprocess.Popen(
                        command,
                        env=variables,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                    for variables in environments
                ]
        elif transport == "mpi":
            argv, variables = mpirun_command(num_ranks)
            if link is not None:
                variables = link.over_mpi(variables, directory)
            started = stand_in_command(directory) if is_forked else command
            processes = [
                subprocess.Popen(
                    argv + started,
                    env=environment | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            ]
        else:
            raise ValueError(f'transport must be "ring" or "mpi", got {transport!r}')
        problem = None
        try:
            while any(process.poll() is None for process in processes):
                processes += forks.advance()
                failed = any(process.poll() for process in processes) or any(
                    (directory / f"failed.{rank}").exists() for rank in range(num_ranks)
                )
                if failed and problem is None:
                    problem = "a rank failed"
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                if time.monotonic() > deadline:
                    problem = problem or f"not done after {timeout} s"
                    break
                time.sleep(0.01)
        finally:
            pids = [int(_read(path)) for path in directory.glob("pid.*")]
            stop(pids, processes)
        if problem is None and any(process.returncode for process in processes):
            problem = f"exit codes {[process.returncode for process in processes]}"
    return problem


def _is_of_the_host(outputs: Sequence[str], launcher: str) -> bool:
    """Whether a free port was taken meanwhile, or Open MPI's launcher gave up early."""
    is_taken = any("bind socket" in output for output in outputs)
    return is_taken or "PMIx server's listener thread failed to start" in launcher


def _result(directory: Path, rank: int) -> Any:
    path = directory / f"result.{rank}"
    if not path.exists():
        output = _read(directory / f"output.{rank}")
        raise RanksError(f"rank {rank} ended without a result\n{output[-3000:]}")
    return pickle.loads(path.read_bytes())


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _section(rank: int, output: str) -> str:
    return f"--- rank {rank} ---\n{output[-6000:].rstrip() or '(printed nothing)'}"


def _rank_main(directory: Path) -> None:
    """What the process of one rank does for `run_ranks`."""
    rank = int(os.environ.get("MLX_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
    # Files of our own: mpirun would mix the output of the ranks.
    output = os.open(directory / f"output.{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    (directory / f"pid.{rank}").write_text(str(os.getpid()))
    try:
        path, transport, num_ranks, call = pickle.loads(
            (directory / "job").read_bytes()
        )
        sys.path[:] = path
        import mlx.core as mx

        is_forked = "mlx_ep.api" in sys.modules
        if rank == 0 and os.environ.get("PYTEST_CURRENT_TEST") and not is_forked:
            from tests.support import shape_checks

            # On one rank, and not for all rooms, which takes 3 seconds more.
            shape_checks.install(CHECKED)
        # Before the test module is imported: what it imports may initialise too,
        # and the first call decides the transport.
        backend = transport if num_ranks > 1 else "ring"
        group = mx.distributed.init(strict=num_ranks > 1, backend=backend)
        function, args = pickle.loads(call)
        result = pickle.dumps(function(group, *args))
        partial = directory / f"partial.{rank}"
        partial.write_bytes(result)
        partial.rename(directory / f"result.{rank}")
    except BaseException:
        traceback.print_exc()
        (directory / f"failed.{rank}").touch()
        sys.stderr.flush()
        # Not sys.exit: at exit, mlx could wait for a collective that never ends.
        os._exit(1)


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
