"""How much memory sequences need for their KV caches. Pure.

A batch of mlx-lm's caches is as wide as its longest sequence, and its buffers grow by
blocks, so that sequences in one batch need

    number of sequences * bytes of the longest, rounded up to a block

which is what is admitted, however short the others are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 256  # tokens by which mlx-lm's buffers grow


@dataclass(frozen=True)
class KvSizes:
    """What the caches of one sequence hold on a rank.

    Attributes:
        per_token: bytes of a token in caches that grow without end.
        windows: (tokens at most, bytes of a token) of caches that do not.
        fixed: bytes, however many tokens.
    """

    per_token: int
    windows: tuple[tuple[int, int], ...] = ()
    fixed: int = 0

    def held(self, num_tokens: int) -> int:
        """Bytes of a sequence by itself, without what buffers have to spare."""
        within = sum(min(num_tokens, most) * size for most, size in self.windows)
        return num_tokens * self.per_token + within + self.fixed

    def batch(self, lengths: Sequence[int]) -> int:
        """Bytes of sequences in one batch, whose tokens are so many."""
        if not lengths:
            return 0
        return len(lengths) * self.held(-(-max(lengths) // BLOCK) * BLOCK)
