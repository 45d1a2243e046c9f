"""Where all parts meet: a model becomes expert-parallel."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_ep import loading
from mlx_ep.comm import (
    Comm,
    GroupComm,
    agreed,
    gather_objects,
    host_id,
    note_progress,
    raise_problems,
    shortened,
)
from mlx_ep.comm.symmetry import check_alike
from mlx_ep.config import EPConfig
from mlx_ep.cost.attention import REPLICATED, AttentionChoice
from mlx_ep.exchange import STRATEGIES
from mlx_ep.loading import (
    EMBEDDED_MODEL,
    DensePart,
    DiskNeed,
    MemoryNeed,
    RankWeights,
    Splitter,
    agree_attention,
    checkpoint_weights,
    choose_placement,
    cluster_chips,
    decide,
    dense_facts,
    dense_part,
    disk_problems,
    find_model,
    foreign_code,
    has_tokenizer,
    held_bytes,
    hub_commit,
    keep_part,
    memory_limit,
    memory_problems,
    model_facts,
    read_config,
    with_memory,
)
from mlx_ep.metrics import Counters, RankReport, peak_resident_bytes
from mlx_ep.models import (
    find_moe_sites,
    install,
    keep_experts,
    stack_experts,
    verify_blocks,
    why_not_here,
)
from mlx_ep.models.blocks import BlockState
from mlx_ep.models.tensor_parallel import connect
from mlx_ep.moe import ExpertGroup, RoutingRecorder
from mlx_ep.placement import Placement
from mlx_ep.rows import MovesRows
from mlx_ep.tune import Layer, ModelPolicy, Wish, tune


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
        attention: how the dense part runs, with the reason and predicted times.
    """

    group: ExpertGroup
    blocks: list[BlockState]
    policy: ModelPolicy | None = None
    reports: list[RankReport] = field(default_factory=list)
    attention: AttentionChoice = REPLICATED

    @property
    def counters(self) -> Counters:
        return self.group.counters

    def recorder(self) -> RoutingRecorder:
        """A recorder of this rank's routing, connected to the MoE layers, not started.

        Where ranks have tokens of their own, each records its own.
        """
        made = RoutingRecorder(len(self.blocks), self.group.placement)
        for layer, block in enumerate(self.blocks):
            block.group = replace(self.group, observe=made.observer(layer))
        return made

    @property
    def per_slot_reasons(self) -> list[str]:
        """Why MoE layers exchange K outputs per token instead of their sum."""
        found = {b.why_not_routed for b in self.blocks if b.tier == "per-slot"}
        return sorted(found)


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
        ValueError: the model has no routed experts, or is expert-parallel already, or
            the configuration's placement is not possible.
    """
    if hasattr(model, "expert_parallel"):
        raise ValueError(
            "The model is expert-parallel already; parallelize() takes a model as "
            "mlx_lm.load returns it."
        )
    if reason := why_not_here(type(model)):
        raise ValueError(reason)
    comm = GroupComm(group or mx.distributed.init())
    check_alike(
        comm, _config_facts(config), "All ranks must have the same configuration:"
    )
    sites = find_moe_sites(stack_experts(model))
    placement = _agreed_placement(model, sites[0].num_experts, comm, config)
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
    return _install(model, comm, placement, config, splitter)


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
    config = with_memory(config, comm)
    prepared, dense, problem, commit = None, DensePart(), "", ""
    chips = cluster_chips(config, comm)
    try:
        STRATEGIES.create(config)
        path = find_model(
            path_or_hf_repo,
            revision,
            with_weights=not dummy_weights,
            download=config.download,
        )
        commit = hub_commit(path)
        weights_of = loading.dummy_weights if dummy_weights else checkpoint_weights
        weights = weights_of(path, comm.rank, comm.size, config)
        tokenizer = _load_tokenizer(path, dummy_weights, tokenizer_config or {})
        dense = dense_part(config, comm, weights.outline, chips)
        prepared = PreparedModel(comm, config, weights, tokenizer)
    except ValueError as error:
        problem = shortened(str(error))
    need = MemoryNeed(
        host=host_id(),
        num_bytes=prepared.weights.rank_bytes if prepared else 0,
        limit=memory_limit(config.memory_limit_gb),
    )
    fetch = prepared.weights.fetch if prepared else None
    disk_need = fetch.disk_need(need.host) if fetch else DiskNeed(need.host)
    digest = prepared.weights.placement.digest if prepared else ""
    problems, needs, disk_needs, digests, parts = zip(
        *gather_objects(comm, [problem, need, disk_need, digest, dense]), strict=True
    )
    raise_problems(problems)
    _check_commits(gather_objects(comm, commit))
    _check_placements(digests)
    check_alike(
        comm,
        _config_facts(config) | model_facts(path, tokenizer, weights.files),
        "All ranks must have the same configuration and the same files of the model; "
        "these differ:",
    )
    choice, memory_needs = decide(
        config, [DensePart(*p) for p in parts], [MemoryNeed(*need) for need in needs]
    )
    raise_problems(memory_problems(memory_needs, config.memory_limit_gb is not None))
    raise_problems(disk_problems([DiskNeed(*need) for need in disk_needs]))
    assert prepared is not None
    return replace(prepared, attention=choice)


def _config_facts(config: EPConfig) -> dict[str, str]:
    """What of a configuration must be alike; a host's own limits and paths need not."""
    own = ("memory_limit_gb", "placement_file", "download")
    return {
        name: str(value) for name, value in asdict(config).items() if name not in own
    }


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
    _check_placements(gather_objects(comm, placement.digest))
    return placement


