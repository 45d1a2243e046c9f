"""One rank's failure ends the run on all ranks, whatever the others are doing.

While a rank is dead the others wait inside a collective that may never return: MPI and
JACCL have no timeout, and Python's signal handlers do not run while the main thread is
in C++. So a small process watches each rank (`mlx_ep.comm.control`); this is the rank's
side of it. A rank that raises, dies, stops, is interrupted, loses its network or passes
a limit (`Limits`) ends all, with one report by rank 0. A rank ends by `os._exit`, since
the ordinary way out (MPI_Finalize, destructors) waits for the dead rank; where it does
not answer, its watch kills it.

`start_early` begins before the group exists, `guard` is for everything after.
"""

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
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import mlx.core as mx
import psutil

import mlx_ep
from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.control.meeting import Meeting, find_meeting
from mlx_ep.comm.control.progress import ProgressPage
from mlx_ep.comm.environment import Launched, check_environment

BEAT = 0.5  # seconds between two signs of life of the interpreter
ROOT_CAUSE_GRACE = 1.0  # seconds for word of a failure that explains our own
FLUSH_LIMIT = 0.2  # seconds: nobody may read what is flushed
ENDED_BY_WATCH = 10.0  # seconds for the watch to answer a failure
# mlx.launch sends SIGTERM; a dropped SSH session sends SIGHUP, unless under nohup.
TOLD_TO_END = (signal.SIGTERM, signal.SIGHUP)
DUMP_SIGNAL = signal.SIGUSR2
HANDLED = 0  # as in control/watch.py
INVITATION_SIZE = 1024  # bytes
_WATCH = (
    "import sys; sys.path.append({root!r}); "
    "from mlx_ep.comm.control.watch import main; main()"
)


class UsageError(Exception):
    """Wrong usage, which all ranks are to report together, in one line."""


