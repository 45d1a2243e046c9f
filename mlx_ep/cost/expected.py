"""How many rows visit an expert, and how unequal the ranks are. Pure."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from mlx_ep.placement import Placement, served_counts

DRAWN_TOKENS, LEAST_DRAWS, MOST_DRAWS = 16384, 8, 4096


@lru_cache(maxsize=128)
def sampled_counts(num_experts: int, top_k: int, tokens: int) -> np.ndarray:
    """How many of T tokens chose each expert: draws of uniform routing, alike always.

    Every token chooses K different experts, all choices equally likely. An average over
    the draws is the expected value to about a percent: 4096 draws for one token, fewer
    for more tokens, whose counts vary less.

    Returns:
        ``[draws, E]`` numbers; each row sums to T * K.
    """
    if tokens == 0:
        return np.zeros((1, num_experts), np.int64)
    draws = min(MOST_DRAWS, max(LEAST_DRAWS, DRAWN_TOKENS // tokens))
    random = np.random.default_rng(0)
    counts = np.zeros((draws, num_experts), np.int64)
    for first in range(0, tokens, part := max(1, (1 << 20) // (draws * num_experts))):
        keys = random.random(
            (draws, min(part, tokens - first), num_experts), np.float32
        )
        chosen = np.argpartition(keys, top_k - 1, axis=-1)[..., :top_k]
        flat = chosen.reshape(draws, -1) + np.arange(draws)[:, None] * num_experts
        found = np.bincount(flat.reshape(-1), minlength=counts.size)
        counts += found.reshape(counts.shape)
    return counts


def experts_of_ranks(num_experts: int, num_ranks: int) -> list[slice]:
    """Each rank's experts: contiguous, the first ranks have one more if uneven."""
    each, more = divmod(num_experts, num_ranks)
    bounds = [rank * each + min(rank, more) for rank in range(num_ranks + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


@lru_cache(maxsize=128)
def counts_of_ranks(
    num_experts: int,
    top_k: int,
    tokens: int,
    num_ranks: int,
    placement: Placement | None = None,
) -> np.ndarray:
    """`sampled_counts`, of each rank the rows that it computes.

    Args:
        placement: of experts on the ranks, maybe with copies; None: contiguous.

    Returns:
        ``[ranks, draws, E]`` numbers.
    """
    counts = sampled_counts(num_experts, top_k, tokens)
    if placement is None:
        held = experts_of_ranks(num_experts, num_ranks)
        placement = Placement(
            tuple(tuple(range(part.start, part.stop)) for part in held)
        )
    return served_counts(placement, counts, tokens).swapaxes(0, 1)


def expected_distinct(
    num_experts: int,
    top_k: int,
    tokens: int,
    num_ranks: int,
    placement: Placement | None = None,
) -> float:
    """Experts that the busiest rank uses, expected: E[max over ranks].

    >>> round(expected_distinct(256, 8, 1, 2), 1)
    5.1
    """
    counts = counts_of_ranks(num_experts, top_k, tokens, num_ranks, placement)
    return float((counts > 0).sum(axis=-1).max(axis=0).mean())


def expected_pairs(
    num_experts: int,
    top_k: int,
    tokens: int,
    num_ranks: int,
    placement: Placement | None = None,
) -> float:
    """(row, expert) pairs of the rank that has the most, expected."""
    counts = counts_of_ranks(num_experts, top_k, tokens, num_ranks, placement)
    return float(counts.sum(axis=-1).max(axis=0).mean())
