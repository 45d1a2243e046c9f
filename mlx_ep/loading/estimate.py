"""What each rank of a cluster would hold of a model, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.loading.caches import PREFILL_STEP, CacheQuantization, cache_bytes
from mlx_ep.loading.checkpoint import Checkpoint, read_config
from mlx_ep.loading.dummy import build_dummy
from mlx_ep.loading.local import count_experts, model_class, outline, refuse_dense
from mlx_ep.loading.rank_tensors import load_bytes
from mlx_ep.loading.sizes import (
    DTYPES,
    experts_bytes,
    held_bytes,
    layer_copy_bytes,
)
from mlx_ep.loading.working import WorkingMemory, working_memory
from mlx_ep.models import find_moe_sites
from mlx_ep.models.tensor_parallel import connect, split_dense
from mlx_ep.placement import Placement, StageLayers


@dataclass(frozen=True)
class ModelOutline:
    """A model of which nothing is read, for any placement.

    Attributes:
        config: of its config.json.
        num_experts: E.
        source: where its sizes come from, for a person.
        make: the model of a rank; its arrays have shapes and no numbers.
    """

    config: dict[str, Any]
    num_experts: int
    source: str
    make: Callable[[Placement, int], nn.Module]

    @classmethod
    def open(cls, path: Path) -> ModelOutline:
        """The model of a folder: its weight files' headers, or config.json alone.

        Raises:
            ValueError: the folder is not that of a model with experts, or its files
                are not in order.
        """
        config = read_config(path)
        model_class(config)
        num_experts = count_experts(config)
        refuse_dense(num_experts, "mlx_ep.plan")
        if not any(path.glob("model*.safetensors")):
            return cls._of_config(path, config, num_experts)
        checkpoint = Checkpoint.open(path)
        load_bytes(checkpoint, Placement.contiguous(num_experts, 1), 0)
        return cls(
            config,
            num_experts,
            f"the headers of the weight files in {path}",
            lambda placement, rank: outline(checkpoint, placement, rank),
        )

    @classmethod
    def _of_config(
        cls, path: Path, config: dict[str, Any], num_experts: int
    ) -> ModelOutline:
        text = config.get("text_config", config)
        name = next(
            (str(c[key]) for c in (text, config) for key in _DTYPE_KEYS if key in c),
            "bfloat16",
        ).removeprefix("torch.")
        dtype = DTYPES.get(name, mx.bfloat16)
        source = f"{path / 'config.json'} alone, what is not quantized as {name}"
        if "quantization" not in config and "quantization_config" in config:
            source += (
                "; its quantization_config is not counted, as only weight files say "
                "what it packs"
            )

        def make(placement: Placement, rank: int) -> nn.Module:
            model = build_dummy(config, placement, rank)
            model.set_dtype(dtype)
            return model

        return cls(config, num_experts, source, make)


_DTYPE_KEYS = ("torch_dtype", "dtype")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a cluster is to do with a model.

    Attributes:
        context: tokens of a sequence.
        sequences: at once.
        attention: how the dense part runs, ``replicated`` or ``tensor``.
        quantization: of the KV caches.
        step: tokens of a step of prefill.
    """

    context: int = 4096
    sequences: int = 1
    attention: str = "replicated"
    quantization: CacheQuantization = field(default_factory=CacheQuantization)
    step: int = PREFILL_STEP

    @property
    def step_tokens(self) -> int:
        """Of a step of prefill, of all sequences together."""
        return self.sequences * min(self.step, self.context)


@dataclass(frozen=True, kw_only=True)
class RankNeed:
    """The bytes that one rank would hold.

    Attributes:
        rank: of them.
        experts: which ones, for a person.
        dense_bytes: weights that are not experts.
        expert_bytes: weights of its experts.
        cache_bytes: KV caches and states of all sequences.
        working_bytes: an estimate of what a step of prefill needs beside them, see
            `mlx_ep.loading.working`.
        memory: what the rank may hold; None: not said.
    """

    rank: int
    experts: str
    dense_bytes: int
    expert_bytes: int
    cache_bytes: int
    working_bytes: int
    memory: int | None = None

    @property
    def weight_bytes(self) -> int:
        return self.dense_bytes + self.expert_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.working_bytes

    @property
    def missing_bytes(self) -> int:
        """Above 0: it does not fit."""
        return 0 if self.memory is None else self.total_bytes - self.memory


