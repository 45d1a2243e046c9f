"""The map expert -> (rank, slot), and its use on routed ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import mlx.core as mx
import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True)
class Placement:
    """Which experts each rank holds, in slot order.

    Attributes:
        rank_experts: one tuple per rank; ``rank_experts[r][s]`` is the expert in
            slot s of rank r. Ranks may hold different numbers, also none.

    Raises:
        ValueError: the tuples do not hold each of the experts 0..E-1 exactly once.
    """

    rank_experts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        held = sorted(expert for rank in self.rank_experts for expert in rank)
        if not held or held != list(range(len(held))):
            raise ValueError(
                "A placement must hold each of the experts 0..E-1 exactly once; "
                f"got {self.rank_experts}."
            )

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Consecutive experts on each rank, the first ranks taking the remainder.

        10 experts on 4 ranks: 3, 3, 2, 2. 2 experts on 3 ranks: 1, 1, 0.

        Raises:
            ValueError: num_experts or num_ranks is below 1.
        """
        if num_experts < 1 or num_ranks < 1:
            raise ValueError(
                "A placement needs at least 1 expert and 1 rank; got "
                f"{num_experts} experts and {num_ranks} ranks."
            )
        share, remainder = divmod(num_experts, num_ranks)
        starts = [r * share + min(r, remainder) for r in range(num_ranks + 1)]
        return cls(tuple(tuple(range(start, stop)) for start, stop in pairwise(starts)))

    @property
    def num_ranks(self) -> int:
        return len(self.rank_experts)

    @cached_property
    def num_experts(self) -> int:
        return sum(len(experts) for experts in self.rank_experts)

    def num_slots(self, rank: int) -> int:
        """L, the experts that `rank` holds."""
        return len(self.rank_experts[rank])

    @cached_property
    def expert_ranks(self) -> Int32[np.ndarray, " E"]:
        """The rank that holds each expert."""
        ranks = np.empty(self.num_experts, np.int32)
        for rank, experts in enumerate(self.rank_experts):
            ranks[list(experts)] = rank
        return ranks

    @cached_property
    def expert_slots(self) -> Int32[np.ndarray, " E"]:
        """The slot of each expert on the rank that holds it."""
        slots = np.empty(self.num_experts, np.int32)
        for experts in self.rank_experts:
            slots[list(experts)] = np.arange(len(experts))
        return slots

    def local_slots(
        self, expert_ids: Int32[mx.array, "T K"], rank: int
    ) -> Int32[mx.array, "T K"]:
        """The slot on `rank` of each routed expert, -1 where it lives elsewhere.

        An id of -1 (no expert) gives -1.
        """
        return self._slot_tables[rank][expert_ids]

    @cached_property
    def _slot_tables(self) -> list[mx.array]:
        """Per rank, the slot of each expert or -1.

        Entry E answers for the id -1, which as an index means "the last one".
        """
        tables = np.full((self.num_ranks, self.num_experts + 1), -1, np.int32)
        tables[self.expert_ranks, np.arange(self.num_experts)] = self.expert_slots
        return [mx.array(table) for table in tables]

    def describe(self, rank: int) -> str:
        """For a person: ``experts 32..63 (32 of 64 per layer)``."""
        experts = self.rank_experts[rank]
        share = f"({len(experts)} of {self.num_experts} per layer)"
        return f"experts {_ranges(experts) or 'none'} {share}"


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers, as (first, count), in the given order."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def _ranges(numbers: Sequence[int]) -> str:
    return ",".join(
        f"{first}..{first + count - 1}" if count > 1 else str(first)
        for first, count in runs(numbers)
    )
