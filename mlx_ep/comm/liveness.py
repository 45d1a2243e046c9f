"""One rank's failure ends the run on all ranks, whatever the others are doing.

While a rank is dead the others wait inside a collective that may never return:
MPI and JACCL have no timeout, and Python's signal handlers do not run while the main
thread is in C++. MLX releases the GIL while it evaluates, though (`mx.eval`, `.item()`,
`.tolist()`, `mx.synchronize`, NumPy views; not `mx.save`), so a thread goes on. Here
that thread holds the connections of `mlx_ep.comm.side_channel`, a star around rank 0,
and three kinds of messages travel:

    beat                 every second, both ways
    failed(text, code)   rank 0 tells the others
    bye                  rank 0 answers with bye

A connection that closes without bye is a rank that died; one that stays silent is a
rank that froze. Either way each process says why on stderr and leaves by `os._exit`,
because the ordinary way out (MPI_Finalize, destructors) waits for the dead rank.
"""

from __future__ import annotations

import faulthandler
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import mlx.core as mx
import psutil

from mlx_ep.comm.side_channel import Peer, hang_up, open_star

BEAT = 1.0  # seconds between two signs of life
MAIN_THREAD_GRACE = 1.0  # for the main thread to act on a signal by itself
ROOT_CAUSE_GRACE = 1.0  # for word of a failure that explains our own
LINGER = 1.0  # for the last messages to arrive
CLOSE_NOTE = 10.0  # after this, a rank 0 that waits for the others says so
# mlx.launch sends SIGTERM; a dropped SSH session sends SIGHUP, unless under nohup.
TOLD_TO_END = (signal.SIGTERM, signal.SIGHUP)
POSTED, HANDLED = 0xFF, 0  # wake-up bytes; the others are signal numbers


