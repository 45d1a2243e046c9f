"""Printing without waiting: whoever reads it may be gone, or stopped."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

LIMIT = 0.5  # seconds for the last words


class Sayer:
    """Writes to stderr, in order, on threads that nobody waits for."""

    def __init__(self) -> None:
        self._last: threading.Thread | None = None

    def say(self, words: str, end: str = "\n") -> None:
        """Prints words, in time."""
        if not words:
            return
        before = self._last

        def write() -> None:
            if before is not None:
                before.join()
            with suppress(OSError):
                os.write(2, (words + end).encode(errors="backslashreplace"))

        self._last = threading.Thread(target=write, daemon=True)
        self._last.start()

    def finish(self) -> None:
        """Gives the last words their time."""
        if self._last is not None:
            self._last.join(LIMIT)
