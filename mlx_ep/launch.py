"""Start a command on every rank: ``mlx_ep.launch``.

As mlx.launch, with an exit code that one can trust: that of the rank that failed first.
Rank 0 on this machine has the terminal to itself (a chat can be typed, a bar drawn);
what the other ranks print is marked with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from mlx_ep import cli
from mlx_ep.cli.hosts import BACKENDS, Host, list_hosts, read_hostfile

SECRET = "MLX_EP_SECRET"
_FIRST_PORT = 32323  # mlx.launch's
_GRACE = 15.0  # seconds that ranks have to end by themselves when one has failed
_KILL_GRACE = 5.0  # and after they were told to


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.launch",
        usage="mlx_ep.launch [options] -- COMMAND ...",
        description="Start a command on every rank, such as mlx_ep.launch -n 2 -- "
        "mlx_ep.generate. The exit code is that of the rank that failed first.",
    )
    parser.add_argument(
        "-n",
        type=cli.positive,
        metavar="N",
        help="Ranks on each of --hosts (default: 1).",
    )
    parser.add_argument(
        "--hosts",
        help="Names or addresses between commas; others than 127.0.0.1 by ssh "
        "(default: 127.0.0.1).",
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="A hostfile of mlx.launch: hosts, backend and variables.",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="How ranks communicate (default: the hostfile's, else ring).",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="A variable for every rank; may be given again.",
    )
    parser.add_argument(
        "--mpi-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="An argument of mpirun, as --mpi-arg=--oversubscribe; may be given again.",
    )
    parser.add_argument(
        "--starting-port",
        "-p",
        type=cli.positive,
        metavar="PORT",
        help="The first port of the ring, one more for each rank (default: free ports "
        f"on one host, {_FIRST_PORT} on several).",
    )
    parser.add_argument(
        "--cwd", help="The working folder on every host (default: this one, if there)."
    )
    parser.add_argument(
        "--python",
        help="The Python of the other hosts, for -m MODULE, FILE.py and mlx_ep.* "
        "(default: the command as it stands).",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.finishers.append(_check)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Make the hosts of the flags; ``args.hosts`` is a `Hosts` from here on.

    Raises:
        ValueError: the flags do not go together.
    """
    if args.command[:1] == ["--"]:
        args.command = args.command[1:]
    if not args.command:
        raise ValueError("There must be a command: mlx_ep.launch -n 2 -- COMMAND ...")
    if args.command[0].startswith("-") and args.command[0] != "-m":
        raise ValueError(
            f"The command must stand behind --; got {args.command[0]}, which is no "
            "option of mlx_ep.launch."
        )
    if args.hostfile is not None and (args.hosts is not None or args.n is not None):
        raise ValueError(
            "--hostfile says on which hosts the ranks run: leave -n and --hosts out."
        )
    for entry in args.env:
        if "=" not in entry or not entry.partition("=")[0].isidentifier():
            raise ValueError(f"--env must be NAME=VALUE; got {entry!r}.")
    if args.hostfile is not None:
        args.hosts = read_hostfile(args.hostfile)
    else:
        args.hosts = list_hosts(args.hosts or "127.0.0.1", args.n or 1)
    args.backend = args.backend or args.hosts.backend or "ring"
    if args.mpi_arg and args.backend != "mpi":
        raise ValueError(f"--mpi-arg is of --backend mpi; got {args.backend}.")
    if args.backend == "mpi" and _find_mpirun() is None:
        raise ValueError(
            "--backend mpi needs mpirun on the PATH (pip install 'mlx-ep[mpi]')."
        )


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.backend == "mpi":
        sys.exit(_run_mpi(args))
    try:
        run = _Run(args, *_transport(args))
        run.start()
    except ValueError as error:
        parser.error(str(error))
    sys.exit(run.wait())


