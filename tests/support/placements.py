"""Random placements, for tests of what moves between them."""

from __future__ import annotations

import numpy as np

from mlx_ep import Placement


def random_placement(
    random: np.random.Generator, num_experts: int, num_ranks: int
) -> Placement:
    """Each expert on 1 to P ranks, slots in any order; ranks may hold none."""
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in range(num_experts):
        copies = int(random.integers(1, num_ranks + 1)) if random.random() < 0.4 else 1
        for rank in random.permutation(num_ranks)[:copies].tolist():
            held[rank].append(expert)
    return Placement(
        tuple(tuple(random.permutation(experts).tolist()) for experts in held)
    )
