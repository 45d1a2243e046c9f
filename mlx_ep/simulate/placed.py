"""Experts where a placement has them, maybe with copies: whose rank computes what.

What is drawn are rows of each expert; `mlx_ep.placement.served_counts`, which is what
the package does with copies, says whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlx_ep.config import EPConfig
from mlx_ep.cost.expected import sampled_counts
from mlx_ep.placement import (
    LayerLoad,
    Placement,
    draw_steps,
    is_record,
    read_placement,
    read_record,
    served_counts,
    with_replicas,
)
from mlx_ep.simulate.model import ModelSizes
from mlx_ep.simulate.settings import EngineSettings

# Steps that are drawn for a number of tokens: all, or one of a few of each step.
DRAWN_STEPS, SAMPLED_STEPS = 512, 16
# Tokens that are drawn of a recorded layer; steps are then made of them.
POOL, RECORDED_STEPS, LEAST_STEPS = 256, 256, 4


class Loads(NamedTuple):
    """What each rank gets, in some layers or draws.

    Attributes:
        pairs: ``[X, P]`` (token, expert) pairs.
        distinct: ``[X, P]`` experts with at least one token.
    """

    pairs: np.ndarray
    distinct: np.ndarray


def placement_of(
    model: ModelSizes, settings: EngineSettings, num_ranks: int
) -> Placement | None:
    """The placement that an instance is told; None: contiguous.

    Raises:
        ValueError: what is wrong with the file or the memory for copies.
    """
    file, memory = settings.placement_file, settings.replica_memory
    if not file and memory == "0":
        return None
    num_replica_bytes = EPConfig(
        placement_file=file or None, replica_memory=memory
    ).replica_bytes
    if num_ranks == 1:
        raise ValueError(
            "a placement and replica memory are of experts on several ranks; ep_size "
            "is 1. Leave them out."
        )
    if num_replica_bytes is None:
        raise ValueError(
            "replica memory must be a number of GB here; auto takes what the KV blocks "
            "leave, and they leave nothing."
        )
    if file and not is_record(file):
        return read_placement(file, model.num_experts, num_ranks)
    load = LayerLoad.uniform(model.num_experts, model.top_k)
    if file:
        load = read_record(file, model.num_experts).whole_load()
    numbers = model.expert_weights // model.num_experts
    return with_replicas(
        Placement.contiguous(model.num_experts, num_ranks),
        round(numbers * (model.packed_bytes or settings.itemsize)),
        load,
        num_replica_bytes,
        None,
        is_recorded=bool(file),
    )


def most_slots(placement: Placement | None) -> int | None:
    """Experts of a layer on the rank that has most of them."""
    return None if placement is None else max(map(len, placement.rank_experts))


class PlacedRouting:
    """Every expert as likely as every other, on the ranks of a placement.

    Args:
        is_sampled: each step has a draw of its own.
        seed: of which draws those are.
    """

    def __init__(
        self,
        placement: Placement,
        top_k: int,
        is_sampled: bool = False,
        seed: int = 0,
    ) -> None:
        self.is_sampled = is_sampled
        self._placement, self._top_k, self._seed = placement, top_k, seed

    def loads(self, tokens: int) -> Loads:
        """Pairs and distinct experts ``[draws, P]``, see `ExpertRouting`."""
        counts = sampled_counts(self._placement.num_experts, self._top_k, tokens)
        counts = counts[:DRAWN_STEPS]
        if self.is_sampled:
            random = np.random.default_rng([self._seed, tokens])
            counts = counts[random.integers(len(counts), size=SAMPLED_STEPS)]
        return loads_of(self._placement, counts, tokens)


class DrawnRouting:
    """Tokens as layers were recorded, experts that occur together included.

    Args:
        layers: what was recorded of each.
    """

    is_sampled = False

    def __init__(self, layers: Sequence[LayerLoad], placement: Placement) -> None:
        self._placement = placement
        self._tokens = np.stack(
            [draw_steps(load, POOL, seed) for seed, load in enumerate(layers)]
        ).astype(np.float32)  # float32 for BLAS: whole numbers up to 2^24 are exact

    def loads(self, tokens: int) -> Loads:
        """Pairs and distinct experts ``[layers * draws, P]``, see `ExpertRouting`."""
        layers = len(self._tokens)
        draws = max(LEAST_STEPS, RECORDED_STEPS // layers)
        random = np.random.default_rng(tokens)
        chosen = random.multinomial(
            tokens, np.full(POOL, 1 / POOL), size=(layers, draws)
        )
        counts = np.rint(chosen.astype(np.float32) @ self._tokens).astype(np.int64)
        return loads_of(self._placement, counts.reshape(layers * draws, -1), tokens)


def loads_of(placement: Placement, counts: np.ndarray, tokens: int) -> Loads:
    """Pairs and distinct experts of each rank, of steps with these rows."""
    served = served_counts(placement, counts, tokens)
    return Loads(served.sum(axis=-1) * 1.0, (served > 0).sum(axis=-1) * 1.0)
