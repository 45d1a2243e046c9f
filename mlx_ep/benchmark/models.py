"""The arms of a whole model: loaded side by side, with the same weights.

`single` and `tp` are mlx-lm's model as it is, `tp` after its own ``shard()``. The `ep`
arms are what `mlx_ep.load` makes; those with attention replicated or data-parallel are
one model whose strategy is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from mlx_ep.api import PreparedModel, parallelize, prepare
from mlx_ep.benchmark.arms import ARM_STRATEGIES, SHARDED
from mlx_ep.comm import GroupComm, agreed
from mlx_ep.config import EPConfig, RunnerName
from mlx_ep.exchange import STRATEGIES
from mlx_ep.loading import (
    RankWeights,
    checkpoint_weights,
    dummy_weights,
    find_model,
    held_bytes,
)
from mlx_ep.models import shard_problem, tensor_problem
from mlx_ep.moe import ExpertGroup


@dataclass
class ModelArm:
    """One way to run the model on this rank.

    Attributes:
        name: in `mlx_ep.benchmark.arms.ARMS`.
        model: None on a rank that has nothing to do.
        held_bytes: of this rank's parameters.
        group: of an ep arm; `enter` gives it to the model.
    """

    name: str
    runner: str
    model: nn.Module | None
    held_bytes: int
    comm: GroupComm
    group: ExpertGroup | None = field(default=None, repr=False)

    @property
    def is_idle(self) -> bool:
        return self.model is None

    @property
    def is_sharded(self) -> bool:
        return self.name in SHARDED

    def enter(self) -> None:
        """Arms may share a model: give it this arm's strategy."""
        if self.group is None:
            return
        assert self.model is not None
        self.model.expert_parallel.group = self.group
        for state in self.model.expert_parallel.blocks:
            state.group = self.group


@dataclass(frozen=True)
class ModelSource:
    """A model as the command line names it.

    Attributes:
        dummy: random weights for its config.json.
        trust_remote_code: let the tokenizer run code that comes with the model.
    """

    name: str
    revision: str | None
    dummy: bool
    runner: RunnerName
    memory_limit_gb: float | None
    trust_remote_code: bool = False

    def path(self) -> Path:
        """Its folder.

        Raises:
            ValueError: there is none.
        """
        return find_model(self.name, self.revision, with_weights=not self.dummy)

    def whole(self) -> RankWeights:
        """All of its weights on one rank; nothing is read.

        Raises:
            ValueError: as `mlx_ep.load`.
        """
        weights_of = dummy_weights if self.dummy else checkpoint_weights
        return weights_of(self.path(), 0, 1)

    def prepare(self, arm: str, comm: GroupComm) -> PreparedModel:
        """Check an ep arm on all ranks; nothing is read.

        Raises:
            ValueError: on every rank: it cannot be loaded so.
        """
        config = EPConfig(
            strategy="replicated",
            attention="tensor" if arm == "ep-tensor" else "replicated",
            runner=self.runner,
            warmup=self.runner == "auto",
            memory_limit_gb=self.memory_limit_gb,
        )
        return prepare(
            self.name,
            comm,
            config,
            tokenizer_config={"trust_remote_code": self.trust_remote_code},
            revision=self.revision,
            dummy_weights=self.dummy,
        )


def why_no_shard(source: ModelSource, num_ranks: int) -> str:
    """Why mlx-lm's ``shard()`` cannot split the model over P ranks, or ""."""
    model = source.whole().outline()
    if hasattr(model, "shard") and (problem := tensor_problem(model, num_ranks)):
        return problem.partition("Use --attention")[0].strip().rstrip(".")
    return shard_problem(model, num_ranks)


@dataclass(frozen=True)
class Prepared:
    """Arms that can be loaded, known on every rank.

    Attributes:
        need_bytes: the most that this rank holds at once.
    """

    source: ModelSource
    arms: Sequence[str]
    plain: RankWeights
    expert: PreparedModel | None
    tensor: PreparedModel | None
    need_bytes: int

    def load(self, comm: GroupComm) -> list[ModelArm]:
        """Read and build. Every rank must call it."""
        runner = self.source.runner
        made = []
        whole = None
        if self.source.dummy or ("single" in self.arms and comm.rank == 0):
            whole, _ = self.plain.build(None)
        if "single" in self.arms:
            own = whole if comm.rank == 0 else None
            held = 0 if own is None else held_bytes(own)
            made.append(ModelArm("single", "gather", own, held, comm))
        if "tp" in self.arms:
            model = self._sharded(whole, comm)
            made.append(ModelArm("tp", "gather", model, held_bytes(model), comm))
        shared = [a for a in self.arms if a in ARM_STRATEGIES and a != "ep-tensor"]
        for arms, prepared in ((shared, self.expert), (["ep-tensor"], self.tensor)):
            if prepared is None:
                continue
            if whole is not None and self.source.dummy:
                model = parallelize(self._like(whole), comm.group, prepared.config)
            else:
                model, _ = prepared.load()
            group = model.expert_parallel.group
            for arm in arms:
                config = EPConfig(strategy=ARM_STRATEGIES[arm])
                own_group = replace(group, strategy=STRATEGIES.create(config))
                made.append(
                    ModelArm(arm, runner, model, held_bytes(model), comm, own_group)
                )
        return sorted(made, key=lambda arm: self.arms.index(arm.name))

    def _like(self, whole: nn.Module) -> nn.Module:
        """Another model with the same arrays: drawing them again takes minutes."""
        model = self.source.whole().outline()
        model.update(whole.parameters())
        return model

    def _sharded(self, whole: nn.Module | None, comm: GroupComm) -> nn.Module:
        """The model after mlx-lm's ``shard()``, evaluated layer by layer."""
        if whole is not None and self.source.dummy:
            model = self._like(whole)
        else:
            model, _ = load_model(self.source.path(), lazy=True)
        model.shard(comm.group)
        for layer in model.layers:
            # sync: one layer at a time, so that one at most is held whole.
            mx.eval(layer.parameters())
        mx.eval(model.parameters())  # sync: the rest
        return model.eval()


def prepare_arms(source: ModelSource, arms: Sequence[str], comm: GroupComm) -> Prepared:
    """Check every arm on all ranks; nothing is read. Every rank must call it.

    Raises:
        ValueError: on every rank: an arm cannot be loaded.
    """
    plain = agreed(comm, source.whole)
    whole = plain.rank_bytes
    # tp's share: dense layers are split too, of which norms are not; as an upper bound.
    share = whole // comm.size + whole // 20
    expert = tensor = None
    held = share if "tp" in arms else 0
    if "single" in arms and comm.rank == 0:
        held += whole
    if any(arm in ARM_STRATEGIES and arm != "ep-tensor" for arm in arms):
        expert = source.prepare("ep-replicated", comm)
        held += expert.weights.rank_bytes
    if "ep-tensor" in arms:
        tensor = source.prepare("ep-tensor", comm)
        held += tensor.weights.rank_bytes
    if source.dummy and not ("single" in arms and comm.rank == 0):
        held += whole  # of which the arms are made, and which is freed then
    return Prepared(source, arms, plain, expert, tensor, held)
