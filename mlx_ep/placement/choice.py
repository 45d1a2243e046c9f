"""Which replica serves an expert in a step: a pure function of the step's ids.

Every rank evaluates it alike, so no message is needed. In decode a rank's time follows
the number of DISTINCT experts it reads, in prefill the number of rows.

Let ``n(A)`` be the work that only ranks of the set A can do (experts all of whose
holders are in A). No choice gives every rank at most m unless ``n(A) <= m * |A|`` for
each A, and by Hall's theorem that is enough. So the least busiest rank is known before
anything is assigned, and a single pass that gives each expert to the first holder
which keeps all these inequalities is exact: it never has to take anything back.

    P = 2, experts 0 1 2 on rank 0, 3 on rank 1, 4 5 on both; ids 0 1 2 4 5
    n({0}) = 3, n({1}) = 0, n({0,1}) = 5   ->   m = max(3/1, 5/2) = 3
    4 -> rank 0?  n({0}) would be 4 > 3, so rank 1;  5 -> rank 1     loads 3 and 2

The 2^P sets are the lanes of one Python integer, so that one subtraction and one mask
test them all: 8 experts on 8 ranks take a few microseconds.

METRO (arXiv:2512.09277) has the objective, experts activated per rank, with a greedy
choice; the exact choice here is a bottleneck matching in that objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

import numpy as np
from jaxtyping import Int

MOST_LANE_RANKS = 8  # 2^P lanes; JACCL has at most 8 ranks
LANE_BITS = 16
# Up to so many tokens a step is decode: what counts is experts read, not rows.
DECODE_TOKENS = 64


class ReplicaChoice:
    """Chooses among the holders of experts, for one layer's placement.

    Args:
        holders: the ranks that hold each expert, ascending, at least one.
        num_ranks: P.
        speeds: of each rank, any unit; a rank twice as fast takes twice as many
            experts. None: all alike.

    Raises:
        ValueError: an expert without a holder, or speeds that are not P numbers above
            0.
    """

    def __init__(
        self,
        holders: Sequence[Sequence[int]],
        num_ranks: int,
        speeds: Sequence[float] | None = None,
    ) -> None:
        if not holders or not all(holders):
            raise ValueError("Every expert must have a rank that holds it.")
        if any(not 0 <= r < num_ranks for ranks in holders for r in ranks):
            raise ValueError(f"Holders must be ranks 0..{num_ranks - 1}.")
        if speeds is not None and (len(speeds) != num_ranks or min(speeds) <= 0):
            raise ValueError(
                f"speeds must be {num_ranks} numbers above 0; got {list(speeds)}."
            )
        self.num_ranks = num_ranks
        self.holders = tuple(tuple(sorted(set(ranks))) for ranks in holders)
        self.masks = [sum(1 << r for r in ranks) for ranks in self.holders]
        self.speeds = tuple(
            Fraction(s).limit_denominator(64) for s in speeds or [1.0] * num_ranks
        )

    def experts(self, expert_ids: Sequence[int]) -> dict[int, int]:
        """The rank that serves each distinct expert of a step.

        The busiest rank's number of distinct experts (over its speed) is the least
        that is possible. Up to 8 ranks the choice is, of all the best ones, the first
        in the order of experts with fewer holders, then of sets of holders, then of
        ids, lower ranks first; `mlx_ep.kernels.choose_replicas` makes the same one.

        Args:
            expert_ids: of all tokens, in any order, repeated or not; -1 is "none".
        """
        places = self._places
        distinct = [places[e] for e in set(expert_ids) if e >= 0]
        distinct.sort()
        if self.num_ranks > MOST_LANE_RANKS:
            return self._exchanged([self._order[place] for place in distinct])
        high, order, steps_of = self._high, self._order, self._steps
        level = self._first_levels[len(distinct)]
        need = sum([self._above[place] for place in distinct])
        slack = self._capacity(level) + high - need
        while slack & high != high:
            level += 1
            slack = self._capacity(level) + high - need
        chosen: dict[int, int] = {}
        steps: tuple[tuple[int, int], ...] = ()
        step = 0
        for place in distinct:
            if steps is not steps_of[place]:
                steps, step = steps_of[place], 0
            # A rank that could not take one of these holders' experts never can.
            rank, cut = steps[step]
            left = slack - cut
            while left & high != high:
                step += 1
                rank, cut = steps[step]
                left = slack - cut
            slack = left
            chosen[order[place]] = rank
        return chosen

    def rows(self, expert_ids: Int[np.ndarray, "T K"]) -> Int[np.ndarray, "T K"]:
        """The rank of each (token, k) pair where rows count, -1 for none.

        The rows of an expert may be divided among its holders. The busiest rank's rows
        (over its speed) are the least possible on up to 8 ranks; on more, each set of
        holders shares its rows among the holders that are least busy then. At most one
        expert of a set of holders is divided between two ranks, in the order of
        tokens.
        """
        flat = expert_ids.reshape(-1)
        counts = np.bincount(flat[flat >= 0], minlength=len(self.holders))
        quotas = self.row_quotas(counts)
        # Pairs sorted by expert; the first quota of an expert's rows goes to its first
        # holder, the next to its second, and so on.
        order = np.argsort(flat, kind="stable")[int((flat < 0).sum()) :]
        ranks = np.tile(np.arange(self.num_ranks), len(self.holders))
        served = np.full(flat.shape, -1, np.int32)
        served[order] = np.repeat(ranks, quotas.reshape(-1))
        return served.reshape(expert_ids.shape)

    def row_loads(self, counts: Int[np.ndarray, " E"]) -> Int[np.ndarray, " P"]:
        """Rows of each rank, where `rows` divides so many rows of each expert."""
        return self.row_quotas(counts).sum(axis=0)

    def row_quotas(self, counts: np.ndarray) -> np.ndarray:
        """``[E, P]``: rows of each expert on each rank."""
        num_ranks = self.num_ranks
        quotas = np.zeros((len(self.holders), num_ranks), np.int64)
        classes = self._classes
        totals = {mask: int(counts[experts].sum()) for mask, experts in classes.items()}
        divide = _divided if num_ranks <= MOST_LANE_RANKS else _poured
        loads = divide(totals, num_ranks, [float(s) for s in self.speeds])
        for mask, experts in classes.items():
            parts = [loads.get((mask, r), 0) for r in range(num_ranks)]
            # Both divide 0..total into runs: by expert and by rank. What they share.
            ends = np.cumsum(counts[experts])
            stops = np.cumsum(parts)
            high = np.minimum(ends[:, None], stops)
            low = np.maximum((ends - counts[experts])[:, None], stops - parts)
            quotas[experts] = np.maximum(high - low, 0)
        return quotas

    @cached_property
    def _classes(self) -> dict[int, np.ndarray]:
        """Experts by their set of holders, in the order of `_order`."""
        found: dict[int, list[int]] = {}
        for expert in self._order:
            found.setdefault(self.masks[expert], []).append(expert)
        return {mask: np.array(experts) for mask, experts in found.items()}

    @cached_property
    def classes(self) -> tuple[list[int], list[int], list[int]]:
        """The experts in the order in which they choose, in runs of the same holders.

        Returns:
            The experts, the holders of each run as bits, and where each run starts; the
            last is E.
        """
        masks = list(self._classes)
        sizes = [len(experts) for experts in self._classes.values()]
        return self._order, masks, [0, *accumulate(sizes)]

    @cached_property
    def _order(self) -> list[int]:
        """The experts in the order in which they choose."""
        return sorted(
            range(len(self.masks)),
            key=lambda e: (self.masks[e].bit_count(), self.masks[e], e),
        )

    @cached_property
    def _places(self) -> list[int]:
        """The place of each expert in `_order`."""
        places = [0] * len(self._order)
        for place, expert in enumerate(self._order):
            places[expert] = place
        return places

    # The lanes: lane A, of LANE_BITS bits, belongs to the set A of ranks.

    @cached_property
    def _high(self) -> int:
        """The highest bit of each lane: it stays set while the lane is 0 or more."""
        return _lanes(1 << (LANE_BITS - 1) for _ in range(1 << self.num_ranks))

    @cached_property
    def _above(self) -> list[int]:
        """Per place in `_order`: 1 in each lane A that has all holders in it."""
        sets = range(1 << self.num_ranks)
        lanes = {m: _lanes(int(m & a == m) for a in sets) for m in set(self.masks)}
        return [lanes[self.masks[expert]] for expert in self._order]

    @cached_property
    def _steps(self) -> list[tuple[tuple[int, int], ...]]:
        """Per place in `_order`: its holders r, each with the lanes that it takes from.

        Those are the sets A with r, but not all holders, in them: there an expert that
        r serves takes room which it need not have taken. Experts with the same holders
        have the same tuple.
        """
        sets = range(1 << self.num_ranks)
        steps = {
            m: tuple(
                (r, _lanes(int(a >> r & 1 and m & a != m) for a in sets))
                for r in range(self.num_ranks)
                if m >> r & 1
            )
            for m in set(self.masks)
        }
        return [steps[self.masks[expert]] for expert in self._order]

    @cached_property
    def _with_rank(self) -> list[int]:
        """Per rank: 1 in each lane A with that rank in it."""
        sets = range(1 << self.num_ranks)
        return [_lanes(a >> r & 1 for a in sets) for r in range(self.num_ranks)]

    @cached_property
    def levels(self) -> list[tuple[int, ...]]:
        """Experts that each rank reads at most, from nothing on, slowest growth first.

        Equal speeds: (0, 0), (1, 1), (2, 2), ... The first level that admits a step's
        experts is the least time.
        """
        times = sorted(
            {
                j / speed
                for speed in set(self.speeds)
                for j in range(len(self.holders) + 1)
            }
        )
        return [tuple(int(t * s) for s in self.speeds) for t in times]

    @cached_property
    def _level_totals(self) -> list[int]:
        return [sum(level) for level in self.levels]

    @cached_property
    def _capacities(self) -> list[int | None]:
        return [None] * len(self.levels)

    def _capacity(self, level: int) -> int:
        """Lane A: experts that the ranks of A read at most."""
        found = self._capacities[level]
        if found is None:
            found = sum(n * w for n, w in zip(self.levels[level], self._with_rank))
            self._capacities[level] = found
        return found

    @cached_property
    def _first_levels(self) -> list[int]:
        """The first level at which all ranks together read 0, 1, ... experts."""
        numbers = range(len(self.holders) + 1)
        return np.searchsorted(self._level_totals, numbers).tolist()  # on host

    def _exchanged(self, distinct: Sequence[int]) -> dict[int, int]:
        """Greedy, fewest holders first, then chains of exchanges while they help."""
        time = [Fraction(1) / s for s in self.speeds]
        loads = [0] * self.num_ranks
        served: list[set[int]] = [set() for _ in loads]
        for expert in distinct:
            rank = min(
                self.holders[expert], key=lambda r: ((loads[r] + 1) * time[r], r)
            )
            loads[rank] += 1
            served[rank].add(expert)
        while chain := self._chain(served, loads, time):
            for expert, source, target in chain:
                served[source].remove(expert)
                served[target].add(expert)
            loads[chain[0][1]] -= 1
            loads[chain[-1][2]] += 1
        return {e: rank for rank, experts in enumerate(served) for e in sorted(experts)}

    def _chain(
        self, served: list[set[int]], loads: list[int], time: list[Fraction]
    ) -> list[tuple[int, int, int]]:
        """Moves (expert, from, to) that take one from a busiest rank; [] if none can.

        The rank at the end stays below what the busiest one has now, so the busiest
        time or the number of ranks that have it falls: it ends. Where there is no
        chain, the ranks that were reached serve only experts that no other rank holds,
        and none of them can take one more: the time is the least.
        """
        busiest = max(range(len(loads)), key=lambda r: (loads[r] * time[r], -r))
        limit = loads[busiest] * time[busiest]
        came: dict[int, tuple[int, int]] = {}
        queue = [busiest]
        for source in queue:
            for expert in sorted(served[source]):
                for target in self.holders[expert]:
                    if target == busiest or target in came:
                        continue
                    came[target] = (expert, source)
                    if (loads[target] + 1) * time[target] < limit:
                        chain = []
                        while target != busiest:
                            expert, source = came[target]
                            chain.append((expert, source, target))
                            target = source
                        return chain[::-1]
                    queue.append(target)
        return []


def _lanes(values: Iterable[int]) -> int:
    return sum(value << (lane * LANE_BITS) for lane, value in enumerate(values))


def _divided(
    totals: dict[int, int], num_ranks: int, speeds: Sequence[float]
) -> dict[tuple[int, int], int]:
    """Rows of each set of holders on each of its ranks: the exact choice, in bulk."""
    sets = np.arange(1 << num_ranks)
    members = sets[:, None] >> np.arange(num_ranks) & 1
    need = np.zeros(len(sets), np.int64)
    for mask, rows in totals.items():
        need += rows * (mask & sets == mask)
    speed = np.array(speeds)  # on host
    time = float(np.max(need[1:] / (members[1:] @ speed)))
    while (
        slack := members @ np.floor(time * speed + 1e-9).astype(np.int64) - need
    ).min() < 0:
        time = float(np.min((np.floor(time * speed + 1e-9) + 1) / speed))
    loads = {}
    for mask, rows in totals.items():
        ranks = [r for r in range(num_ranks) if mask >> r & 1]
        for rank in ranks:
            cut = (sets >> rank & 1).astype(bool) & (mask & sets != mask)
            most = rows if rank == ranks[-1] else min(rows, int(slack[cut].min()))
            slack[cut] -= most
            rows -= most
            loads[mask, rank] = most
    return loads


def _poured(
    totals: dict[int, int], num_ranks: int, speeds: Sequence[float]
) -> dict[tuple[int, int], int]:
    """The same on many ranks: each set, smallest first, levels its ranks' times."""
    loads = {}
    busy = np.zeros(num_ranks)
    for mask, rows in totals.items():
        ranks = np.array([r for r in range(num_ranks) if mask >> r & 1])  # on host
        speed = np.array(speeds)[ranks]
        order = np.argsort(busy[ranks], kind="stable")
        filled, level = 1, 0.0
        for filled in range(1, len(ranks) + 1):
            first = order[:filled]
            level = (rows + (busy[ranks] * speed)[first].sum()) / speed[first].sum()
            if filled == len(ranks) or level <= busy[ranks[order[filled]]]:
                break
        share = np.zeros(len(ranks))
        first = order[:filled]
        share[first] = (level - busy[ranks[first]]) * speed[first]
        ends = np.rint(np.cumsum(share)).astype(np.int64)
        parts = np.diff(ends, prepend=0)
        parts[order[0]] += rows - ends[-1]
        busy[ranks] += parts / speed
        loads.update({(mask, int(r)): int(n) for r, n in zip(ranks, parts)})
    return loads
