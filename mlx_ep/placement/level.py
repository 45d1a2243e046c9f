"""Which copies serve a step's experts, where rows take time beside the experts read."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mlx_ep.placement.choice import ReplicaChoice


def level_rows(choice: ReplicaChoice, counts: Mapping[int, int]) -> dict[int, int]:
    """As `ReplicaChoice.experts`, as many experts on each rank, and rows levelled too.

    Which experts of a set of holders go to which of them does not change how many a
    rank reads. Here the one with most rows goes first, to the rank that has fewest
    rows; where that does not lower the busiest rank's rows, it is the same choice.

    Args:
        choice: of one layer's placement.
        counts: rows of each expert of the step, at least 1.
    """
    used = sorted(counts)
    chosen = choice.experts(used)
    rows = {expert: counts[expert] for expert in used}
    if max(rows.values(), default=0) <= 1:
        return chosen
    time = [1 / float(speed) for speed in choice.speeds]
    before, after = [0.0] * choice.num_ranks, [0.0] * choice.num_ranks
    classes: dict[int, list[int]] = {}
    for expert, rank in chosen.items():
        before[rank] += rows[expert] * time[rank]
        classes.setdefault(choice.masks[expert], []).append(expert)
    levelled: dict[int, int] = {}
    for experts in classes.values():
        left = [0] * choice.num_ranks
        for expert in experts:
            left[chosen[expert]] += 1
        # Equal rows stay in the order of ids.
        for expert in sorted(experts, key=rows.__getitem__, reverse=True):
            own, least, taker = rows[expert], math.inf, 0
            for rank in choice.holders[expert]:
                if left[rank] and (busy := after[rank] + own * time[rank]) < least:
                    least, taker = busy, rank
            after[taker] = least
            left[taker] -= 1
            levelled[expert] = taker
    return levelled if max(after) < max(before) else chosen
