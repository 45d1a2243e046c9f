"""Which copies serve a step's experts, where rows take time beside the experts read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mlx_ep.placement.choice import ReplicaChoice


def level_rows(choice: ReplicaChoice, counts: Mapping[int, int]) -> dict[int, int]:
    """As `ReplicaChoice.experts`, the busiest rank's experts as few, its rows levelled.

    The rank with most rows and another one exchange two experts that both hold, or it
    gives one away where the other may read one more; of these the exchange that leaves
    the busier of the two least. Again, until nothing lowers the busiest rank's rows.

    Args:
        choice: of one layer's placement.
        counts: rows of each expert of the step, at least 1.
    """
    chosen = choice.experts(list(counts))
    if max(counts.values(), default=0) <= 1:
        return chosen
    time = [1 / float(speed) for speed in choice.speeds]
    loads, reads = [0] * choice.num_ranks, [0] * choice.num_ranks
    for expert, rank in chosen.items():
        loads[rank] += counts[expert]
        reads[rank] += 1
    most_time = max(n * t for n, t in zip(reads, time))
    while True:
        # Stable: among equally busy ranks the lowest is first.
        ranks = sorted(range(len(time)), key=lambda r: loads[r] * time[r])
        busiest = max(ranks, key=lambda r: loads[r] * time[r])
        for target in ranks:
            if (loads[target] + 1) * time[target] >= loads[busiest] * time[busiest]:
                continue  # itself, or one row more would be no gain
            may_read = (reads[target] + 1) * time[target] <= most_time
            given = _by_rows(choice, counts, chosen, busiest, target)
            taken = _by_rows(choice, counts, chosen, target, busiest)
            ends = _Ends(loads[busiest], loads[target], time[busiest], time[target])
            found = ends.best(given, {0: -1, **taken} if may_read else taken)
            if found is None:
                continue
            rows, back = found
            chosen[given[rows]] = target
            if back:
                chosen[taken[back]] = busiest
            else:
                reads[busiest] -= 1
                reads[target] += 1
            loads[busiest] -= rows - back
            loads[target] += rows - back
            break
        else:
            return chosen


def _by_rows(
    choice: ReplicaChoice,
    counts: Mapping[int, int],
    chosen: Mapping[int, int],
    source: int,
    target: int,
) -> dict[int, int]:
    """An expert of each number of rows that `source` serves and `target` holds."""
    both = 1 << source | 1 << target
    masks = choice.masks
    return {
        counts[expert]: expert
        for expert, rank in chosen.items()
        if rank == source and masks[expert] & both == both
    }


class _Ends(NamedTuple):
    """The rows of two ranks, the busiest one first, and what a row takes on each."""

    busiest: int
    target: int
    busiest_time: float
    target_time: float

    def best(
        self, given: Mapping[int, int], taken: Mapping[int, int]
    ) -> tuple[int, int] | None:
        """The rows given and taken that leave the busier of both least; None: none.

        Args:
            given: of the busiest, by rows.
            taken: of the target, likewise.
        """
        least, found = self.busiest * self.busiest_time, None
        for rows in given:
            for back in taken:
                left = (self.busiest - rows + back) * self.busiest_time
                then = (self.target + rows - back) * self.target_time
                if (busier := max(left, then)) < least:
                    least, found = busier, (rows, back)
        return found
