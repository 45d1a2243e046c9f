"""Routings that an exchange has to get right: tokens per rank, experts per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """The routing of all ranks.

    Attributes:
        name: what is special about it.
        expert_ids: per rank, [T, K].
        gates: per rank, [T, K].
    """

    name: str
    expert_ids: list[np.ndarray]
    gates: list[np.ndarray]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(len(ids) for ids in self.expert_ids)


def make_case(name: str, expert_ids: list[np.ndarray], seed: int = 0) -> Case:
    random = np.random.default_rng(seed)
    gates = [random.random(ids.shape).astype(np.float32) for ids in expert_ids]
    return Case(name, [ids.astype(np.int32) for ids in expert_ids], gates)


def routing_cases(num_ranks: int, num_experts: int, top_k: int) -> list[Case]:
    """One case for everything that has ever been a special case somewhere."""
    random = np.random.default_rng(100 * num_ranks + top_k)
    ranks = range(num_ranks)

    def distinct(num_tokens: int) -> np.ndarray:
        order = np.argsort(random.random((num_tokens, num_experts)), axis=1)
        return order[:, :top_k]

    def any_of(low: int, high: int, num_tokens: int) -> np.ndarray:
        return random.integers(low, high, (num_tokens, top_k))

    first_share = -(-num_experts // num_ranks)  # experts of rank 0, contiguous
    last = num_experts - 1
    return [
        make_case("distinct", [distinct(6) for _ in ranks], 1),
        make_case("one token", [distinct(1) for _ in ranks], 2),
        make_case("uneven T", [distinct(3 * r + 1) for r in ranks], 3),
        make_case("no tokens on rank 0", [distinct(4 * (r > 0)) for r in ranks], 4),
        make_case("tokens on rank 0 only", [distinct(5 * (r == 0)) for r in ranks], 5),
        make_case("no tokens at all", [distinct(0) for _ in ranks], 6),
        make_case("duplicates", [any_of(0, 2, 5) for _ in ranks], 7),
        make_case("the same expert K times", [any_of(last, last + 1, 3)] * num_ranks),
        make_case("all to rank 0", [any_of(0, first_share, 5) for _ in ranks], 9),
        make_case("all to the last rank", [any_of(last, last + 1, 4) for _ in ranks]),
        make_case("some without expert", [any_of(-1, num_experts, 7) for _ in ranks]),
        make_case("no expert at all", [any_of(-1, 0, 3) for _ in ranks], 12),
        make_case(
            "one token has no expert",
            [np.vstack([distinct(2), any_of(-1, 0, 1)]) for _ in ranks],
            13,
        ),
        make_case("each to the next rank", [_next(r, num_ranks, 4) for r in ranks]),
    ]


def _next(rank: int, num_ranks: int, num_tokens: int) -> np.ndarray:
    """Experts 0..E-1 lie on the ranks in turn in `spread_placement`; top_k is 3."""
    return np.full((num_tokens, 3), (rank + 1) % num_ranks)


def random_case(random: np.random.Generator, num_ranks: int, num_experts: int) -> Case:
    """Any of them, for fuzzing."""
    top_k = int(random.integers(1, 5))
    most = int(random.choice([1, 3, 9]))
    shape = str(random.choice(["even", "uneven", "some none"]))
    even = int(random.integers(0, most + 1))
    ids = []
    for _ in range(num_ranks):
        num_tokens = even if shape == "even" else int(random.integers(0, most + 1))
        if shape == "some none" and random.random() < 0.5:
            num_tokens = 0
        low = int(random.integers(-1, num_experts))
        high = int(random.integers(low + 1, num_experts + 1))
        ids.append(random.integers(low, high, (num_tokens, top_k)))
    return make_case(shape, ids, int(random.integers(1 << 31)))
