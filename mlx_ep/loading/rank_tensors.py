"""Which tensors of a checkpoint a rank holds, and of stacks which rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mlx_ep.loading.checkpoint import Checkpoint
from mlx_ep.loading.headers import TensorInfo, quoted
from mlx_ep.models import expert_tensor
from mlx_ep.models.tensor_names import ExpertTensor
from mlx_ep.placement import Placement


class RankTensor(NamedTuple):
    """A tensor of a checkpoint, as a rank sees it.

    Attributes:
        kind: ``dense``, which every rank holds whole; ``stack``, of all experts, of
            which a rank holds some rows; ``own``, of one of its experts; ``other``, of
            another rank's.
        expert: which one's and by what name, of an expert's tensor.
        num_bytes: that the rank holds of it.
        is_elsewhere: it is of a layer that the ranks of another stage hold.
    """

    info: TensorInfo
    kind: Literal["dense", "stack", "own", "other"]
    expert: ExpertTensor | None
    num_bytes: int
    is_elsewhere: bool = False


def rank_tensors(
    checkpoint: Checkpoint, placement: Placement, rank: int
) -> Iterator[RankTensor]:
    """Every tensor of a checkpoint, in its order.

    Raises:
        ValueError: a tensor is of an expert that the model does not have.
    """
    stage = placement.stage
    for tensor in _all_tensors(checkpoint, placement, rank):
        if stage is not None and stage.is_elsewhere(tensor.info.name):
            yield tensor._replace(num_bytes=0, is_elsewhere=True)
        else:
            yield tensor


def _all_tensors(
    checkpoint: Checkpoint, placement: Placement, rank: int
) -> Iterator[RankTensor]:
    """As if the rank had all layers."""
    own = set(placement.rank_experts[rank])
    for info in checkpoint.tensors.values():
        found = expert_tensor(info.name, info.shape, placement.num_experts)
        if found is None:
            yield RankTensor(info, "dense", None, info.num_bytes)
        elif found.expert is None:
            row_bytes = info.num_bytes // placement.num_experts
            yield RankTensor(info, "stack", found, len(own) * row_bytes)
        elif found.expert >= placement.num_experts:
            raise ValueError(
                f"{info.file}: tensor {quoted(info.name)} is of expert {found.expert}; "
                f"config.json says that there are {placement.num_experts}, from 0 on."
            )
        elif found.expert in own:
            yield RankTensor(info, "own", found, info.num_bytes)
        else:
            yield RankTensor(info, "other", found, 0)


@dataclass(frozen=True)
class LoadBytes:
    """The bytes of one rank.

    Attributes:
        dense_bytes: tensors that every rank holds.
        expert_bytes: this rank's experts.
        total_bytes: the whole checkpoint.
    """

    dense_bytes: int
    expert_bytes: int
    total_bytes: int

    @property
    def rank_bytes(self) -> int:
        return self.dense_bytes + self.expert_bytes


def load_bytes(checkpoint: Checkpoint, placement: Placement, rank: int) -> LoadBytes:
    """How many bytes of `checkpoint` belong to `rank`.

    Raises:
        ValueError: no tensor of the checkpoint holds an expert, or experts are missing,
            or there are too many.
    """
    dense = expert = 0
    seen: set[int] = set()
    for tensor in rank_tensors(checkpoint, placement, rank):
        if tensor.kind == "dense":
            dense += tensor.num_bytes
            continue
        expert += tensor.num_bytes
        assert tensor.expert is not None
        number = tensor.expert.expert
        seen.update(range(placement.num_experts) if number is None else (number,))
    if missing := sorted(set(range(placement.num_experts)) - seen):
        raise ValueError(
            f"{checkpoint.path} must hold {placement.num_experts} experts per layer, "
            f"as its config.json says; {len(missing)} of them, from expert "
            f"{missing[0]} on, have no tensor under a name that is known. Convert it "
            "with mlx_lm.convert."
        )
    total = sum(info.num_bytes for info in checkpoint.tensors.values())
    return LoadBytes(dense, expert, total)