def _transport(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Files (by the variable that names each) and variables that MLX connects by.

    Raises:
        ValueError: the hosts do not have what the backend needs.
    """
    ranks: Sequence[Host] = args.hosts.ranks
    if args.backend == "ring":
        if len(ranks) == 1:
            return {}, {}
        for rank, host in enumerate(ranks):
            if not host.ips and not host.is_here:
                raise ValueError(
                    f"The ring needs the address of every rank; rank {rank} is "
                    f'{host.ssh}. Give addresses, or "ips" in a hostfile.'
                )
        ports = _ports(args)
        addresses = [
            [f"{ip}:{port}" for ip in host.ips or ("127.0.0.1",)]
            for host, port in zip(ranks, ports, strict=True)
        ]
        return {"MLX_HOSTFILE": json.dumps(addresses)}, {}
    for rank, host in enumerate(ranks):
        others = [device for i, device in enumerate(host.rdma) if i != rank]
        if len(host.rdma) != len(ranks) or host.rdma[rank] is not None:
            raise ValueError(
                f'{args.backend} needs for every rank a list "rdma" with its device to '
                f"each of the {len(ranks)} ranks, null to itself; rank {rank} has "
                f"{list(host.rdma)}."
            )
        if args.backend == "jaccl" and None in others:
            raise ValueError(
                f"jaccl needs a device to every other rank; rank {rank} has "
                f"{list(host.rdma)}. For Macs in a circle the backend is jaccl-ring."
            )
    if not ranks[0].ips:
        raise ValueError(
            f'{args.backend} needs an address of rank 0: "ips" of {ranks[0].ssh}.'
        )
    port = args.starting_port or _FIRST_PORT
    variables = {"MLX_JACCL_COORDINATOR": f"{ranks[0].ips[0]}:{port}"}
    if args.backend == "jaccl-ring":
        variables["MLX_JACCL_RING"] = "1"
    return {"MLX_IBV_DEVICES": json.dumps([h.rdma for h in ranks])}, variables


def _ports(args: argparse.Namespace) -> list[int]:
    """One for each rank: free ones where all ranks are here."""
    count = len(args.hosts.ranks)
    if args.starting_port or not all(host.is_here for host in args.hosts.ranks):
        first = args.starting_port or _FIRST_PORT
        return list(range(first, first + count))
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _find_mpirun() -> str | None:
    """The mpirun of this Python's environment, activated or not, else on the PATH."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    return str(own) if own.exists() else shutil.which("mpirun")


def _mpi_library(mpirun: str) -> dict[str, str]:
    """Variables by which MLX finds the libmpi beside an mpirun."""
    folder = Path(mpirun).resolve().parent.parent / "lib"
    for pattern in ("libmpi.so.[0-9]*", "libmpi.[0-9]*.dylib", "libmpi.dylib"):
        if found := sorted(folder.glob(pattern)):
            name = (
                "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
            )
            paths = [str(folder), os.environ.get(name, "")]
            path = os.pathsep.join(each for each in paths if each)
            return {"MLX_MPI_LIBNAME": found[0].name, name: path}
    return {}


def _run_mpi(args: argparse.Namespace) -> int:
    """The exit code of mpirun, which is that of the first rank that fails."""
    mpirun = _find_mpirun()
    assert mpirun is not None
    library = _mpi_library(mpirun)
    os.environ.update(library)
    os.environ.setdefault(SECRET, secrets.token_hex(16))
    given = [entry.partition("=")[0] for entry in _entries(args)]
    names = [SECRET, *library, *given]
    for entry in _entries(args):
        name, _, value = entry.partition("=")
        os.environ[name] = value
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as file:
        hosts = [host.ssh for host in args.hosts.ranks]
        for name in dict.fromkeys(hosts):
            print(f"{name} slots={hosts.count(name)}", file=file)
        file.flush()
        command = [
            mpirun, "-n", str(len(hosts)), "--hostfile", file.name,
            *(["-wdir", args.cwd] if args.cwd else []),
            *(word for name in names for word in ("-x", name)),
            *(word for arg in args.mpi_arg for word in shlex.split(arg)),
            *_command(args, all(host.is_here for host in args.hosts.ranks)),
        ]  # fmt: skip
        with subprocess.Popen(command) as process:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda n, _: process.send_signal(n))
            return _exit_code(process.wait())


def _entries(args: argparse.Namespace) -> list[str]:
    """Variables of the hostfile and of --env, which goes first."""
    return [*args.hosts.env, *args.env]


def _command(args: argparse.Namespace, is_here: bool) -> list[str]:
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


@dataclass
class _Rank:
    """A rank that was started.

    Attributes:
        code: its exit code, when it has ended.
    """

    number: int
    process: subprocess.Popen[bytes]
    code: int | None = None
    threads: list[threading.Thread] = field(default_factory=list)


