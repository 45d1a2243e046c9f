"""Checks of shapes, for code that takes turns on one thread.

jaxtyping keeps what the letters of a function's shapes stand for in a stack of the
thread. Passes that take turns (greenlets) would find each other's letters in it; here
each has a stack of its own.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import jaxtyping._storage as storage
from greenlet import getcurrent, greenlet


class _OfGreenlet:
    """In the place of jaxtyping's threading.local."""

    def __init__(self) -> None:
        object.__setattr__(self, "_stacks", WeakKeyDictionary())

    def _own(self) -> dict[str, Any]:
        stacks: WeakKeyDictionary[greenlet, dict[str, Any]] = self._stacks
        return stacks.setdefault(getcurrent(), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return self._own()[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._own()[name] = value


def keep_apart() -> None:
    """Give each greenlet a stack of its own; harmless without any."""
    if not isinstance(storage._shape_storage, _OfGreenlet):
        storage._shape_storage = _OfGreenlet()