class Liveness:
    """The side channel of one rank; `guard` is the usual way to use it.

    Only its thread touches the connections; other threads post it work.

    Args:
        group: The group to watch over, of two ranks or more.
        silence_timeout: Seconds after which a silent rank counts as frozen. It must be
            longer than anything that holds the GIL, such as `mx.save`.
    """

    def __init__(
        self, group: mx.distributed.Group, silence_timeout: float = 30.0
    ) -> None:
        if silence_timeout < 2 * BEAT:
            raise ValueError(
                f"silence_timeout must be at least {2 * BEAT:g} s, two beats, "
                f"got {silence_timeout:g} s"
            )
        self._group = group
        self._rank = group.rank()
        self._silence_timeout = silence_timeout
        self._peers: dict[int, Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._is_closing = False  # this rank has nothing more to do
        self._is_failing = False  # signals no longer raise in the main thread
        self._done = threading.Event()
        self._pending_signal: tuple[int, float] | None = None  # number, deadline
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup_fd = -1
        self._launcher = _launcher_pid()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake_up)
        # A daemon: the interpreter must not wait for it at its end.
        self._thread = threading.Thread(
            target=self._watch, name="mlx_ep liveness", daemon=True
        )
        self._thread.start()

    @classmethod
    def start(
        cls, group: mx.distributed.Group, silence_timeout: float = 30.0
    ) -> Liveness:
        """Connects all ranks of the group, each of which must call it.

        On another thread than the main one it leaves signals as they are. Close the
        result at the end, or the others take this rank's end for a death.

        Raises:
            RuntimeError: A rank could not be connected.
        """
        liveness = cls(group, silence_timeout)
        liveness._open()
        return liveness

    def fail(self, reason: str, exit_code: int = 1) -> NoReturn:
        """Ends this process and the run on all other ranks.

        Args:
            reason: What went wrong; every rank prints it.
            exit_code: The exit code of every rank, 1 to 255.
        """
        self._announce(f"rank {self._rank} failed: {reason}", exit_code)

    def close(self) -> None:
        """Leaves normally. Rank 0 waits for the others: it must relay a failure."""
        self._post(self._leave)
        if not self._done.wait(CLOSE_NOTE):
            others = sorted(list(self._peers))
            _say(f"[mlx_ep] rank {self._rank} is done and waits for ranks {others}")
            self._done.wait()
        self._thread.join()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if self._old_handlers:
            signal.set_wakeup_fd(self._old_wakeup_fd)
        faulthandler.cancel_dump_traceback_later()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    # Main thread ----------------------------------------------------------------------

    def _announce(self, text: str, exit_code: int, details: str = "") -> NoReturn:
        self._is_failing = True
        self._post(lambda: self._end(text, exit_code, details=details))
        self._thread.join()  # it ends the process
        _say(f"{details}[mlx_ep] {text}")  # unless a bug ended it before
        os._exit(exit_code % 256 or 1)

    def _post(self, work: Callable[[], None]) -> None:
        self._posted.append(work)
        self._wake_write.send(bytes([POSTED]))

    def _open(self) -> None:
        # Signals first: Ctrl-C must work while ranks wait for each other here.
        if threading.current_thread() is threading.main_thread():
            self._catch_signals()
        for peer in open_star(self._group):
            self._adopt(peer)

    def _adopt(self, peer: Peer) -> None:
        def register() -> None:
            self._peers[peer.rank] = peer
            on_message = partial(self._on_message, peer)
            self._selector.register(peer.socket, selectors.EVENT_READ, on_message)

        self._post(register)

    def _catch_signals(self) -> None:
        """Makes SIGINT and TOLD_TO_END known to the thread, unless they are ignored.

        The interpreter's C handler writes the signal's number into the wake-up socket
        even while the main thread is stuck.
        """
        for number in (signal.SIGINT, *TOLD_TO_END):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                self._old_handlers[number] = handler
                signal.signal(number, self._on_signal)
        if self._old_handlers:
            self._old_wakeup_fd = signal.set_wakeup_fd(self._wake_write.fileno())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # It follows the signal's number through the same socket.
        self._wake_write.send(bytes([HANDLED]))
        handler = self._old_handlers[number]
        if self._is_failing:
            return
        if callable(handler):
            handler(number, frame)
        else:
            raise SystemExit(128 + number)

    # The thread -----------------------------------------------------------------------

    def _watch(self) -> None:
        next_beat = time.monotonic()
        while not self._done.is_set():
            now = time.monotonic()
            if now >= next_beat:
                self._beat()
                next_beat = now + BEAT
            wake_at = next_beat
            if self._pending_signal is not None:
                number, deadline = self._pending_signal
                if now >= deadline:
                    self._end(_signal_text(self._rank, number), 128 + number)
                wake_at = min(wake_at, deadline)
            for key, _ in self._selector.select(max(wake_at - now, 0)):
                key.data()

    def _beat(self) -> None:
        # Counted in beats of our own: after a pause of this very process (Ctrl-Z, a
        # laptop that slept) the clock would find everyone else silent.
        for peer in self._peers.values():
            peer.missed += 1
            if peer.missed * BEAT > self._silence_timeout:
                self._end(
                    f"rank {peer.rank} has been silent for "
                    f"{self._silence_timeout:g} s; it is frozen, or its network is"
                )
            peer.send(kind="beat")
        if self._launcher is not None and os.getppid() != self._launcher:
            self._end(f"rank {self._rank} has lost its launcher; it was killed")
        # Should something hold the GIL for good, this thread cannot end the process:
        # the interpreter's watchdog is plain C, and shows where each thread is.
        faulthandler.dump_traceback_later(self._silence_timeout + 2, exit=True, file=2)

    def _on_wake_up(self) -> None:
        for byte in self._wake_read.recv(4096):
            if byte == POSTED:
                self._posted.popleft()()
            elif byte == HANDLED:
                self._pending_signal = None
            elif byte in self._old_handlers and self._pending_signal is None:
                self._pending_signal = (byte, time.monotonic() + MAIN_THREAD_GRACE)

    def _on_message(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None:
            self._end(
                f"rank {peer.rank} ended without a word; it was killed, or its host "
                "went away",
                source=peer.rank,
            )
        peer.missed = 0
        for message in messages:
            if message["kind"] == "failed":
                self._end(message["text"], message["code"], source=peer.rank)
            elif message["kind"] == "bye":
                self._part_from(peer)
                return

    def _leave(self) -> None:
        self._is_closing = True
        if self._rank != 0:
            self._peers[0].send(kind="bye")
        elif not self._peers:
            self._done.set()

    def _part_from(self, peer: Peer) -> None:
        """Lets a peer go that said bye, rank 0 with an answer: nothing is in flight."""
        if self._rank == 0:
            peer.send(kind="bye")
        self._selector.unregister(peer.socket)
        peer.socket.close()
        del self._peers[peer.rank]
        if self._is_closing and not self._peers:
            self._done.set()

    def _end(
        self, text: str, exit_code: int = 1, source: int = -1, details: str = ""
    ) -> NoReturn:
        """Tells all ranks but the source of the news, and ends this process."""
        for peer in self._peers.values():
            if peer.rank != source:
                peer.send(kind="failed", text=text, code=exit_code)
        me = f"rank {self._rank} "
        line = text if text.startswith(me) else f"{me}ends: {text}"
        # In a thread, because the main thread may hold the lock of a stream that
        # nobody reads any more; the process ends all the same.
        words = threading.Thread(
            target=_say, args=(f"{details}[mlx_ep] {line}",), daemon=True
        )
        words.start()
        words.join(LINGER)
        hang_up(self._peers.values(), LINGER)
        os._exit(exit_code % 256 or 1)


@contextmanager
def guard(
    group: mx.distributed.Group | None = None, silence_timeout: float = 30.0
) -> Iterator[Liveness | None]:
    """Runs the body so that its failure on any rank ends the run on all of them.

    Enter it on all ranks, on the main thread, right after `mx.distributed.init`: what
    fails before is not seen. On one rank it only turns Ctrl-C into exit code 130.

    Args:
        group: The group that runs the body, by default the global one.
        silence_timeout: Seconds after which a silent rank counts as frozen.

    Yields:
        The side channel, for `fail`; None on one rank.
    """
    group = mx.distributed.init() if group is None else group
    if group.size() == 1:
        try:
            yield None
        except KeyboardInterrupt:
            _say("[mlx_ep] interrupted (Ctrl-C)")
            raise SystemExit(130) from None
        return
    liveness = Liveness(group, silence_timeout)
    clean_exit: SystemExit | None = None
    try:
        liveness._open()
        try:
            yield liveness
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
            clean_exit = error
        liveness.close()
    # Everything, KeyboardInterrupt and SystemExit included: whatever takes this rank
    # out of the run must reach the others. Nothing is swallowed, the process ends.
    except BaseException as error:
        _fail_with(liveness, error)
    if clean_exit is not None:
        raise clean_exit


def _fail_with(liveness: Liveness, error: BaseException) -> NoReturn:
    liveness._is_failing = True
    if isinstance(error, RuntimeError):
        # A collective raises this when a peer is gone. Word of why that peer went says
        # more than our traceback would; it ends the process while we sleep.
        time.sleep(ROOT_CAUSE_GRACE)
    if isinstance(error, KeyboardInterrupt):
        liveness._announce(_signal_text(liveness._rank, signal.SIGINT), 130)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        if code - 128 in TOLD_TO_END:
            liveness._announce(_signal_text(liveness._rank, code - 128), code)
        liveness.fail(f"SystemExit: {error.code}", code)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    details = "".join(traceback.format_exception(error))
    liveness._announce(f"rank {liveness._rank} failed: {reason}", 1, details)


def _signal_text(rank: int, number: int) -> str:
    if number == signal.SIGINT:
        return f"rank {rank} was interrupted (Ctrl-C)"
    return f"rank {rank} was told to end ({signal.Signals(number).name})"


def _say(words: str) -> None:
    with suppress(OSError):  # whoever read it is gone
        sys.stdout.flush()
    with suppress(OSError):
        print(words, file=sys.stderr, flush=True)


def _launcher_pid() -> int | None:
    """The parent, if that is mlx.launch: killed itself, it could not end its ranks."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent and any(part.endswith("mlx.launch") for part in parent.cmdline()):
            return int(parent.pid)
    return None
