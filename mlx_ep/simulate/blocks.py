"""KV blocks of one instance: counted, and found again by the tokens they hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count


class BlockNames:
    """A name for every chain of blocks of tokens, the same wherever it appears.

    Two prompts share a name as far as they are equal, block by block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._names: dict[tuple[int, tuple[int, ...]], int] = {}
        self._next = count(1)

    def of(self, tokens: Sequence[int]) -> list[int]:
        """The names of all full blocks of some tokens."""
        found, before = [], 0
        for start in range(0, len(tokens) - self._block_size + 1, self._block_size):
            key = (before, tuple(tokens[start : start + self._block_size]))
            name = self._names.get(key)
            if name is None:
                name = self._names[key] = next(self._next)
            found.append(name)
            before = name
        return found


class BlockPool:
    """Which blocks are in use, and which hold known tokens.

    A block is free, in use by one request, or named: in use by any number of requests,
    and kept when nobody uses it until its room is needed, the longest unused first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._own = 0
        self._users: dict[int, int] = {}
        self._unused: dict[int, None] = {}

    @property
    def num_used(self) -> int:
        return self._own + len(self._users) - len(self._unused)

    @property
    def num_free(self) -> int:
        return self.num_blocks - self.num_used

    def take(self, blocks: int) -> bool:
        """Blocks for one request; False, and nothing taken, where too few are free."""
        if blocks > self.num_free:
            return False
        self._own += blocks
        while self._own + len(self._users) > self.num_blocks:
            oldest = next(iter(self._unused))
            del self._unused[oldest], self._users[oldest]
        return True

    def give_back(self, blocks: int, names: Sequence[int]) -> None:
        """A request's blocks: its own, and its named ones."""
        self._own -= blocks
        for name in reversed(names):
            self._users[name] -= 1
            if not self._users[name]:
                self._unused[name] = None

    def name(self, name: int) -> bool:
        """Make an own block a named one; False where there is one of that name."""
        if name in self._users:
            return False
        self._own -= 1
        self._users[name] = 1
        return True

    def known(self, names: Sequence[int]) -> int:
        """How many of the first blocks of a chain are there."""
        for index, name in enumerate(names):
            if name not in self._users:
                return index
        return len(names)

    def unused_of(self, names: Sequence[int]) -> int:
        """How many of these nobody uses: sharing them takes so many free blocks."""
        return sum(name in self._unused for name in names)

    def share(self, names: Sequence[int]) -> None:
        """One more user of blocks that are there."""
        for name in names:
            self._users[name] += 1
            self._unused.pop(name, None)
