"""KV caches of earlier requests, for those that begin with the same tokens.

Which entries there are is a pure function of what was asked and put in, in which order:
ranks that see the same agree on every hit and on everything that is thrown away. What
an entry holds is the rank's own business.
"""

from __future__ import annotations

from bisect import bisect_left, insort
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
    text: bytes  # see `_text`
    num_bytes: int
    content: Any


class PrefixCache:
    """Entries by their tokens; the one that was used longest ago goes first.

    An entry that begins another is not kept beside it: it would hold nothing new.
    Sorted by their tokens, those with the most in common are neighbours: finding one
    takes no longer where there are many.

    Args:
        limit: most bytes of all entries together; 0 keeps nothing.

    Attributes:
        num_bytes: of the entries.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._sorted: list[bytes] = []
        self._keys: dict[bytes, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int]) -> PrefixHit | None:
        """The entry with the longest beginning of `tokens`; of equals one of them."""
        wanted, best = _text(tokens), None
        place = bisect_left(self._sorted, wanted)
        for text in self._sorted[max(place - 1, 0) : place + 1]:
            common = _common(wanted, text)
            if common > (best.num_tokens if best else 0):
                best = PrefixHit(self._keys[text], common)
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
        new = _text(tokens)
        if not self.has_room_for(num_bytes) or self._is_held(new):
            return
        place = bisect_left(self._sorted, new)
        # What begins it is its neighbour: what is between would begin so too.
        if place and new.startswith(self._sorted[place - 1]):
            self._drop(self._keys[self._sorted[place - 1]])
        while self.num_bytes + num_bytes > self.limit:
            self._drop(next(iter(self._entries)))
        self._entries[self._next] = _Entry(new, num_bytes, content)
        self._keys[new] = self._next
        insort(self._sorted, new)
        self.num_bytes += num_bytes
        self._next += 1

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether an entry of that size can be kept at all."""
        return num_bytes <= self.limit

    def _is_held(self, text: bytes) -> bool:
        place = bisect_left(self._sorted, text)
        is_held = place < len(self._sorted) and self._sorted[place].startswith(text)
        if is_held:
            self._entries.move_to_end(self._keys[self._sorted[place]])
        return is_held

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key)
        del self._keys[entry.text]
        del self._sorted[bisect_left(self._sorted, entry.text)]
        self.num_bytes -= entry.num_bytes


def _text(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes, whose order is that of the tokens."""
    return np.asarray(tokens, ">i4").tobytes()  # on host


def _common(a: bytes, b: bytes) -> int:
    """How many first tokens are the same."""
    length = min(len(a), len(b)) // 4
    if not length:
        return 0
    left, right = (np.frombuffer(text, np.int32, length) for text in (a, b))
    differ = left != right
    return int(differ.argmax()) if differ.any() else length
