"""One layer's copies, added one by one where each takes most from the busiest ranks.

What is made small is said in `replicas.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

ABOUT_AS_GOOD = 0.98
MOST_RANKS_ALL_SETS = 8  # beyond, only sets of one and two ranks are looked at


class RankSets:
    """The sets of ranks whose own work is made small."""

    def __init__(self, speeds: Sequence[float]) -> None:
        num_ranks = len(speeds)
        sizes = range(1, num_ranks + 1 if num_ranks <= MOST_RANKS_ALL_SETS else 3)
        members = [s for n in sizes for s in combinations(range(num_ranks), n)]
        self.has = np.zeros((len(members), num_ranks), bool)
        for row, ranks_of in zip(self.has, members):
            row[list(ranks_of)] = True
        speed = np.array(speeds)
        self.weight = 1 / (self.has @ speed) ** 2


class LayerCopies:
    """One layer's placement while copies are added."""

    def __init__(
        self,
        moments: np.ndarray,
        sets: RankSets,
        counts: Sequence[int],
        base: Sequence[Sequence[int]] | None,
    ) -> None:
        self.moments = moments
        self.sets = sets
        num_experts, num_ranks = len(moments), len(counts)
        self.on = np.zeros((num_experts, num_ranks), bool)
        # Whether set A has all holders of e, and C summed over the experts of A.
        self.inside = np.zeros((len(sets.weight), num_experts), bool)
        self.sums = np.zeros((len(sets.weight), num_experts))
        if base is None:
            self._place(list(counts))
        for rank, experts in enumerate(base or ()):
            for expert in experts:
                self._put(expert, rank)
        self.gains: np.ndarray | None = None

    def copy(self) -> LayerCopies:
        other = object.__new__(LayerCopies)
        other.__dict__.update(self.__dict__)
        other.on, other.inside = self.on.copy(), self.inside.copy()
        other.sums = self.sums.copy()
        return other

    def _place(self, counts: list[int]) -> None:
        """One of each expert: the most used first, where it adds least."""
        sets, moments = self.sets, self.moments
        room = np.array(counts)
        for expert in np.argsort(-np.diag(moments), kind="stable"):
            weight = sets.weight * (2 * self.sums[:, expert] + moments[expert, expert])
            cost = np.where(room > 0, weight @ sets.has, np.inf)
            # On a tie the rank that has most room, so that all fill alike.
            rank = int(np.lexsort((-room, np.round(cost, 12)))[0])
            room[rank] -= 1
            self._put(int(expert), rank)

    def _put(self, expert: int, rank: int) -> None:
        """An expert's first place."""
        has = self.sets.has[:, rank]
        self.on[expert, rank] = True
        self.inside[has, expert] = True
        self.sums[has] += self.moments[expert]

    def best(self, most: np.ndarray, has_room: np.ndarray) -> float:
        """What the best further copy takes from the sum; 0 or less: there is none."""
        if self.gains is None:
            sets = self.sets
            taken = 2 * self.sums - np.diag(self.moments)
            taken = np.where(self.inside, taken * sets.weight[:, None], 0.0)
            # A copy on r takes the expert out of the sets that r is not in.
            self.gains = taken.T @ ~sets.has
            self.gains[self.on] = -np.inf
        held = self.on.sum(0)
        open_ranks = has_room & (held < most)
        if not open_ranks.any():
            return -np.inf
        gains = np.where(open_ranks, self.gains, -np.inf)
        top = float(gains.max())
        # Of what is about as good, that on the rank with the fewest: memory is alike.
        good = np.where(gains >= top * ABOUT_AS_GOOD, held, np.iinfo(np.int64).max)
        column = int(good.min(0).argmin())
        row = np.where(good[:, column] == held[column], gains[:, column], -np.inf)
        self._at = int(row.argmax()), column
        return top

    def add_best(self) -> int:
        """Add the copy that `best` found; its rank."""
        expert, rank = self._at
        self.on[expert, rank] = True
        out = self.inside[:, expert] & ~self.sets.has[:, rank]
        self.inside[out, expert] = False
        self.sums[out] -= self.moments[expert]
        self.gains = None
        return rank

    def rank_experts(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(np.flatnonzero(column).tolist())  # on host
            for column in self.on.T
        )
