"""The sizes of a model, from its shapes: nothing is read or evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import lcm, prod

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ep.config import EPConfig, settings
from mlx_ep.loading.caches import PREFILL_STEP, cache_bytes
from mlx_ep.loading.local import refuse_dense
from mlx_ep.loading.widths import named_projections, width_problem
from mlx_ep.loading.working import switch_input, working_memory
from mlx_ep.metrics import format_bytes
from mlx_ep.models import find_moe_sites
from mlx_ep.placement import (
    ExpertSizes,
    LayerLoad,
    Placement,
    check_everywhere,
    everywhere,
    is_record,
    place,
    read_placement,
    read_record,
    with_replicas,
)

# What a config.json calls the dtype of what is not quantized.
DTYPES = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
}
_INPUT_NAMES = ("down_proj", "fc2")


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters; known without evaluating them."""
    return sum(p.nbytes for p in dict(tree_flatten(model.parameters())).values())


def experts_bytes(model: nn.Module) -> int:
    """Those of them that belong to routed experts."""
    sites = find_moe_sites(model)
    return sum(held_bytes(p) for site in sites for p in site.projections)


def layer_expert_bytes(model: nn.Module) -> list[int]:
    """Of one expert of each MoE layer; the model may have any number of them and be
    lazy.
    """
    found = []
    for site in find_moe_sites(model):
        parameters = [
            parameter
            for projection in site.projections
            for parameter in dict(tree_flatten(projection.parameters())).values()
        ]
        found.append(sum(prod(p.shape[1:]) * p.dtype.size for p in parameters))
    return found


def layer_copy_bytes(model: nn.Module, placement: Placement, rank: int) -> int:
    """Of copies that a rank gets after its model was read, by `Placement.layers`."""
    if not placement.layers:
        return 0
    read = placement.num_slots(rank)
    sizes = layer_expert_bytes(model)
    return sum(
        (layer.num_slots(rank) - read) * size
        for layer, size in zip(placement.layers, sizes, strict=True)
    )


