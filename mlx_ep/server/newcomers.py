"""Requests that are on their way to the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# s that a new request waits for others which are being read, so that one pass takes the
# prompts of all: a pass of its own for the first would hold the others up for longer.
EXPECT_LIMIT = 0.02


class Newcomers:
    """How many requests are being read, and whether one has come since the last step.

    Args:
        wake: what the engine waits with; each method is called with its lock held.
    """

    def __init__(self, wake: threading.Condition) -> None:
        self._wake = wake
        self._num_expected = 0
        self._has_come = False

    def expect(self, count: int) -> None:
        """So many more are being read; fewer, where negative."""
        self._num_expected += count
        self._wake.notify()

    def note(self) -> None:
        """One has come."""
        self._has_come = True
        self._wake.notify()

    def wait(self, may_wait: Callable[[], bool]) -> None:
        """Those that are being read come in with the one that has come.

        Args:
            may_wait: whether they could; asked again after each.
        """
        until = time.monotonic() + EXPECT_LIMIT
        while self._has_come and self._num_expected and may_wait():
            left = until - time.monotonic()
            if left <= 0:
                break
            self._wake.wait(left)
        self._has_come = False
