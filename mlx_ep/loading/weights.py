"""A rank's part of a model: what it will be is known before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from mlx_ep.loading.checkpoint import Checkpoint, TensorReader, read_config
from mlx_ep.loading.dummy import build_dummy, fill_dummy, held_bytes
from mlx_ep.loading.local import count_experts, load_local, model_class
from mlx_ep.loading.plan import plan_load
from mlx_ep.placement import Placement


@dataclass(frozen=True)
class Weights:
    """A rank's part of a model, known but not read.

    Attributes:
        rank_bytes: what this rank will hold.
        build: makes the model with this rank's experts, evaluated, and says how many
            bytes it read.
    """

    placement: Placement
    rank_bytes: int
    build: Callable[[], tuple[nn.Module, int]]


def checkpoint_weights(path: Path, rank: int, num_ranks: int) -> Weights:
    """The weights of a checkpoint folder that belong to `rank`.

    Raises:
        ValueError: the folder, its configuration or its files are not in order.
    """
    model_class(read_config(path))
    checkpoint = Checkpoint.open(path)
    placement = Placement.contiguous(count_experts(checkpoint.config), num_ranks)
    plan = plan_load(checkpoint, placement, rank)

    def build() -> tuple[nn.Module, int]:
        with TensorReader() as reader:
            model = load_local(checkpoint, placement, rank, reader)
            return model, reader.bytes_read

    return Weights(placement, plan.rank_bytes, build)


def dummy_weights(path: Path, rank: int, num_ranks: int) -> Weights:
    """Random weights for the config.json of a folder.

    Raises:
        ValueError: the configuration is not that of a model with experts.
    """
    config = read_config(path)
    model_class(config)
    placement = Placement.contiguous(count_experts(config), num_ranks)
    model = build_dummy(config, placement, rank)

    def build() -> tuple[nn.Module, int]:
        fill_dummy(model, placement, rank)
        return model, 0

    return Weights(placement, held_bytes(model), build)
