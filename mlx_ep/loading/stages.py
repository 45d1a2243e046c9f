"""Which layers of a model each stage of a pipeline holds: for loading and for plans."""

from __future__ import annotations

import mlx.nn as nn

from mlx_ep.config import EPConfig
from mlx_ep.loading.caches import make_caches, run_shapes
from mlx_ep.loading.sizes import held_bytes
from mlx_ep.models import check_hidden_states, layer_list
from mlx_ep.placement import StageLayers, cut_stages

TRIED_TOKENS = 8  # of a forward pass without numbers


def model_stages(
    model: nn.Module, config: EPConfig, num_ranks: int
) -> list[StageLayers]:
    """The layers of each stage, by the bytes that a rank would hold of each.

    Args:
        model: all layers, with the experts of the first rank of a stage.
        config: its `pp`, and its `memory`: a stage has the room of its smallest rank.

    Raises:
        ValueError: the model cannot be cut into so many stages, or into stages that
            the ranks have room for.
    """
    path, layers = layer_list(model)
    check_hidden_states(
        model, lambda: run_shapes(model, TRIED_TOKENS, make_caches(model))
    )
    sizes = [held_bytes(layer) for layer in layers]
    shared = held_bytes(model) - sum(sizes)
    room = _room(config, num_ranks, shared)
    stages = cut_stages(sizes, config.pp, room)
    for index, held in enumerate(stages if room else ()):
        if (needed := sum(sizes[held.start : held.stop])) > room[index]:
            raise ValueError(
                f"--pp {config.pp} with this --memory leaves no room: a rank of stage "
                f"{index} would hold {(shared + needed) / 1e9:g} GB, and may hold "
                f"{(shared + room[index]) / 1e9:g} GB. Give more memory or more ranks."
            )
    name = path.rpartition(".")[2]
    return [StageLayers(each.start, each.stop, len(layers), name) for each in stages]


def _room(config: EPConfig, num_ranks: int, shared: int) -> list[int]:
    """Bytes for layers on the smallest rank of each stage; empty without `memory`.

    Args:
        shared: bytes of what every rank holds, the embedding, last norm and head.
    """
    if config.memory is None:
        return []
    if len(config.memory) != num_ranks:
        raise ValueError(
            f"memory must have one number for each of the {num_ranks} ranks; got "
            f"{len(config.memory)}."
        )
    members = num_ranks // config.pp
    room = [
        int(min(config.memory[first : first + members]) * 1e9) - shared
        for first in range(0, num_ranks, members)
    ]
    if min(room) <= 0:
        raise ValueError(
            f"--memory must be more than {shared / 1e9:g} GB on every rank, which the "
            f"embedding and the head take; got {min(config.memory):g} GB."
        )
    return room
