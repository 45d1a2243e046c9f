"""KV caches of earlier requests, for those that begin with the same tokens.

Which entries there are is a pure function of what was asked and put in, in which order:
ranks that see the same agree on every hit and on everything that is thrown away. What
an entry holds is the rank's own business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# A prompt that brought so many tokens is kept for others that begin with it, before its
# answer ends.
KEEP_PROMPT = 64


class PrefixHit(NamedTuple):
    """An entry, and how many of its first tokens are those asked for."""

    entry: int
    num_tokens: int


@dataclass
class _Entry:
    tokens: np.ndarray
    num_bytes: int
    content: Any


class PrefixCache:
    """Entries by their tokens; the one that was used longest ago goes first.

    An entry that begins another is not kept beside it: it would hold nothing new.

    Args:
        limit: most bytes of all entries together; 0 keeps nothing.

    Attributes:
        num_bytes: of the entries.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int]) -> PrefixHit | None:
        """The entry with the longest beginning of `tokens`; of equals the first."""
        wanted, best = np.asarray(tokens, np.int32), None  # on host
        for key, entry in self._entries.items():
            common = _common(wanted, entry.tokens)
            if common > (best.num_tokens if best else 0):
                best = PrefixHit(key, common)
        return best

    def use(self, key: int) -> Any:
        """What an entry holds; it counts as used just now."""
        self._entries.move_to_end(key)
        return self._entries[key].content

    def put(self, tokens: Sequence[int], num_bytes: int, content: Any) -> None:
        """One more entry, where there is room for it; the oldest make room.

        Args:
            tokens: of the sequence.
            num_bytes: that it takes, counted alike on all ranks.
            content: what `use` gives.
        """
        new = np.asarray(tokens, np.int32)  # on host
        if not self.has_room_for(num_bytes) or self._is_held(new):
            return
        for key in [k for k, e in self._entries.items() if _begins(e.tokens, new)]:
            self._drop(key)
        while self.num_bytes + num_bytes > self.limit:
            self._drop(next(iter(self._entries)))
        self._entries[self._next] = _Entry(new, num_bytes, content)
        self.num_bytes += num_bytes
        self._next += 1

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether an entry of that size can be kept at all."""
        return num_bytes <= self.limit

    def _is_held(self, tokens: np.ndarray) -> bool:
        for key, entry in self._entries.items():
            if _begins(tokens, entry.tokens):
                self._entries.move_to_end(key)
                return True
        return False

    def _drop(self, key: int) -> None:
        self.num_bytes -= self._entries.pop(key).num_bytes


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens are the same."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def _begins(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether b begins with a."""
    return len(a) <= len(b) and _common(a, b) == len(a)
