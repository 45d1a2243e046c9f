"""The rank's side of the control channel: it starts the watch and listens to it."""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

import mlx.core as mx
import psutil

import mlx_ep
from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.control.meeting import Meeting, find_meeting, own_addresses
from mlx_ep.comm.control.progress import LayerStage, ProgressPage
from mlx_ep.comm.environment import check_environment

BEAT = 0.5  # seconds between two signs of life of the interpreter
FLUSH_LIMIT = 0.2  # seconds: nobody may read what is flushed
GOODBYE_LIMIT = 0.2  # seconds for `on_end`, as a rule; the watch kills after 0.5
ENDED_BY_WATCH = 10.0  # seconds for the watch to answer a failure
# mlx.launch sends SIGTERM; a dropped SSH session sends SIGHUP, unless under nohup.
TOLD_TO_END = (signal.SIGTERM, signal.SIGHUP)
DUMP_SIGNAL = signal.SIGUSR2
HANDLED = 0  # as in control/watch.py
INVITATION_SIZE = 1024  # bytes
_WATCH = (
    "import sys; sys.path.append({root!r}); "
    "from mlx_ep.comm.control.process import main; main()"
)


class Liveness:
    """A rank's control channel; `guard` is the usual way to use it.

    Args:
        rank: this rank.
        size: the number of ranks, 2 or more.
        meeting: where the watches of the ranks meet.
        limits: how long things may take.
    """

    current: ClassVar[Liveness | None] = None  # of this process

    def __init__(self, rank: int, size: int, meeting: Meeting, limits: Limits) -> None:
        self.rank, self.size, self.meeting = rank, size, meeting
        self._page = ProgressPage()
        self._page.at("starting")
        self._stacks = tempfile.TemporaryFile(prefix="mlx_ep-")  # noqa: SIM115
        fcntl.fcntl(self._stacks, fcntl.F_SETFL, os.O_APPEND)
        self._link, link = socket.socketpair()
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        files = [
            link.fileno(), wake.fileno(), self._page.file_descriptor,
            self._stacks.fileno(),
        ]  # fmt: skip
        root = str(Path(mlx_ep.__file__).parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WATCH.format(root=root), *map(str, files)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=files,
            start_new_session=True,  # out of reach of Ctrl-C, Ctrl-Z and launchers
        )
        link.close()
        wake.close()
        has_dump = signal.getsignal(DUMP_SIGNAL) == signal.SIG_DFL
        if has_dump:
            faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup_fd = -1
        self.is_failing = False  # signals no longer raise in the main thread
        self._lock = threading.Lock()
        self._joined, self._left = threading.Event(), threading.Event()
        self._ready = threading.Event()
        self._is_listening = threading.Event()
        self._texts: list[str] = []
        self._on_end: Callable[[str], object] | None = None
        self._goodbye_limit = GOODBYE_LIMIT
        self._send(
            rank=rank,
            size=size,
            pid=os.getpid(),
            launcher=_launcher_pid(),
            mpirun="OMPI_COMM_WORLD_SIZE" in os.environ,
            dump_signal=int(DUMP_SIGNAL) if has_dump else 0,
            limits=asdict(limits),
            meeting=meeting.to_json(),
        )
        # A daemon: the interpreter must not wait for it at its end.
        self._thread = threading.Thread(
            target=self._listen, name="mlx_ep liveness", daemon=True
        )
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._catch_signals()
        Liveness.current = self

    @classmethod
    def start(
        cls, group: mx.distributed.Group, limits: Limits | None = None
    ) -> Liveness:
        """Connects all ranks of the group, each of which must call it.

        On another thread than the main one it leaves signals as they are. Close the
        result at the end, or the others take this rank's end for a death.
        """
        rank, size = group.rank(), group.size()
        channel = cls.current
        if channel is None or (channel.rank, channel.size) != (rank, size):
            limits = limits or Limits().changed_by(os.environ)
            meeting = _meeting_of_group(rank, size)
            channel = cls(rank, size, meeting, limits)
            channel._meet_late(group)
        channel._send(kind="guarded")
        channel.wait_joined()
        channel._page.at("running")
        return channel

    def wait_joined(self) -> None:
        """Waits until the watches of all ranks are connected."""
        self._joined.wait()

    def wait_ready(self) -> None:
        """Waits until every rank is about to connect, where they can know it by now.

        MLX holds the interpreter's lock while it connects: a rank that waits here
        instead ends gently, with the exit code of the rank that failed.
        """
        if self.meeting.kind == "late":
            return
        self._page.at("starting", stage="waiting for all ranks")
        self._send(kind="ready")
        self._ready.wait()
        self._page.at("starting", stage="connecting")

    def group_exists(self, group: mx.distributed.Group) -> None:
        """The group is there: an end of this rank is its own business until `start`."""
        self._meet_late(group)
        self._send(kind="group")
        self._page.at("running")

    def fail(self, reason: str, exit_code: int = 1) -> NoReturn:
        """Ends this process and the run on all other ranks.

        Args:
            reason: What went wrong; every rank prints it.
            exit_code: The exit code of every rank, 1 to 255.
        """
        self.announce(f"rank {self.rank} failed: {reason}", exit_code)

    def leave_with_usage_error(self, text: str) -> list[str]:
        """Leaves because of wrong usage; gives what every rank found, in rank order.

        A rank that found nothing ends the run with exit code 2, and the reason.
        """
        self._page.at("leaving")
        self._send(kind="usage", text=text)
        self._left.wait()
        self._close()
        return self._texts

    def close(self) -> None:
        """Leaves normally, once all ranks do."""
        self._page.at("leaving")
        self._send(kind="leave")
        self._left.wait()
        self._close()

    def _close(self) -> None:
        if Liveness.current is self:
            Liveness.current = None
        self._thread.join()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if self._old_handlers:
            signal.set_wakeup_fd(self._old_wakeup_fd)
        faulthandler.unregister(DUMP_SIGNAL)
        self._link.close()
        self._wake.close()
        self._page.close()
        self._stacks.close()
        self._process.wait()

    def note(
        self,
        phase: str | None = None,
        step: int | None = None,
        layer: int | None = None,
        stage: str = "",
    ) -> None:
        """Says where this rank is; see `note_progress`."""
        self._page.at(phase, step, layer, stage)

    def visit(self, layer: int, stage: LayerStage) -> None:
        """Says where in a layer this rank is; see `note_layer`."""
        self._page.visit(layer, stage)

    def mark(self, *numbers: int) -> None:
        """Takes numbers into the fingerprint; see `note_step`."""
        self._page.mark(*numbers)

    def announce(
        self, text: str, exit_code: int, details: str = "", grace: float = 0.0
    ) -> NoReturn:
        """As `fail`, with a text of its own.

        Args:
            details: printed before it, on this rank.
            grace: seconds in which a failure of another rank explains this one better.
        """
        self.is_failing = True
        self._send(
            kind="failed",
            text=text,
            code=exit_code % 256 or 1,
            asks=False,
            details=details,
            grace=grace,
        )
        self._thread.join(ENDED_BY_WATCH)  # it ends the process
        os._exit(exit_code % 256 or 1)

    def say_at_end(
        self, say_goodbye: Callable[[str], object] | None, seconds: float
    ) -> None:
        """See `on_end`; the watch waits for longer where it takes longer."""
        self._on_end, self._goodbye_limit = say_goodbye, seconds
        self._send(kind="goodbye", seconds=max(0.0, seconds - GOODBYE_LIMIT))

    def _send(self, **message: object) -> None:
        with self._lock, suppress(OSError):  # a watch that is gone is found on reading
            self._link.sendall(json.dumps(message).encode() + b"\n")

    def _meet_late(self, group: mx.distributed.Group) -> None:
        """Where nothing could be agreed before: rank 0 says where, by a collective."""
        if self.meeting.kind != "late":
            return
        if self.rank == 0:
            addresses = self.meeting.addresses or own_addresses()
            self.meeting = replace(self.meeting, addresses=addresses)
            self._send(kind="meet", meeting=self.meeting.to_json())
            self._is_listening.wait()
        data = json.dumps(self.meeting.to_json()).encode() if self.rank == 0 else b""
        assert len(data) <= INVITATION_SIZE
        # int32 rather than uint8: an integer that every backend surely sums.
        padded = mx.array([*data, *[0] * (INVITATION_SIZE - len(data))], mx.int32)
        total = mx.distributed.all_sum(padded, group=group)
        # sync: once per run, at its start.
        received = bytes(total.tolist()).rstrip(b"\0")  # type: ignore[arg-type]
        if self.rank != 0:
            self.meeting = Meeting.from_json(json.loads(received))
            self._send(kind="meet", meeting=self.meeting.to_json())

    # Signals --------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        """Makes SIGINT and TOLD_TO_END known to the watch.

        The interpreter's C handler writes the signal's number into the wake-up socket
        even while the main thread is stuck. A program's own handlers stay.
        """
        default = (signal.SIG_DFL, signal.default_int_handler)
        for number in (signal.SIGINT, *TOLD_TO_END):
            if signal.getsignal(number) in default:
                self._old_handlers[number] = signal.getsignal(number)
                signal.signal(number, self._on_signal)
        if self._old_handlers:
            self._old_wakeup_fd = signal.set_wakeup_fd(self._wake.fileno())
        self._send(kind="signals", numbers=list(map(int, self._old_handlers)))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        with suppress(OSError):  # it follows the signal's number through the socket
            self._wake.send(bytes([HANDLED]))
        if self.is_failing:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    # The thread -----------------------------------------------------------------------

    def _listen(self) -> None:
        self._link.settimeout(BEAT)
        buffer = b""
        while not self._left.is_set():
            self._page.beat()
            try:
                data = self._link.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            if not data:
                say(f"[mlx_ep] rank {self.rank} ends: {self._end_of_watch()}")
                _exit_now(1)
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))

    def _end_of_watch(self) -> str:
        """How the watch ended, which should outlive this rank."""
        try:
            code = self._process.wait(BEAT)
        except subprocess.TimeoutExpired:
            return "its watch hung up, and is still there"
        if code < 0:
            return f"its watch was killed ({signal.Signals(-code).name}) from outside"
        return f"its watch ended with exit code {code}; its traceback is above"

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "end":
            if self._on_end is not None:
                _run_shortly(self._on_end, message["text"], self._goodbye_limit)
            _exit_now(message["code"])
        elif kind == "joined":
            self._joined.set()
        elif kind == "ready":
            self._ready.set()
        elif kind == "listening":
            self.meeting = Meeting.from_json(message["meeting"])
            self._is_listening.set()
        elif kind == "left":
            self._texts = message["texts"]
            self._left.set()


def _meeting_of_group(rank: int, size: int) -> Meeting:
    """Where the watches of a group meet that exists already."""
    try:
        launched = check_environment(os.environ)
    except ValueError:  # MLX connected all the same; they meet late
        return Meeting("late")
    if (launched.rank, launched.num_ranks) != (rank, size):
        return Meeting("late")  # a part of the ranks
    return find_meeting(os.environ, launched.transport, launched.hosts)


def _launcher_pid() -> int | None:
    """The parent, if that is mlx.launch: killed itself, it could not end its ranks."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent and any(part.endswith("mlx.launch") for part in parent.cmdline()):
            return int(parent.pid)
    return None


def say(words: str) -> None:
    with suppress(OSError):  # whoever read it is gone
        print(words, file=sys.stderr, flush=True)


def _run_shortly(
    say_goodbye: Callable[[str], object], text: str, seconds: float
) -> None:
    """In a thread: what it waits for must not keep the process."""
    words = threading.Thread(target=say_goodbye, args=(text,), daemon=True)
    words.start()
    words.join(seconds)


def _exit_now(code: int) -> NoReturn:
    """Ends the process with what was printed so far."""

    def flush() -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    # In a thread, because the main thread may hold the lock of a stream that nobody
    # reads any more; the process ends all the same.
    words = threading.Thread(target=flush, daemon=True)
    words.start()
    words.join(FLUSH_LIMIT)
    os._exit(code)
