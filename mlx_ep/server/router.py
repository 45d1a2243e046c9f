"""Which rank runs the attention of a request, where each runs its own. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# A running sequence counts as so many tokens of prompts: enough to spread what is new
# over the ranks, too few to part a conversation from what is known of it.
SEQUENCE_TOKENS = 4


class RankLoad(NamedTuple):
    """What a rank has to do.

    Attributes:
        sequences: that it runs.
        left: tokens of their prompts that are not processed yet.
        new_tokens: of the new prompt that are not in the rank's prefix cache.
    """

    sequences: int
    left: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """All of it, were the new request here."""
        return self.sequences * SEQUENCE_TOKENS + self.left + self.new_tokens


def choose_rank(loads: Mapping[int, RankLoad]) -> int:
    """The rank with the least to do, what it has of the prompt already left out.

    Args:
        loads: of the ranks whose memory has room for the request; at least one.
    """
    return min(loads, key=lambda rank: (loads[rank].tokens, rank))
