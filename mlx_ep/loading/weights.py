"""A rank's part of a model: what it will be is known before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_ep.config import EPConfig
from mlx_ep.loading.caches import make_caches, run_shapes
from mlx_ep.loading.checkpoint import Checkpoint, TensorReader, read_config
from mlx_ep.loading.dummy import build_dummy, fill_dummy
from mlx_ep.loading.foreign import check_counts, check_dtypes, foreign_code
from mlx_ep.loading.hub.fetch import HubFetch, hub_fetch
from mlx_ep.loading.local import (
    Change,
    count_experts,
    load_local,
    model_class,
    outline,
)
from mlx_ep.loading.progress import watch_phase
from mlx_ep.loading.rank_tensors import load_bytes
from mlx_ep.loading.sizes import choose_placement, held_bytes, layer_copy_bytes
from mlx_ep.loading.stages import TRIED_TOKENS, model_stages
from mlx_ep.placement import Placement, check_stages


@dataclass(frozen=True)
class RankWeights:
    """A rank's part of a model, known but not read.

    Attributes:
        rank_bytes: what this rank will hold.
        build: makes the model with this rank's experts, evaluated, and says how many
            bytes it read. Its argument is done to the model before its dense part is
            evaluated; None: nothing.
        outline: makes the same model with nothing read and nothing evaluated.
        fetch: what of it has to come from the hub before `build`; None: nothing.
        files: of the weights; none for random ones.
        config: of the model's config.json, which is read once.
    """

    placement: Placement
    rank_bytes: int
    build: Callable[[Change | None], tuple[nn.Module, int]]
    outline: Callable[[], nn.Module]
    fetch: HubFetch | None = None
    files: tuple[Path, ...] = ()
    config: dict[str, Any] = field(default_factory=dict, repr=False)


def checkpoint_weights(
    path: Path,
    rank: int,
    num_ranks: int,
    config: EPConfig = EPConfig(),  # noqa: B008, it is frozen
) -> RankWeights:
    """The weights of a checkpoint folder that belong to `rank`.

    Raises:
        ValueError: the folder, its configuration or its files are not in order, or
            the configuration's placement is not possible.
    """
    described = read_config(path)
    model_class(described)
    members = check_stages(config.pp, num_ranks)
    checkpoint = Checkpoint.open(path, described)
    check_counts(described, checkpoint.tensors)
    num_experts = count_experts(checkpoint.config)
    whole = Placement.of_model(num_experts, 1)
    # First of all, as it says what a checkpoint without known experts lacks.
    load_bytes(checkpoint, whole, 0)
    in_stage = config if config.pp == 1 else replace(config, memory=None)
    placement = choose_placement(
        in_stage, num_experts, members, lambda: outline(checkpoint, whole, 0)
    )
    if config.pp > 1:
        stages = model_stages(outline(checkpoint, placement, 0), config, num_ranks)
        placement = replace(placement, stage=stages[rank // members])
        rank %= members
    if placement.parts is None:
        rank_bytes = load_bytes(checkpoint, placement, rank).rank_bytes
    else:
        rank_bytes = held_bytes(outline(checkpoint, placement, rank))
    made = outline(checkpoint, placement, rank)
    rank_bytes += layer_copy_bytes(made, placement, rank)
    check_dtypes(made, checkpoint.tensors)
    with foreign_code(f"{path}: its model cannot run"):
        run_shapes(made, TRIED_TOKENS, make_caches(made))

    def build(change: Change | None = None) -> tuple[nn.Module, int]:
        total = load_bytes(checkpoint, placement, rank).rank_bytes
        with (
            watch_phase("loading", total, rank) as advance,
            TensorReader(advance) as reader,
        ):
            model = load_local(checkpoint, placement, rank, reader, change)
            return model, reader.bytes_read

    return RankWeights(
        placement,
        rank_bytes,
        build,
        lambda: outline(checkpoint, placement, rank),
        hub_fetch(checkpoint, placement, rank),
        tuple(sorted({info.file for info in checkpoint.tensors.values()})),
        described,
    )


def dummy_weights(
    path: Path,
    rank: int,
    num_ranks: int,
    config: EPConfig = EPConfig(),  # noqa: B008, it is frozen
) -> RankWeights:
    """Random weights for the config.json of a folder.

    Raises:
        ValueError: the file is not that of a model with experts, or the
            configuration's placement is not possible.
    """
    description = read_config(path)
    model_class(description)
    members = check_stages(config.pp, num_ranks)
    check_counts(description)
    num_experts = count_experts(description)
    whole = Placement.of_model(num_experts, 1)
    in_stage = config if config.pp == 1 else replace(config, memory=None)
    placement = choose_placement(
        in_stage, num_experts, members, lambda: build_dummy(description, whole, 0)
    )
    if config.pp > 1:
        stages = model_stages(build_dummy(description, placement, 0), config, num_ranks)
        placement = replace(placement, stage=stages[rank // members])
        rank %= members
    model = build_dummy(description, placement, rank)

    def build(change: Change | None = None) -> tuple[nn.Module, int]:
        with watch_phase("making weights", held_bytes(model), rank) as advance:
            fill_dummy(model, placement, rank, change, advance)
        return model, 0

    rank_bytes = held_bytes(model) + layer_copy_bytes(model, placement, rank)
    return RankWeights(placement, rank_bytes, build, lambda: model, config=description)
