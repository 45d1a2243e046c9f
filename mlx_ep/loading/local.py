"""Builds an mlx-lm model in which every switch holds this rank's experts only.

The hook is official: ``load_model(get_model_classes=...)``. The class it is given is a
subclass of the model's own that shrinks the switches when it is built, and whose
`sanitize` sees the checkpoint as if the model had only this rank's experts. So all that
mlx-lm does to a checkpoint (stacking, splitting, transposing, unpacking) happens to
local experts alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from mlx_ep.loading.checkpoint import Checkpoint, TensorReader
from mlx_ep.models import expert_tensor, find_moe_sites, keep_experts
from mlx_ep.placement import Placement

# What mlx-lm's configurations call the number of experts.
_EXPERT_COUNT_FIELDS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)


def model_class(config: dict[str, Any]) -> type[nn.Module]:
    """mlx-lm's class for a config.json.

    Raises:
        ValueError: mlx-lm has none, or the folder brings its own code.
    """
    if "model_file" in config:
        raise ValueError(
            "Models that bring their own code (config.json names a model_file, "
            f"{config['model_file']!r}) cannot be made expert-parallel."
        )
    if "model_type" not in config:
        raise ValueError("config.json must name a model_type.")
    found, _ = _get_classes(dict(config))
    return found


def count_experts(config: dict[str, Any]) -> int:
    """E of a model, from the modules that its config.json makes; nothing is read.

    Raises:
        ValueError: it has no routed experts.
    """
    return find_moe_sites(build_model(config))[0].num_experts


def build_model(config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model for a config.json, with random weights that are not evaluated.

    Raises:
        ValueError: config.json lacks a value that the model needs.
    """
    found, args_class = _get_classes(dict(config))
    try:
        # A copy: some from_dict change what they are given.
        return found(args_class.from_dict(deepcopy(config)))
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"config.json does not describe a model of type {config['model_type']}: "
            f"{error}."
        ) from error


def load_local(
    checkpoint: Checkpoint, placement: Placement, rank: int, reader: TensorReader
) -> nn.Module:
    """The model of a checkpoint with the experts of `rank`, evaluated.

    Dense tensors are read when they are evaluated, one parameter at a time, so that
    at most one parameter's inputs are held beside what stays.
    """
    classes = _LocalClasses(checkpoint, placement, rank, reader)
    model, _ = load_model(checkpoint.path, lazy=True, get_model_classes=classes)
    model.__class__ = classes.model_class  # the subclass has done its work
    drop_placeholder(model, placement, rank)
    for parameter in dict(tree_flatten(model.parameters())).values():
        mx.eval(parameter)  # sync: loading
    mx.clear_cache()
    reader.bytes_read += sum(
        info.num_bytes
        for info in checkpoint.tensors.values()
        if info.name in classes.read_by_mlx
    )
    return model


def shrink_switches(model: nn.Module, placement: Placement, rank: int) -> None:
    """Cut every switch of a model that is not evaluated yet to the rank's slots.

    A rank without experts keeps one as a placeholder: mlx-lm cannot stack or quantize
    nothing. `drop_placeholder` takes it away.
    """
    num_slots = max(placement.num_slots(rank), 1)
    for site in find_moe_sites(model):
        keep_experts(site, lambda parameter: parameter[:num_slots])


def drop_placeholder(model: nn.Module, placement: Placement, rank: int) -> None:
    """Leave the switches of a rank without experts empty."""
    if placement.num_slots(rank) == 0:
        for site in find_moe_sites(model):
            keep_experts(site, lambda p: mx.zeros((0, *p.shape[1:]), p.dtype))


class _LocalClasses:
    """What ``load_model`` asks for the model's classes, and what came of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        placement: Placement,
        rank: int,
        reader: TensorReader,
    ) -> None:
        self.checkpoint, self.placement, self.rank = checkpoint, placement, rank
        self.reader = reader
        self.read_by_mlx: set[str] = set()

    def __call__(self, config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        self.model_class, args_class = _get_classes(config)
        model_class, loader = self.model_class, self

        class LocalModel(model_class):  # type: ignore[valid-type, misc]
            def __init__(self, args: Any) -> None:
                super().__init__(args)
                shrink_switches(self, loader.placement, loader.rank)

            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                weights = loader.localize(weights)
                if not hasattr(model_class, "sanitize"):
                    return weights
                with _expert_count(self, loader.placement, loader.rank):
                    return super().sanitize(weights)

        return LocalModel, args_class

    def localize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint with this rank's experts only, numbered by slot.

        Args:
            weights: lazy tensors by their names in the checkpoint.

        Returns:
            The dense tensors, still lazy, and this rank's experts: rows of stacks are
            read now, tensors of single experts stay lazy too.
        """
        experts = self.placement.rank_experts[self.rank]
        slots = {expert: slot for slot, expert in enumerate(experts)}
        local: dict[str, mx.array] = {}
        for name, tensor in weights.items():
            info = self.checkpoint.tensors[name]
            found = expert_tensor(name, info.shape, self.placement.num_experts)
            if found is None:
                local[name] = tensor
                self.read_by_mlx.add(name)
            elif found.expert is None and experts:
                local[name] = self.reader.read_rows(info, experts)
            elif found.expert is None:
                local[name] = mx.zeros((1, *tensor.shape[1:]), tensor.dtype)
            elif found.expert in slots:
                local[found.renamed(slots[found.expert])] = tensor
                self.read_by_mlx.add(name)
            elif found.expert == 0 and not experts:
                local[name] = mx.zeros(tensor.shape, tensor.dtype)
        return local


@contextmanager
def _expert_count(model: nn.Module, placement: Placement, rank: int) -> Iterator[None]:
    """The model's configuration says, for a while, that it has L experts, not E."""
    changed: list[tuple[Any, str]] = []
    for args in _configurations(model):
        for name in _EXPERT_COUNT_FIELDS:
            if getattr(args, name, None) == placement.num_experts:
                changed.append((args, name))
                setattr(args, name, max(placement.num_slots(rank), 1))
    try:
        yield
    finally:
        for args, name in changed:
            setattr(args, name, placement.num_experts)


def _configurations(model: nn.Module) -> list[Any]:
    """Every configuration record that a module of the model holds, nested ones too."""
    found: list[Any] = []

    def visit(record: Any) -> None:
        if not is_dataclass(record) or any(record is other for other in found):
            return
        found.append(record)
        for field in fields(record):
            visit(getattr(record, field.name, None))

    for module in model.modules():
        visit(getattr(module, "args", None))
        visit(getattr(module, "config", None))
    return found
