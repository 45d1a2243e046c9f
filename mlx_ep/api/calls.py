"""`load` and `parallelize`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ep.api.install import install_experts
from mlx_ep.api.prepared import check_placements, config_facts, prepare
from mlx_ep.comm import (
    Comm,
    GroupComm,
    agreed,
    gather_objects,
)
from mlx_ep.comm.symmetry import check_alike
from mlx_ep.config import EPConfig
from mlx_ep.loading import (
    Splitter,
    agree_attention,
    choose_placement,
    keep_part,
    with_memory,
)
from mlx_ep.models import (
    find_moe_sites,
    keep_experts,
    stack_experts,
    why_not_here,
)
from mlx_ep.moe import RebalanceRule
from mlx_ep.placement import Placement


def load(
    path_or_hf_repo: str,
    group: mx.distributed.Group | None = None,
    config: EPConfig = EPConfig(),  # noqa: B008, it is frozen
    *,
    tokenizer_config: dict[str, Any] | None = None,
    revision: str | None = None,
    dummy_weights: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer; every rank reads and holds its experts only.

    The model works with ``mlx_lm.generate.stream_generate`` and friends as it is, when
    every rank calls them alike: same prompt, same seed.

    Args:
        path_or_hf_repo: a model folder, a hub repository, or ``jargon-moe``.
        group: the ranks; default: ``mx.distributed.init()``.
        config: how the model is made expert-parallel.
        tokenizer_config: further arguments of the tokenizer.
        revision: a branch, tag or commit of a repository.
        dummy_weights: random weights for the architecture in config.json; the
            checkpoint is not looked at.

    Raises:
        ValueError: on every rank, with the same text, before a weight is read: what is
            wrong with the model, the checkpoint or the memory of any rank.
    """
    return prepare(
        path_or_hf_repo,
        GroupComm(group or mx.distributed.init()),
        config,
        tokenizer_config=tokenizer_config,
        revision=revision,
        dummy_weights=dummy_weights,
    ).load()


def parallelize(
    model: nn.Module,
    group: mx.distributed.Group | None = None,
    config: EPConfig = EPConfig(),  # noqa: B008, it is frozen
) -> nn.Module:
    """Make a loaded mlx-lm model expert-parallel, in place, and return it.

    Every rank must hold the same model; each keeps its own experts and frees the rest.

    Args:
        model: any mlx-lm model; a dense one stays whole on every rank, unless
            `config` splits its attention.
        group: the ranks; default: ``mx.distributed.init()``.
        config: how the model is made expert-parallel.

    Raises:
        ValueError: the model has experts that cannot be found, or is expert-parallel
            already, or the configuration's placement is not possible.
    """
    if hasattr(model, "expert_parallel"):
        raise ValueError(
            "The model is expert-parallel already; parallelize() takes a model as "
            "mlx_lm.load returns it."
        )
    if reason := why_not_here(type(model)):
        raise ValueError(reason)
    if config.pp > 1:
        raise ValueError(
            f"pp={config.pp} needs load(), which reads the layers of a stage only; "
            "parallelize() is given all of them. Use load(), or leave pp out."
        )
    comm = GroupComm(group or mx.distributed.init())
    check_alike(
        comm, config_facts(config), "All ranks must have the same configuration:"
    )
    RebalanceRule.of(config, comm.size)
    sites = find_moe_sites(stack_experts(model))
    num_experts = sites[0].num_experts if sites else 0
    placement = _agreed_placement(model, num_experts, comm, config)
    splitter = Splitter(agree_attention(model, comm, config), comm)
    part = placement.part(comm.rank)
    own = mx.array(placement.rank_experts[comm.rank], mx.int32)
    for site in sites:
        keep_experts(site, lambda parameter: mx.contiguous(parameter[own]))
        if part is not None:
            keep_part(site, part)
        # sync: one layer at a time, so that one layer at most is held twice.
        mx.eval(site.switch.parameters())
    splitter.evaluated(model)
    return install_experts(model, comm, placement, config, splitter)


def _agreed_placement(
    model: nn.Module, num_experts: int, comm: Comm, config: EPConfig
) -> Placement:
    """The placement of a model in memory, the same on all ranks.

    Raises:
        ValueError: on every rank, if any rank has a problem or another placement.
    """
    config = with_memory(config, comm)
    placement = agreed(
        comm, lambda: choose_placement(config, num_experts, comm.size, lambda: model)
    )
    check_placements(gather_objects(comm, placement.digest))
    return placement