def expert_sizes(model: nn.Module) -> ExpertSizes:
    """What of a model there is to divide among ranks.

    Args:
        model: with all experts, quantized as it will run; it may be lazy.
    """
    sites = find_moe_sites(model)
    all_bytes = experts_bytes(model)
    takers = [
        projection
        for site in sites
        for name, projection in named_projections(site)
        if name in _INPUT_NAMES
    ]
    return ExpertSizes(
        num_experts=sites[0].num_experts,
        expert_bytes=-(-all_bytes // sites[0].num_experts),
        dense_bytes=held_bytes(model) - all_bytes,
        widths=tuple(sorted({projection.input_dims for projection in takers})),
        unit=lcm(*(getattr(projection, "group_size", 1) for projection in takers)),
    )


def choose_placement(
    config: EPConfig,
    num_experts: int,
    num_ranks: int,
    outline: Callable[[], nn.Module],
    must_fit: bool = True,
) -> Placement:
    """See `_placement`; and strategy local has what it needs.

    Raises:
        ValueError: the configuration is not possible for this model and these ranks.
    """
    placement = _placement(config, num_experts, num_ranks, outline, must_fit)
    if config.strategy == "local":
        check_everywhere(placement)
    return placement


def _placement(
    config: EPConfig,
    num_experts: int,
    num_ranks: int,
    outline: Callable[[], nn.Module],
    must_fit: bool,
) -> Placement:
    """The placement that a configuration asks for; alike where its inputs are alike.

    Args:
        config: its `memory`, `replica_memory`, `context`, `placement_file`, `ep_size`.
        num_experts: E.
        num_ranks: P.
        outline: makes the model with all experts, without numbers; only asked for
            where sizes matter.
        must_fit: whether too little `memory` is an error.

    Raises:
        ValueError: as `choose_placement`.
    """
    if num_experts == 0:
        _refuse_placing(config)
        return Placement.of_model(0, num_ranks)
    record = None
    if config.placement_file is not None and is_record(config.placement_file):
        record = read_record(config.placement_file, num_experts)
    elif config.placement_file is not None:
        placement = read_placement(config.placement_file, num_experts, num_ranks)
        if placement.layers:
            num_layers = len(find_moe_sites(outline()))
            _check_layers(config.placement_file, len(placement.layers), num_layers)
        return placement
    if config.replica_memory == "all" and config.memory is None:
        return everywhere(num_experts, num_ranks)
    is_parted = config.ep_size not in (None, num_ranks)
    if is_parted and (config.strategy, config.reduction) != (
        "replicated",
        "partial_sum",
    ):
        raise ValueError(
            f"--ep {config.ep_size} on {num_ranks} ranks shares the width of experts, "
            "whose parts only the sum of strategy replicated with reduction "
            f"partial_sum adds up; got strategy {config.strategy} and reduction "
            f"{config.reduction}. Leave --ep out, or use those."
        )
    has_replicas = config.replica_bytes != 0
    is_plain = config.memory is None and not is_parted
    if is_plain and not has_replicas and record is None:
        return Placement.contiguous(num_experts, num_ranks)
    model = outline()
    if is_parted and (problem := width_problem(model)):
        raise ValueError(
            f"--ep {config.ep_size} cannot share the width of this model's experts: "
            f"{problem}. Leave --ep out."
        )
    sizes, memory, reserved = expert_sizes(model), None, 0
    if config.memory is not None:
        memory = [int(gigabytes * 1e9) for gigabytes in config.memory]
    if (config.memory is not None or has_replicas) and config.context:
        working = working_memory(model, min(config.context, PREFILL_STEP))
        reserved = cache_bytes(model, config.context) + working.fixed
        # Rows of an expert come with the expert.
        each = working.of(1, num_experts) - working.fixed
        sizes = replace(sizes, expert_bytes=sizes.expert_bytes + each)
    fits_whole = memory is None or min(memory) >= (
        sizes.dense_bytes + reserved + sizes.expert_bytes * num_experts
    )
    if config.replica_memory == "all":
        if not fits_whole and must_fit:
            raise ValueError(_too_much(sizes, min(memory or [0]), reserved))
        return everywhere(num_experts, num_ranks)
    if config.replica_bytes is None and memory is None:
        raise ValueError(
            "--replica-memory auto fills what the ranks have left: say with --memory "
            "how many GB each may hold."
        )
    is_apart = config.strategy in ("auto", "local")  # nothing to send, if all fits
    if config.replica_memory == "auto" and is_apart and fits_whole:
        return everywhere(num_experts, num_ranks)
    if has_replicas or record is not None:
        base = place(
            sizes,
            num_ranks,
            memory=memory,
            reserved_bytes=reserved,
            must_fit=must_fit,
        )
        taken = sizes.dense_bytes + reserved
        free = None if memory is None else [max(n - taken, 0) for n in memory]
        per_token = switch_input(model).top_k
        loads, of_layers = [LayerLoad.uniform(num_experts, per_token)], [0]
        if record is not None:
            loads, of_layers = record.loads(), layer_expert_bytes(model)
            _check_layers(config.placement_file, len(loads), len(of_layers))
        # The working memory of an expert is part of its size too.
        beside = -(-(sizes.expert_bytes - sum(of_layers)) // len(of_layers))
        return with_replicas(
            base,
            [num_bytes + beside for num_bytes in of_layers],
            loads,
            config.replica_bytes,
            free,
            whole_load=record and record.whole_load(),
        )
    return place(
        sizes,
        num_ranks,
        ep_size=config.ep_size,
        memory=memory,
        reserved_bytes=reserved,
        must_fit=must_fit,
    )


def _too_much(sizes: ExpertSizes, memory: int, reserved: int) -> str:
    whole = sizes.expert_bytes * sizes.num_experts
    return (
        f"--replica-memory all needs {format_bytes(whole + sizes.dense_bytes)} of "
        f"weights on every rank, beside {format_bytes(reserved)} for --context; one "
        f"may hold {format_bytes(memory)}. Give a smaller --replica-memory."
    )


# Settings that say where experts are.
_PLACING = (
    "placement_file", "memory", "replica_memory", "ep_size", "rebalance_every",
    "rebalance_below",
)  # fmt: skip


def _refuse_placing(config: EPConfig) -> None:
    """Raises:
    ValueError: the configuration places experts, and there are none.
    """
    for each in settings():
        if each.name in _PLACING and getattr(config, each.name) != each.default:
            refuse_dense(0, each.flag_name)


def _check_layers(file: str | None, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"{file} must be for the model's {expected} MoE layers; it has {found}."
        )
