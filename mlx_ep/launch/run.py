"""Ranks that this process starts, here or by ssh, until all have ended."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from mlx_ep.cli.hosts import Host
from mlx_ep.launch.bars import BARS, bar_of, drawn
from mlx_ep.launch.words import SECRET, command, entries, exit_code

_GRACE = 15.0  # seconds that ranks have to end by themselves when one has failed
_KILL_GRACE = 5.0  # and after they were told to


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


class StartedRanks:
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
        given = dict(entry.split("=", 1) for entry in entries(args))
        self._variables = {**variables, **given}
        # Of the terminal in which bars of ranks are drawn; 0: there is none.
        has_terminal = sys.stderr.isatty() and sys.stdout.isatty()
        self._columns = shutil.get_terminal_size().columns if has_terminal else 0
        if self._columns:
            self._variables.setdefault(BARS, str(self._columns))
        self._folder = tempfile.TemporaryDirectory(prefix="mlx_ep-launch-")
        self._lock = threading.Lock()
        self._told_to_end = 0  # the signal
        self._ranks: list[_Rank] = []

    def start(self) -> None:
        """Start every rank.

        Raises:
            ValueError: there is no such command here; no rank is left running.
        """
        # Before the first rank: a launcher that ends without them would leave them.
        # Rank 0 here gets Ctrl-C from the terminal itself, and may stay.
        before = {signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt)}
        for wanted in (signal.SIGTERM, signal.SIGHUP):
            before[wanted] = signal.signal(wanted, self._end)
        for number, host in enumerate(self._args.hosts.ranks):
            if self._told_to_end:
                break
            try:
                self._ranks.append(self._start(number, host))
            except OSError as error:
                self._signal(signal.SIGKILL)
                for rank in self._ranks:
                    rank.process.wait()
                self._folder.cleanup()
                for wanted, handler in before.items():
                    signal.signal(wanted, handler)
                raise ValueError(
                    f"The command must be a program here; {self._args.command[0]} "
                    f"cannot be started: {error}."
                ) from None
        if self._told_to_end:  # the rank that was just being started, too
            self._signal(signal.SIGTERM)

    def wait(self) -> int:
        """Until every rank has ended; 0, or the code of the first that failed."""
        code = 0
        deadline, is_last = float("inf"), False
        while any(rank.code is None for rank in self._ranks):
            for rank in self._ranks:
                if rank.code is None and rank.process.poll() is not None:
                    rank.code = exit_code(rank.process.returncode)
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
                command(self._args, True),
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
            if not path.exists():  # once: a rank that runs already may be reading it
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
        lines.append(f"exec {shlex.join(command(self._args, False))}")
        return f"exec /bin/bash -c {shlex.quote('; '.join(lines))}"

    def _copy(self, number: int, source: IO[bytes], sink: IO[bytes]) -> None:
        """A rank's output, line by line, with its number before each line."""
        rest = b""
        while piece := os.read(source.fileno(), 1 << 16):
            *lines, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n")
            for line in lines:
                self._write(number, line, sink)
            bar, rest = bar_of(rest)
            if bar is not None and self._columns:
                with self._lock:
                    sys.stderr.buffer.write(drawn(bar, number, self._columns))
                    sys.stderr.buffer.flush()
        if rest.strip():
            self._write(number, rest, sink)

    def _write(self, number: int, line: bytes, sink: IO[bytes]) -> None:
        # Of a bar that was drawn over itself the last state is what counts.
        text = line.rpartition(b"\r")[2].rstrip()
        if not text and b"\r" in line:
            return
        mark = f"[rank {number}] ".encode() if number else b""
        over = b"\r\x1b[K" if self._columns else b""
        with self._lock:
            sink.write(over + mark + text + b"\n")
            sink.flush()

    def _report(self, rank: _Rank) -> None:
        if len(self._ranks) > 1 and rank.code != 2:  # wrong usage rank 0 says itself
            host = self._args.hosts.ranks[rank.number].ssh
            said = f"rank {rank.number} ({host}) ended with code {rank.code}"
            print(f"mlx_ep.launch: {said}", file=sys.stderr, flush=True)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C: rank 0 decides; where it has no terminal it is told."""
        if len(self._ranks) < len(self._args.hosts.ranks):  # not all have started
            self._end(number, frame)
            return
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
