"""Waiting for what a test needs.

A machine that has other work, or stands still for seconds, is no failure of what is
tested: who waits here waits long, and goes on at once when it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

# Seconds in which whatever has to come comes, on any machine.
LONG = 200.0
_BETWEEN_LOOKS = 0.005

Found = TypeVar("Found")


def until(
    look: Callable[[], Found],
    seen: Callable[[], object] = lambda: "",
    seconds: float = LONG,
) -> Found:
    """What `look` gives, once that is something.

    Args:
        look: asked again and again.
        seen: what to say where it never comes.

    Raises:
        AssertionError: it does not come within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, (f"not within {seconds} s", seen())
        time.sleep(_BETWEEN_LOOKS)
    return found
