"""Where all parts meet: a model becomes expert-parallel."""

from __future__ import annotations

import platform
import socket
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import StrictDataclassError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_ep import loading
from mlx_ep.comm import Comm, GroupComm, gather_objects
from mlx_ep.config import EPConfig
from mlx_ep.exchange import STRATEGIES
from mlx_ep.loading import (
    EMBEDDED_MODEL,
    MemoryNeed,
    Weights,
    checkpoint_weights,
    find_model,
    has_tokenizer,
    held_bytes,
    memory_limit,
    memory_problems,
    read_config,
)
from mlx_ep.metrics import Counters, RankReport, peak_resident_bytes
from mlx_ep.models import find_moe_sites, install, keep_experts, verify_blocks
from mlx_ep.models.blocks import BlockState
from mlx_ep.moe import ExpertGroup
from mlx_ep.placement import Placement
from mlx_ep.policy import Layer, ModelPolicy, Wish, tune


@dataclass
class ExpertParallel:
    """What an expert-parallel model says of itself, as ``model.expert_parallel``.

    Attributes:
        group: the ranks, the placement, and the counters of this rank.
        blocks: the MoE layers.
        policy: what runs the experts, by shape and number of rows; ``policy.explain()``
            prints every option with its times.
        reports: of every rank, in rank order; empty for a model that was already in
            memory.
    """

    group: ExpertGroup
    blocks: list[BlockState]
    policy: ModelPolicy | None = None
    reports: list[RankReport] = field(default_factory=list)

    @property
    def counters(self) -> Counters:
        return self.group.counters

    @property
    def per_slot_reasons(self) -> list[str]:
        """Why MoE layers exchange K outputs per token instead of their sum."""
        return sorted({b.why_per_slot for b in self.blocks if b.probe is None})


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
        model: any mlx-lm model with routed experts.
        group: the ranks; default: ``mx.distributed.init()``.
        config: how the model is made expert-parallel.

    Raises:
        ValueError: the model has no routed experts, or is expert-parallel already.
    """
    if hasattr(model, "expert_parallel"):
        raise ValueError(
            "The model is expert-parallel already; parallelize() takes a model as "
            "mlx_lm.load returns it."
        )
    comm = GroupComm(group or mx.distributed.init())
    sites = find_moe_sites(model)
    placement = Placement.contiguous(sites[0].num_experts, comm.size)
    own = mx.array(placement.rank_experts[comm.rank], mx.int32)
    for site in sites:
        keep_experts(site, lambda parameter: mx.contiguous(parameter[own]))
        # sync: one layer at a time, so that one layer at most is held twice.
        mx.eval(site.switch.parameters())
    return _install(model, comm, placement, config)


def prepare(
    path_or_hf_repo: str,
    comm: Comm,
    config: EPConfig,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    revision: str | None = None,
    dummy_weights: bool = False,
) -> PreparedModel:
    """Check on all ranks that a model can be loaded; no weight is read.

    Raises:
        ValueError: as `load`.
    """
    prepared, problem = None, ""
    try:
        STRATEGIES.create(config)
        path = find_model(path_or_hf_repo, revision, with_weights=not dummy_weights)
        weights_of = loading.dummy_weights if dummy_weights else checkpoint_weights
        weights = weights_of(path, comm.rank, comm.size)
        tokenizer = _load_tokenizer(path, dummy_weights, tokenizer_config or {})
        prepared = PreparedModel(comm, config, weights, tokenizer)
    except ValueError as error:
        problem = str(error)
    need = MemoryNeed(
        host=socket.gethostname(),
        num_bytes=prepared.weights.rank_bytes if prepared else 0,
        limit=memory_limit(config.memory_limit_gb),
    )
    problems, needs = zip(*gather_objects(comm, [problem, need]), strict=True)
    _raise_problems(problems)
    _raise_problems(
        memory_problems(
            [MemoryNeed(*need) for need in needs], config.memory_limit_gb is not None
        )
    )
    assert prepared is not None
    return prepared


def _raise_problems(problems: Sequence[str]) -> None:
    """The same ValueError on every rank, if any rank has a problem."""
    different = {problem for problem in problems if problem}
    if not different:
        return
    if all(problems) and len(different) == 1:
        raise ValueError(problems[0])
    raise ValueError(
        " ".join(
            f"rank {r}: {problem}" for r, problem in enumerate(problems) if problem
        )
    )


def _load_tokenizer(
    path: Path, dummy_weights: bool, tokenizer_config: dict[str, Any]
) -> TokenizerWrapper:
    """The model's tokenizer; for dummy weights without one, the embedded model's."""
    if not has_tokenizer(path):
        if not dummy_weights:
            raise ValueError(
                f"{path} has no tokenizer (tokenizer.json or tokenizer.model). "
                "Download the model again."
            )
        path = find_model(EMBEDDED_MODEL)
    try:
        return load_tokenizer(
            path, tokenizer_config, eos_token_ids=read_config(path).get("eos_token_id")
        )
    except (OSError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path}: its tokenizer cannot be loaded: {error}") from error


@dataclass(frozen=True)
class PreparedModel:
    """A model that every rank has checked and can load."""

    comm: Comm
    config: EPConfig
    weights: Weights
    tokenizer: TokenizerWrapper

    def load(self) -> tuple[nn.Module, TokenizerWrapper]:
        """Read this rank's weights. Every rank must call it."""
        start = time.perf_counter()
        model, read_bytes = self.weights.build()
        seconds = time.perf_counter() - start
        model = _install(model, self.comm, self.weights.placement, self.config)
        report = RankReport(
            rank=self.comm.rank,
            experts=self.weights.placement.describe(self.comm.rank),
            held_bytes=held_bytes(model),
            read_bytes=read_bytes,
            peak_resident_bytes=peak_resident_bytes(),
            seconds=seconds,
        )
        reports = gather_objects(self.comm, asdict(report))
        model.expert_parallel.reports = [RankReport(**r) for r in reports]
        return model, self.tokenizer


def _install(
    model: nn.Module, comm: Comm, placement: Placement, config: EPConfig
) -> nn.Module:
    """Make a model expert-parallel whose switches hold this rank's experts."""
    shares_routing = _shares_routing(comm, config)
    group = ExpertGroup.from_config(comm, placement, config, shares_routing)
    blocks = install(find_moe_sites(model), group, config.reduction)
    model.expert_parallel = ExpertParallel(group, blocks)
    verify_blocks(model, blocks)
    layers = [
        Layer(b.site.switch, b.probe.row_dtype, b.probe.top_k)
        for b in blocks
        if b.probe
    ]
    wish = Wish(config.runner, config.backend, config.warmup)
    model.expert_parallel.policy = tune(layers, placement.num_experts, comm, wish)
    if reasons := model.expert_parallel.per_slot_reasons:
        warnings.warn(
            f"{type(model).__module__}: K outputs per token travel instead of their "
            f"sum, K times the bytes, because {'; '.join(reasons)}.",
            stacklevel=3,
        )
    return model


def _shares_routing(comm: Comm, config: EPConfig) -> bool:
    """Whether rank 0's routing is sent to all: where ranks may round differently."""
    if config.shared_routing != "auto":
        return config.shared_routing == "always"
    device = mx.device_info()
    mine = [version("mlx"), platform.machine(), str(device.get("architecture"))]
    return any(other != mine for other in gather_objects(comm, mine))