class Liveness:
    """A rank's control channel; `guard` is the usual way to use it.

    Args:
        rank: this rank.
        size: the number of ranks, 2 or more.
        meeting: where the watches of the ranks meet.
        limits: how long things may take.
    """

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
        self._is_failing = False  # signals no longer raise in the main thread
        self._lock = threading.Lock()
        self._joined, self._left = threading.Event(), threading.Event()
        self._is_listening = threading.Event()
        self._texts: list[str] = []
        self._send(
            rank=rank,
            size=size,
            pid=os.getpid(),
            launcher=_launcher_pid(),
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

    @classmethod
    def start(
        cls, group: mx.distributed.Group, limits: Limits | None = None
    ) -> Liveness:
        """Connects all ranks of the group, each of which must call it.

        On another thread than the main one it leaves signals as they are. Close the
        result at the end, or the others take this rank's end for a death.
        """
        global _current
        rank, size = group.rank(), group.size()
        channel = _current
        if channel is None or (channel.rank, channel.size) != (rank, size):
            limits = limits or Limits().changed_by(os.environ)
            meeting = _meeting_of_group(rank, size)
            _current = channel = cls(rank, size, meeting, limits)
            channel._meet_late(group)
        channel._send(kind="guarded")
        channel._joined.wait()
        channel._page.at("running")
        return channel

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
        self._announce(f"rank {self.rank} failed: {reason}", exit_code)

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
        global _current
        if _current is self:
            _current = None
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

    def _announce(
        self, text: str, exit_code: int, details: str = "", grace: float = 0.0
    ) -> NoReturn:
        self._is_failing = True
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

    def _send(self, **message: object) -> None:
        with self._lock, suppress(OSError):  # a watch that is gone is found on reading
            self._link.sendall(json.dumps(message).encode() + b"\n")

    def _meet_late(self, group: mx.distributed.Group) -> None:
        """Where nothing could be agreed before: rank 0 says where, by a collective."""
        if self.meeting.kind != "late":
            return
        if self.rank == 0:
            addresses = self.meeting.addresses or _own_addresses()
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
        if self._is_failing:
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
                _say(f"[mlx_ep] rank {self.rank} ends: its watch was killed")
                _exit_now(1)
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._hear(json.loads(line))

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "end":
            _exit_now(message["code"])
        elif kind == "joined":
            self._joined.set()
        elif kind == "listening":
            self.meeting = Meeting.from_json(message["meeting"])
            self._is_listening.set()
        elif kind == "left":
            self._texts = message["texts"]
            self._left.set()


_current: Liveness | None = None  # of this process


def progress(
    phase: str | None = None,
    step: int | None = None,
    layer: int | None = None,
    stage: str = "",
) -> None:
    """Says where this rank is, for the limits and for the report of a failure.

    It costs about a microsecond, and nothing without a control channel. A new phase
    or step starts its time anew, a layer or stage does not.

    Args:
        phase: "loading", "warmup", "prefill" and "decode" have limits (`Limits`);
            "running" and "waiting" have none. None: as before.
        step: of the phase. None: as before.
    """
    if _current is not None:
        _current._page.at(phase, step, layer, stage)


def start_early(launched: Launched, limits: Limits | None = None) -> Liveness | None:
    """The control channel before the group exists; None where there is none to have.

    Called again, it gives the same. Without it, what fails before `guard` is not seen.

    Raises:
        ValueError: MLX_EP_SECRET, MLX_EP_CONTROL or MLX_EP_LIMITS is malformed.
    """
    global _current
    if launched.rank is None or launched.num_ranks in (None, 1):
        return None
    assert launched.num_ranks is not None
    if _current is None:
        meeting = find_meeting(os.environ, launched.transport, launched.hosts)
        limits = limits or Limits().changed_by(os.environ)
        _current = Liveness(launched.rank, launched.num_ranks, meeting, limits)
    return _current


@contextmanager
def guard(
    group: mx.distributed.Group | None = None, limits: Limits | None = None
) -> Iterator[Liveness | None]:
    """Runs the body so that its failure on any rank ends the run on all of them.

    Enter it on all ranks, on the main thread, right after `mlx_ep.comm.init` (which
    watches from its own start on) or `mx.distributed.init` (what fails before is not
    seen then). Ctrl-C and SIGTERM end the run, also where the body catches what they
    raise; a program that has handlers of its own for them keeps these. On one rank it
    only turns Ctrl-C into exit code 130.

    Args:
        group: The group that runs the body, by default the global one.
        limits: How long things may take, by default `Limits` and MLX_EP_LIMITS; those
            of `mlx_ep.comm.init` if it started the channel.

    Yields:
        The channel, for `fail`; None on one rank.

    Raises:
        UsageError: the body raised it on every rank; the text is that of all ranks.
    """
    group = mx.distributed.init() if group is None else group
    if group.size() == 1:
        try:
            yield None
        except KeyboardInterrupt:
            _say("[mlx_ep] interrupted (Ctrl-C)")
            raise SystemExit(130) from None
        return
    clean_exit: SystemExit | None = None
    usage_texts: list[str] = []
    try:
        channel = Liveness.start(group, limits)
        try:
            yield channel
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
            clean_exit = error
        except UsageError as error:
            usage_texts = channel.leave_with_usage_error(str(error))
        else:
            channel.close()
        if clean_exit is not None:
            channel.close()
    # Everything, KeyboardInterrupt and SystemExit included: whatever takes this rank
    # out of the run must reach the others. Nothing is swallowed, the process ends.
    except BaseException as error:
        fail_with(error)
    if clean_exit is not None:
        raise clean_exit
    if usage_texts:
        raise UsageError(joined_texts(usage_texts))


def joined_texts(texts: list[str]) -> str:
    """What the ranks found, once where it is the same."""
    if len(set(texts)) == 1:
        return texts[0]
    return " ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))


def fail_with(error: BaseException) -> NoReturn:
    """Ends the run on all ranks because of an exception; without a channel, raises."""
    channel = _current
    if channel is None:
        raise error
    channel._is_failing = True
    if isinstance(error, KeyboardInterrupt):
        channel._announce(f"rank {channel.rank} was interrupted (Ctrl-C)", 130)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        if code - 128 in TOLD_TO_END:
            name = signal.Signals(code - 128).name
            channel._announce(f"rank {channel.rank} was told to end ({name})", code)
        channel.fail(f"SystemExit: {error.code}", code)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    details = "".join(traceback.format_exception(error))
    # A collective raises RuntimeError when a peer is gone. Word of why that peer went
    # says more than our traceback would.
    grace = ROOT_CAUSE_GRACE if isinstance(error, RuntimeError) else 0.0
    channel._announce(f"rank {channel.rank} failed: {reason}", 1, details, grace)


def _meeting_of_group(rank: int, size: int) -> Meeting:
    """Where the watches of a group meet that exists already."""
    try:
        launched = check_environment(os.environ)
    except ValueError:  # MLX connected all the same; they meet late
        return Meeting("late")
    if (launched.rank, launched.num_ranks) != (rank, size):
        return Meeting("late")  # a part of the ranks
    return find_meeting(os.environ, launched.transport, launched.hosts)


def _own_addresses() -> tuple[str, ...]:
    """This host's IPv4 addresses, the loopback last."""
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    return tuple(sorted(found, key=lambda it: it.startswith("127.")))[:16]


def _launcher_pid() -> int | None:
    """The parent, if that is mlx.launch: killed itself, it could not end its ranks."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent and any(part.endswith("mlx.launch") for part in parent.cmdline()):
            return int(parent.pid)
    return None


def _say(words: str) -> None:
    with suppress(OSError):  # whoever read it is gone
        print(words, file=sys.stderr, flush=True)


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
