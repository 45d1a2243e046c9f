"""What all ranks check of a model before a weight is read, and its loading."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_ep import loading
from mlx_ep.api.install import install_experts
from mlx_ep.comm import (
    Comm,
    agreed,
    gather_objects,
    host_id,
    note_progress,
    raise_problems,
    shortened,
)
from mlx_ep.comm.stages import StageLink, check_transport
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
    checkpoint_weights,
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
    memory_limit,
    memory_problems,
    model_facts,
    read_config,
    with_memory,
)
from mlx_ep.metrics import RankReport, peak_resident_bytes
from mlx_ep.models import connect_stages, find_moe_sites
from mlx_ep.moe import RebalanceRule


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
        RebalanceRule.of(config, comm.size)
        check_transport(comm, config.pp)
        path = find_model(
            path_or_hf_repo,
            revision,
            with_weights=not dummy_weights,
            download=config.download,
        )
        commit = hub_commit(path)
        weights_of = loading.dummy_weights if dummy_weights else checkpoint_weights
        weights = weights_of(path, comm.rank, comm.size, config)
        tokenizer = _load_tokenizer(
            path, weights.config, dummy_weights, tokenizer_config or {}
        )
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
    check_commits(gather_objects(comm, commit))
    check_placements(digests)
    check_alike(
        comm,
        config_facts(config) | model_facts(path, tokenizer, weights.files),
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


def config_facts(config: EPConfig) -> dict[str, str]:
    """What of a configuration must be alike; a host's own limits and paths need not."""
    own = ("memory_limit_gb", "placement_file", "download")
    return {
        name: str(value) for name, value in asdict(config).items() if name not in own
    }


def check_commits(commits: Sequence[str]) -> None:
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


def check_placements(digests: Sequence[str]) -> None:
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
    path: Path,
    model_config: dict[str, Any],
    dummy_weights: bool,
    tokenizer_config: dict[str, Any],
) -> TokenizerWrapper:
    """The model's tokenizer; for dummy weights without one, the embedded model's."""
    if not has_tokenizer(path):
        if not dummy_weights:
            raise ValueError(
                f"{path} has no tokenizer (tokenizer.json or tokenizer.model). "
                "Download the model again."
            )
        path = find_model(EMBEDDED_MODEL)
        model_config = read_config(path)
    with foreign_code(f"{path}: its tokenizer cannot be loaded"):
        return load_tokenizer(
            path, tokenizer_config, eos_token_ids=model_config.get("eos_token_id")
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
        stages = self.config.pp
        link = StageLink(self.comm, stages) if stages > 1 else None
        group = self.comm if link is None else link.group
        # Numbers are looked at when they are read: NaN on one rank ends all.
        model, read_bytes = agreed(
            self.comm, lambda: self.weights.build(splitter.change)
        )
        seconds = time.perf_counter() - start
        self._check_dense(model, group)
        placement = self.weights.placement
        model = install_experts(model, group, placement, self.config, splitter)
        if link is not None:
            connect_stages(model, link)
        report = RankReport(
            rank=self.comm.rank,
            experts=self.weights.placement.describe(group.rank),
            held_bytes=held_bytes(model),
            read_bytes=read_bytes,
            peak_resident_bytes=peak_resident_bytes(),
            seconds=seconds,
        )
        reports = gather_objects(self.comm, asdict(report))
        model.expert_parallel.reports = [RankReport(**r) for r in reports]
        note_progress("running")
        return model, self.tokenizer

    def _check_dense(self, model: nn.Module, group: Comm) -> None:
        """Raises:
        ValueError: on every rank: what each has whole is not the same.
        """
        if self.attention.attention != "replicated":
            return  # no rank has it whole
        switches = [site.switch for site in find_moe_sites(model)]
        check_alike(
            group,
            dense_facts(model, switches),
            "All ranks must hold the same weights outside of the routed experts; "
            "download or copy the model again where these differ:",
        )