def fits(needs: Sequence[RankNeed]) -> bool:
    """Whether no rank needs more than it may hold, as far as that is said."""
    return not any(need.missing_bytes > 0 for need in needs)


def rank_needs(
    model: ModelOutline,
    placement: Placement,
    workload: Workload,
    memory: Sequence[int] | None = None,
    stages: Sequence[StageLayers] = (),
) -> list[RankNeed]:
    """What every rank would hold, in rank order.

    Args:
        placement: of the ranks; with `stages` of those of one stage.
        memory: bytes that each rank may hold.
        stages: the layers of each stage of a pipeline; none: every rank holds all.

    Raises:
        ValueError: the dense part cannot be split as asked for, or the model's caches
            are not known.
    """
    if stages:
        of_stages: list[RankNeed] = []
        for stage in stages:
            first = len(of_stages)
            own = None if memory is None else memory[first:]
            held = replace(placement, stage=stage)
            needs = rank_needs(model, held, workload, own)
            of_stages += [replace(need, rank=first + need.rank) for need in needs]
        return of_stages
    needs = []
    caches: int | None = None
    for rank in range(placement.num_ranks):
        made = rank_outline(model, placement, rank, workload.attention)
        if caches is None:  # on all ranks alike
            caches = workload.sequences * cache_bytes(
                made, workload.context, workload.quantization, workload.step
            )
        read = experts_bytes(made)
        experts = read + layer_copy_bytes(made, placement, rank)
        slots = max(p.num_slots(rank) for p in (placement, *placement.layers))
        needs.append(
            RankNeed(
                rank=rank,
                experts=placement.describe(rank),
                dense_bytes=held_bytes(made) - read,
                expert_bytes=experts,
                cache_bytes=caches,
                working_bytes=_working(model, made, placement, rank, workload).of(
                    slots, placement.num_experts
                ),
                memory=None if memory is None else memory[rank],
            )
        )
    return needs


def _working(
    model: ModelOutline,
    made: nn.Module,
    placement: Placement,
    rank: int,
    workload: Workload,
) -> WorkingMemory:
    """Of a rank's model; of a stage that of all layers, of which it has the widest or
    as wide ones, without experts where it has none."""
    tokens, part = workload.step_tokens, placement.part(rank)
    if placement.stage is None:
        return working_memory(made, tokens, part)
    whole = model.make(replace(placement, stage=None), rank)
    found = working_memory(whole, tokens, part)
    return found if find_moe_sites(made) else replace(found, all_experts=0)


def rank_outline(
    model: ModelOutline, placement: Placement, rank: int, attention: str
) -> nn.Module:
    """The model of a rank with its dense part as `attention` has it.

    Raises:
        ValueError: the dense part cannot be split.
    """
    made = model.make(placement, rank)
    if attention == "tensor" and placement.num_ranks > 1:
        split_dense(made, placement.num_ranks, rank)
        connect(made, _ShapeComm(rank, placement.num_ranks))
    return made


class _ShapeComm:
    """A `Comm` of one process: it gives arrays of the right shapes, and no numbers."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def transport(self) -> Literal["none"]:
        return "none"

    def all_reduce(self, x: mx.array) -> mx.array:
        return x

    def all_gather(self, x: mx.array) -> mx.array:
        return mx.zeros((self._size * x.shape[0], *x.shape[1:]), x.dtype)

    def reduce_scatter(self, x: mx.array) -> mx.array:
        return x[: x.shape[0] // self._size]

    def all_to_all(self, x: mx.array) -> mx.array:
        return x

    def all_to_all_v(
        self, x: mx.array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> mx.array:
        return mx.zeros((sum(recv_counts), *x.shape[1:]), x.dtype)

    def broadcast(self, x: mx.array, root: int = 0) -> mx.array:
        return x

    def beside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def barrier(self) -> None:
        pass