class _Run:
    """All ranks of a run, from start to exit code."""

    def __init__(
        self,
        args: argparse.Namespace,
        files: dict[str, str],
        variables: dict[str, str],
    ) -> None:
        self._args, self._files = args, files
        # As the ranks read it; on other hosts it is not on a command line.
        self._secret = os.environ.get(SECRET) or secrets.token_hex(16)
        entries = dict(entry.split("=", 1) for entry in _entries(args))
        self._variables = {**variables, **entries}
        self._folder = tempfile.TemporaryDirectory(prefix="mlx_ep-launch-")
        self._lock = threading.Lock()
        self._told_to_end = 0  # the signal
        self._ranks: list[_Rank] = []

    def start(self) -> None:
        """Start every rank.

        Raises:
            ValueError: there is no such command here; no rank is left running.
        """
        for number, host in enumerate(self._args.hosts.ranks):
            try:
                self._ranks.append(self._start(number, host))
            except OSError as error:
                self._signal(signal.SIGKILL)
                for rank in self._ranks:
                    rank.process.wait()
                self._folder.cleanup()
                raise ValueError(
                    f"The command must be a program here; {self._args.command[0]} "
                    f"cannot be started: {error}."
                ) from None

    def wait(self) -> int:
        """Until every rank has ended; 0, or the code of the first that failed."""
        # Rank 0 here gets Ctrl-C from the terminal itself, and may stay.
        signal.signal(signal.SIGINT, self._interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._end)
        code = 0
        deadline, is_last = float("inf"), False
        while any(rank.code is None for rank in self._ranks):
            for rank in self._ranks:
                if rank.code is None and rank.process.poll() is not None:
                    rank.code = _exit_code(rank.process.returncode)
                    if rank.code and not code:
                        code = rank.code
                        deadline = time.monotonic() + _GRACE
                        self._report(rank)
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL if is_last else signal.SIGTERM)
                deadline, is_last = time.monotonic() + _KILL_GRACE, True
            if self._told_to_end and deadline == float("inf"):
                deadline, is_last = time.monotonic() + _GRACE, True
            time.sleep(0.02)
        for rank in self._ranks:
            for thread in rank.threads:
                thread.join()
        self._folder.cleanup()
        return code or (128 + self._told_to_end if self._told_to_end else 0)

    def _start(self, number: int, host: Host) -> _Rank:
        is_first_here = number == 0 and host.is_here
        pipe = None if is_first_here else subprocess.PIPE
        if host.is_here:
            process = subprocess.Popen(
                _command(self._args, True),
                env=os.environ | self._environment(number),
                cwd=self._args.cwd,
                stdin=None if is_first_here else subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe,
                # Ctrl-C is for rank 0, which tells the others if it ends.
                start_new_session=not is_first_here,
            )
        else:
            process = subprocess.Popen(
                ["ssh", "-tt", "-o", "LogLevel=QUIET", host.ssh, self._script(number)],
                stdin=subprocess.PIPE,
                stdout=pipe,
                stderr=pipe,
                start_new_session=True,
            )
            assert process.stdin is not None
            process.stdin.write(f"{self._secret}\n".encode())
            process.stdin.flush()
        rank = _Rank(number, process)
        if not is_first_here:
            assert process.stdout is not None and process.stderr is not None
            self._start_copy(rank, process.stdout, sys.stdout.buffer)
            self._start_copy(rank, process.stderr, sys.stderr.buffer)
        if number == 0 and not host.is_here:
            threading.Thread(target=_feed, args=(process.stdin,), daemon=True).start()
        return rank

    def _start_copy(self, rank: _Rank, source: IO[bytes], sink: IO[bytes]) -> None:
        thread = threading.Thread(
            target=self._copy, args=(rank.number, source, sink), daemon=True
        )
        thread.start()
        rank.threads.append(thread)

    def _environment(self, number: int) -> dict[str, str]:
        """Of a rank here."""
        found = {**self._variables, SECRET: self._secret}
        if self._files:
            found["MLX_RANK"] = str(number)
        for name, content in self._files.items():
            path = Path(self._folder.name) / name
            path.write_text(content)
            found[name] = str(path)
        return found

    def _script(self, number: int) -> str:
        """What the shell of another host runs for a rank."""
        folder = shlex.quote(self._args.cwd or os.getcwd())
        change = f"if [ -d {folder} ]; then cd {folder}; fi"
        lines = [
            "stty -echo",
            f"IFS= read -r {SECRET}",
            f"export {SECRET}",
            f"cd {folder} || exit 1" if self._args.cwd else change,
        ]
        lines += [f"export {k}={shlex.quote(v)}" for k, v in self._variables.items()]
        for name, content in self._files.items():
            lines += [
                f"export {name}=$(mktemp)",
                f'printf %s {shlex.quote(content)} > "${name}"',
                f"export MLX_RANK={number}",
            ]
        lines.append(f"exec {shlex.join(_command(self._args, False))}")
        return f"exec /bin/bash -c {shlex.quote('; '.join(lines))}"

    def _copy(self, number: int, source: IO[bytes], sink: IO[bytes]) -> None:
        """A rank's output, line by line, with its number before each line."""
        mark = f"[rank {number}] ".encode() if number else b""
        for line in source:
            text = line.replace(b"\r\n", b"\n")
            # Of a bar that was drawn over itself the last state is what counts.
            text = text.rstrip(b"\n").rpartition(b"\r")[2].rstrip()
            if not text and b"\r" in line.rstrip(b"\r\n"):
                continue
            with self._lock:
                sink.write(mark + text + b"\n")
                sink.flush()

    def _report(self, rank: _Rank) -> None:
        if len(self._ranks) > 1 and rank.code != 2:  # wrong usage rank 0 says itself
            host = self._args.hosts.ranks[rank.number].ssh
            said = f"rank {rank.number} ({host}) ended with code {rank.code}"
            print(f"mlx_ep.launch: {said}", file=sys.stderr, flush=True)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C: rank 0 decides; where it has no terminal it is told."""
        first = self._ranks[0]
        if not self._args.hosts.ranks[0].is_here or not sys.stdin.isatty():
            first.process.send_signal(signal.SIGINT)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._told_to_end = number
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)


def _feed(sink: IO[bytes] | None) -> None:
    """Our standard input to a rank 0 on another host."""
    assert sink is not None
    for line in sys.stdin.buffer:
        sink.write(line)
        sink.flush()
    sink.write(b"\x04")  # the end of the input, for the terminal there
    sink.flush()


def _exit_code(returncode: int) -> int:
    """As a shell gives it: 128 and the signal that ended a process."""
    return returncode if returncode >= 0 else 128 - returncode


if __name__ == "__main__":
    main()
