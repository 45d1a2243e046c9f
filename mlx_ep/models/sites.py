"""Where an mlx-lm model has routed experts, told from its structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlx_ep.models.stage_layer import StandInLayer

# What mlx-lm's configurations call the number of experts.
EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")


@dataclass(frozen=True)
class MoESite:
    """A place in a model where experts are routed.

    Attributes:
        path: of the block, such as ``model.layers.3.mlp``.
        block: routes, calls its switch and sums.
        switch_name: the block's attribute that holds the switch.
        summing: the module whose code has a reduction over ranks of its own (a
            `sharding_group`): the nearest to the switch below the layer, mostly the
            block itself. Where there is none, the block.
        summing_path: its path.
    """

    path: str
    block: nn.Module
    switch_name: str
    summing: nn.Module
    summing_path: str

    @property
    def switch(self) -> nn.Module:
        return self.block[self.switch_name]

    @property
    def num_experts(self) -> int:
        """The experts that the switch holds now."""
        return self.projections[0].num_experts

    @property
    def projections(self) -> list[nn.Module]:
        """The switch's stacked linear layers; experts are axis 0 of each parameter."""
        return [self.switch[name] for name in PROJECTIONS if name in self.switch]

    def switch_path_in(self, module: nn.Module) -> tuple[str, ...]:
        """The attributes that lead to the switch from the block or from `summing`."""
        if module is self.block:
            return (self.switch_name,)
        between = self.path.removeprefix(f"{self.summing_path}.")
        return (*between.split("."), self.switch_name)


def find_moe_sites(model: nn.Module) -> list[MoESite]:
    """Every block with routed experts, in the model's order; none: it is dense.

    Raises:
        ValueError: the sites differ in their number of experts, or the model's
            configuration speaks of experts and there is no site.
    """
    sites = sorted(_walk(model), key=lambda site: _natural(site.path))
    is_stage = any(isinstance(module, StandInLayer) for module in model.modules())
    named = _named_experts(getattr(model, "args", None))
    if not sites and named and not is_stage:
        raise ValueError(
            "The model has no routed experts that mlx_ep can find (no SwitchGLU or "
            f"SwitchMLP in {type(model).__module__}), and its configuration says "
            f"{named}: docs/add-a-model.md says how to add such a model."
        )
    counts = {site.num_experts for site in sites}
    if len(counts) > 1:
        raise ValueError(
            "All MoE layers of a model must have the same number of experts; got "
            f"{sorted(counts)} in {type(model).__module__}."
        )
    return sites


def _named_experts(record: Any) -> str:
    """What a model's configuration calls its experts and how many, or ""."""
    if is_dataclass(record) and not isinstance(record, type):
        record = vars(record)
    if not isinstance(record, dict):
        return ""
    for name, value in record.items():
        if name in EXPERT_COUNTS and type(value) is int and value > 1:
            return f"{name} = {value}"
        if inner := _named_experts(value):
            return inner
    return ""


def _walk(model: nn.Module) -> Iterator[MoESite]:
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, (SwitchGLU, SwitchMLP)):
            parent, _, name = path.rpartition(".")
            summing = _summing_path(modules, parent)
            yield MoESite(parent, modules[parent], name, modules[summing], summing)


def _summing_path(modules: dict[str, nn.Module], block: str) -> str:
    path = block
    # A layer is an item of a list: its name is a number.
    while path and not path.rpartition(".")[2].isdigit():
        if hasattr(modules.get(path), "sharding_group"):
            return path
        path = path.rpartition(".")[0]
    return block


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    parts = path.split(".")
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def keep_experts(site: MoESite, take: Callable[[mx.array], mx.array]) -> None:
    """Replace every expert-stacked parameter of a site by ``take(parameter)``."""
    for projection in site.projections:
        projection.update(tree_map(take, projection.parameters()))
