"""What a watch sees of its rank from outside: its process, its page, its stacks."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.control.progress import ProgressPage

MOST_STACKS = 32768  # bytes
WITHOUT_LIMIT = ("starting", "loading", "warmup")  # phases that may hold the lock


class RankProcess:
    """The process of a rank, which is the parent of its watch.

    Args:
        config: what the rank says of itself, see `mlx_ep.comm.channel`.
        page: where it says how far it is.
        stacks: the file into which its handler of `dump_signal` writes.

    Attributes:
        is_stopped: by SIGSTOP or a debugger.
        silent: seconds without a sign of its interpreter.
    """

    def __init__(
        self, config: Mapping[str, Any], limits: Limits, page: ProgressPage, stacks: int
    ) -> None:
        self._rank, self._pid = config["rank"], config["pid"]
        self._launcher, self._dump_signal = config["launcher"], config["dump_signal"]
        self._limits, self._page, self._stacks = limits, page, stacks
        self._process: psutil.Process | None = None
        with suppress(psutil.NoSuchProcess):  # it can have died before this line
            self._process = psutil.Process(self._pid)
        self.is_stopped = False
        self.silent = 0.0
        self._last_beat, self._last_mark = 0.0, 0
        self._has_told_silence = False

    @property
    def is_gone(self) -> bool:
        """Whether it is no more; its end of the link may live on in a child of it."""
        return self._process is None or os.getppid() != self._pid

    def look(self, seconds: float) -> str:
        """What is wrong with it; "" is nothing.

        Args:
            seconds: since the last look.
        """
        if self._process is None:
            return ""
        with suppress(psutil.Error):
            status = self._process.status()
            self.is_stopped = status in (
                psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP,
            )  # fmt: skip
            if self._launcher and self._process.ppid() != self._launcher:
                self._launcher = None
                return f"rank {self._rank} has lost its launcher; it was killed"
        return "" if self.is_stopped else self._look_at_interpreter(seconds)

    def describe(self, now: float) -> dict[str, Any]:
        """Where it is, for the other ranks.

        Args:
            now: monotonic seconds.
        """
        place = self._page.read()
        return {
            "phase": place.phase or "starting",
            "step": place.step,
            "layer": place.layer,
            "stage": place.stage,
            "since": now - place.since if place.since else 0.0,
            "interpreter": self.silent,
            "count": place.count,
            "stopped": self.is_stopped,
            "marks": self._new_marks(),
        }

    def _new_marks(self) -> list[list[int]]:
        """The fingerprints that were not told before."""
        found = sorted(self._page.read_marks().items())
        new = [[number, value] for number, value in found if number > self._last_mark]
        if new:
            self._last_mark = new[-1][0]
        return new

    def ask_for_stacks(self) -> None:
        """Has its threads' stacks written, by a signal handler in C."""
        with suppress(OSError):
            os.ftruncate(self._stacks, 0)
            if self._dump_signal and not self.is_stopped and not self.is_gone:
                os.kill(self._pid, self._dump_signal)

    def read_stacks(self) -> str:
        """What has been written since."""
        with suppress(OSError):
            text = os.pread(self._stacks, MOST_STACKS, 0).decode(errors="replace")
            if text:
                return text
        return "(stopped)" if self.is_stopped else "(no answer)"

    def kill(self) -> None:
        """Ends it, also where it is stopped."""
        if not self.is_gone:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _look_at_interpreter(self, seconds: float) -> str:
        place = self._page.read()
        self.silent += seconds
        if place.beat != self._last_beat:
            self._last_beat, self.silent = place.beat, 0.0
        limit = self._limits.interpreter
        is_silent = self.silent > limit and place.phase not in WITHOUT_LIMIT
        if not is_silent or self._has_told_silence:
            return ""
        self._has_told_silence = True
        return (
            f"the interpreter of rank {self._rank} has not answered for {limit:g} s: "
            "something holds its lock"
        )


def read_config(link: socket.socket) -> tuple[dict[str, Any], bytes]:
    """The first line that a rank sends, and what came with it."""
    buffer = b""
    while b"\n" not in buffer:
        data = link.recv(65536)
        if not data:
            sys.exit(0)  # it died before it could say who it is
        buffer += data
    line, rest = buffer.split(b"\n", 1)
    config: dict[str, Any] = json.loads(line)
    return config, rest
