"""A few exchanges of a layer's slots that take most from the busiest rank. Pure.

The number of slots of each rank stays, and so does its memory. What is made small is
said in `replicas.py`; that the busiest rank's expected experts fall is then checked on
steps drawn as the load has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from mlx_ep.placement.layer_copies import RankSets
from mlx_ep.placement.load import LayerLoad, draw_steps, expected_busiest
from mlx_ep.placement.placement import Placement

MOST_EXCHANGES = 8  # of one layer at a time
LEAST_GAIN = 0.01  # of the busiest rank's expected experts
LEAST_PART = 1e-4  # of the sum of squares that one exchange has to take
DRAWN_STEPS = 500


class Improved(NamedTuple):
    """A layer's placement after a few exchanges.

    Attributes:
        before, after: the busiest rank's expected distinct experts of a step.
    """

    placement: Placement
    before: float
    after: float


def improve(
    placement: Placement,
    load: LayerLoad,
    *,
    speeds: Sequence[float] | None = None,
    most_exchanges: int = MOST_EXCHANGES,
    least_gain: float = LEAST_GAIN,
) -> Improved:
    """The same slots, some with another expert.

    An exchange lets two ranks swap an expert each, or puts another expert in the place
    of one that has copies elsewhere; the one that gains most goes first.

    Args:
        placement: of whole experts, on at most 8 ranks.
        load: of the layer, lately.
        speeds: of the ranks; None: all alike.

    Returns:
        The placement that was given, where all exchanges together lower the expected
        work of the busiest rank by less than `least_gain`.
    """
    layer = _Layer(placement, load, speeds or [1.0] * placement.num_ranks)
    while layer.num_exchanges < most_exchanges and layer.exchange():
        pass
    steps = draw_steps(load, DRAWN_STEPS)
    before = expected_busiest(placement.rank_experts, steps, speeds)
    if not layer.num_exchanges:
        return Improved(placement, before, before)
    made = Placement(tuple(map(tuple, layer.rank_experts)))
    after = expected_busiest(made.rank_experts, steps, speeds)
    if after > before * (1 - least_gain):
        return Improved(placement, before, before)
    return Improved(made, before, after)


class _Layer:
    """One layer's slots while they are exchanged."""

    def __init__(
        self, placement: Placement, load: LayerLoad, speeds: Sequence[float]
    ) -> None:
        self.rank_experts = [list(experts) for experts in placement.rank_experts]
        self.num_exchanges = 0
        sets = RankSets(speeds)
        self._moments, self._weight = load.moments("activated"), sets.weight
        ranks = range(placement.num_ranks)
        # What set A of ranks is not, as bits.
        self._outside = (~sets.has).astype(np.int64) @ (1 << np.array(ranks))
        self._masks = np.zeros(placement.num_experts, np.int64)
        for rank, experts in enumerate(self.rank_experts):
            self._masks[experts] |= 1 << rank

    def _inside(self, masks: np.ndarray) -> np.ndarray:
        """``[A, E]``: whether set A has all holders of e."""
        return (self._outside[:, None] & masks == 0).astype(np.float64)

    def exchange(self) -> bool:
        """Make the best exchange; whether there is one that gains."""
        inside = self._inside(self._masks)
        sums = inside @ self._moments
        weight = self._weight[:, None]
        total = float((self._weight * (sums * inside).sum(1)).sum())
        diagonal = np.diag(self._moments)

        def alone(change: np.ndarray) -> np.ndarray:
            """What an expert's change adds by itself."""
            return (weight * (2 * change * sums + change**2 * diagonal)).sum(0)

        def both(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            """What two experts' changes add: ``[E, E]``."""
            cross = 2 * ((weight * first).T @ second) * self._moments
            return alone(first)[:, None] + alone(second) + cross

        best = -LEAST_PART * total, (-1, -1, -1, -1)
        ranks, masks = range(len(self.rank_experts)), self._masks
        for rank in ranks:
            bit = 1 << rank
            has = masks & bit > 0
            # e leaves the rank, where others have it; f comes.
            leaves = has & (masks != bit)
            added = both(
                self._inside(masks & ~bit) - inside, self._inside(masks | bit) - inside
            )
            added[~leaves] = np.inf
            added[:, has] = np.inf
            best = _lower(best, added, rank, rank)
        for rank, other in combinations(ranks, 2):
            bit, there = 1 << rank, 1 << other
            gives = (masks & bit > 0) & (masks & there == 0)
            takes = (masks & there > 0) & (masks & bit == 0)
            added = both(
                self._inside(masks & ~bit | there) - inside,
                self._inside(masks & ~there | bit) - inside,
            )
            added[~gives] = np.inf
            added[:, ~takes] = np.inf
            best = _lower(best, added, rank, other)
        _, (rank, other, first, second) = best
        if rank < 0:
            return False
        self._put(rank, first, second)
        if other != rank:
            self._put(other, second, first)
        self.num_exchanges += 1
        return True

    def _put(self, rank: int, old: int, new: int) -> None:
        """Another expert in a slot of a rank."""
        held = self.rank_experts[rank]
        held[held.index(old)] = new
        self._masks[old] &= ~(1 << rank)
        self._masks[new] |= 1 << rank


_Best = tuple[float, tuple[int, int, int, int]]


def _lower(best: _Best, added: np.ndarray, rank: int, other: int) -> _Best:
    """The exchange that adds least, the one found first on a tie."""
    at = int(added.argmin())
    value = float(added.flat[at])
    if value >= best[0] - 1e-12:
        return best
    return value, (rank, other, at // added.shape[1], at % added.shape[1])