def _check_commits(commits: Sequence[str]) -> None:
    """Raises:
    ValueError: the hub's model changed between the ranks' questions, or a rank that
        cannot ask the hub has an older one.
    """
    known = [commit for commit in commits if commit]
    if different := [commit for commit in known if commit != known[0]]:
        raise ValueError(
            f"All ranks must load the same commit; rank {commits.index(known[0])} has "
            f"{known[0]}, rank {commits.index(different[0])} has {different[0]}. Start "
            "again, or name one with --revision."
        )


def _check_placements(digests: Sequence[str]) -> None:
    """Raises:
    ValueError: the ranks would place experts differently.
    """
    if different := [r for r, digest in enumerate(digests) if digest != digests[0]]:
        raise ValueError(
            f"All ranks must place experts alike; rank {different[0]} has another "
            "placement than rank 0. A placement file must be the same on every host, "
            "and so must the checkpoint and the flags --memory, --context and --ep."
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
    with foreign_code(f"{path}: its tokenizer cannot be loaded"):
        return load_tokenizer(
            path, tokenizer_config, eos_token_ids=read_config(path).get("eos_token_id")
        )


@dataclass(frozen=True)
class PreparedModel:
    """A model that every rank has checked and can load."""

    comm: Comm
    config: EPConfig
    weights: RankWeights
    tokenizer: TokenizerWrapper
    attention: AttentionChoice = REPLICATED

    def load(self) -> tuple[nn.Module, TokenizerWrapper]:
        """Fetch and read this rank's weights. Every rank must call it.

        Raises:
            RuntimeError: on the rank that cannot fetch its weights from the hub; the
                others wait for it, unless they run under `mlx_ep.guard`.
        """
        if self.weights.fetch is not None:
            note_progress("fetching")
            self.weights.fetch.run(self.comm.rank)
        note_progress("loading")
        start = time.perf_counter()
        splitter = Splitter(self.attention, self.comm)
        # Numbers are looked at when they are read: NaN on one rank ends all.
        model, read_bytes = agreed(
            self.comm, lambda: self.weights.build(splitter.change)
        )
        seconds = time.perf_counter() - start
        self._check_dense(model)
        placement = self.weights.placement
        model = _install(model, self.comm, placement, self.config, splitter)
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
        note_progress("running")
        return model, self.tokenizer

    def _check_dense(self, model: nn.Module) -> None:
        """Raises:
        ValueError: on every rank: what each has whole is not the same.
        """
        if self.attention.attention != "replicated":
            return  # no rank has it whole
        switches = [site.switch for site in find_moe_sites(model)]
        check_alike(
            self.comm,
            dense_facts(model, switches),
            "All ranks must hold the same weights outside of the routed experts; "
            "download or copy the model again where these differ:",
        )


def _install(
    model: nn.Module,
    comm: Comm,
    placement: Placement,
    config: EPConfig,
    splitter: Splitter,
) -> nn.Module:
    """Make a model expert-parallel whose switches hold this rank's experts."""
    note_progress("warmup")
    shares_routing = _shares_routing(comm, config)
    group = ExpertGroup.from_config(comm, placement, config, shares_routing)
    connect(model, group.counted)
    partial_shared = splitter.made.partial_shared
    blocks = install(find_moe_sites(model), group, config.reduction, partial_shared)
    verify_blocks(model, blocks)
    layers = [
        Layer(b.site.switch, b.probe.row_dtype, b.probe.top_k)
        for b in blocks
        if b.probe
    ]
    wish = Wish(config.runner, config.backend, config.warmup)
    policy = tune(
        layers,
        placement.num_experts,
        comm,
        wish,
        moves_rows=isinstance(group.strategy, MovesRows),
        placement=placement.slots,
    )
    if policy.mover is not None:
        strategy = STRATEGIES.create(config, policy.mover)
        group = replace(group, strategy=strategy)
        for block in blocks:
            block.group = group
    state = ExpertParallel(
        group, blocks, policy.with_strategy(group.strategy), attention=splitter.choice
    )
    model.expert_parallel = state
    if reasons := state.per_slot_reasons:
        warnings.warn(
            f"{type(model).__module__}: K outputs per token travel instead of their "
            f"sum, K times the bytes, because {'; '.join(reasons)}.",
            stacklevel=3,
        )
    if shares_routing and any(block.probe is None for block in blocks):
        warnings.warn(
            f"{type(model).__module__} keeps its routing inside its MoE blocks: rank "
            "0's routing cannot be sent to all, and ranks that round differently may "
            "choose different experts at a near-tie.",
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
