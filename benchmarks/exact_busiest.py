"""The busiest rank's expected distinct experts at T=1, exactly, for uniform routing.

K of E experts are drawn, each set of K as likely as any other. What counts of a
placement is how many experts have each set of ranks as holders: the draws per set are
multivariate hypergeometric, and by Hall's theorem the busiest rank reads the largest of
``n(A) / |A|``, rounded up, over the sets A of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from math import comb

import numpy as np


@cache
def _draws(num_sets: int, top_k: int) -> np.ndarray:
    """All ways to draw K experts from so many sets of holders: ``[ways, sets]``."""
    places = combinations(range(top_k + num_sets - 1), num_sets - 1)
    bars = np.array(list(places), np.int64)
    first = np.full((len(bars), 1), -1)
    last = np.full((len(bars), 1), top_k + num_sets - 1)
    return np.diff(np.concatenate([first, bars, last], axis=1), axis=1) - 1


def exact_busiest(
    rank_experts: Sequence[Sequence[int]], num_experts: int, top_k: int
) -> float:
    """The expectation for a placement on a few ranks (4, K = 8: 0.3 million draws)."""
    masks = [0] * num_experts
    for rank, experts in enumerate(rank_experts):
        for expert in experts:
            masks[expert] |= 1 << rank
    present = sorted(set(masks))
    draws = _draws(len(present), top_k)
    busiest = np.zeros(len(draws), np.int64)
    for ranks in range(1, 1 << len(rank_experts)):
        inside = [i for i, mask in enumerate(present) if mask & ~ranks == 0]
        if inside:
            of_set = -(-draws[:, inside].sum(1) // ranks.bit_count())
            busiest = np.maximum(busiest, of_set)
    ways = np.ones(len(draws))
    for column, mask in enumerate(present):
        size = masks.count(mask)
        of_count = [float(comb(size, n)) for n in range(top_k + 1)]
        ways *= np.array(of_count)[draws[:, column]]
    return float((ways * busiest).sum() / comb(num_experts, top_k))
