"""Models whose structure does not tell: what makes them look like the others.

mlx_ep finds experts as a `SwitchGLU` or `SwitchMLP` of mlx-lm, with stacked parameters
``[E, ...]``, and everything else follows from there. A model that keeps its experts in
another way gets a `Family`: what turns it into that form, and its checkpoints with it.
docs/add-a-model.md adds one step by step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING

from mlx_ep.models import dbrx

Tensors = dict[str, mx.array]


@dataclass(frozen=True)
class Family:
    """How models of one mlx-lm file are given stacked experts.

    Attributes:
        stack_experts: puts a `SwitchGLU` or `SwitchMLP` in the place of each block's
            experts, in place, with their parameters if the model has been loaded.
        stack_tensors: gives the tensors of a checkpoint the names and shapes that
            the model has then. It sees a rank's own experts, numbered by slot.
        stack_shape: ``(name, shape, config) -> shape``: a tensor of a checkpoint that
            is a stack of experts without an axis for it, as ``[E, ...]``.
        stack_quantization: ``config -> config["quantization"]``, with its settings
            per layer for the paths that the model has then. A ValueError where experts
            of one layer have different ones.
    """

    stack_experts: Callable[[nn.Module], None]
    stack_tensors: Callable[[Tensors], Tensors]
    stack_shape: Callable[[str, tuple[int, ...], Mapping[str, Any]], tuple[int, ...]]
    stack_quantization: Callable[[Mapping[str, Any]], dict[str, Any]]


# By the name of the file in mlx_lm.models.
FAMILIES: dict[str, Family] = {
    "dbrx": Family(
        dbrx.stack_experts,
        dbrx.stack_tensors,
        dbrx.stack_shape,
        dbrx.stack_quantization,
    )
}


def family_of(model_class: type) -> Family | None:
    """What has to be done to models of a class, or None for nearly all of them."""
    files = (c.__module__.rpartition(".")[2] for c in model_class.__mro__)
    return next((FAMILIES[file] for file in files if file in FAMILIES), None)


def stack_experts(model: nn.Module) -> nn.Module:
    """Give a model of mlx-lm stacked experts if it has others, in place."""
    family = family_of(type(model))
    if family is not None:
        family.stack_experts(model)
    return model


def stack_tensors(model_class: type, tensors: Tensors) -> Tensors:
    """A rank's part of a checkpoint, for a model that `stack_experts` has changed."""
    family = family_of(model_class)
    return tensors if family is None else family.stack_tensors(tensors)


def stack_shape(
    config: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a checkpoint's tensor, with an axis for the experts it stacks."""
    file = config.get("model_type", "")
    family = FAMILIES.get(MODEL_REMAPPING.get(file, file))
    return shape if family is None else family.stack_shape(name, shape, config)


def stack_quantization(model_class: type, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of config.json that change where experts become stacked ones.

    Raises:
        ValueError: experts that have to be stacked are quantized differently.
    """
    family = family_of(model_class)
    if family is None or "quantization" not in config:
        return {}
    return {"quantization": family.stack_quantization(config)}


def why_not_here(model_class: type[nn.Module]) -> str:
    """Why models of a class cannot run on this machine, or ""."""
    if mx.metal.is_available():
        return ""
    file = sys.modules.get(model_class.__module__)  # None: a model's own file
    kernels = sorted(
        name
        for name, value in ({} if file is None else vars(file)).items()
        if str(getattr(value, "__module__", "")).startswith("mlx_lm.kernels.")
    )
    if not kernels:
        return ""
    return (
        f"{model_class.__module__} runs on Metal only: mlx-lm has {', '.join(kernels)} "
        "as Metal kernels and in no other form. Run it on a Mac."
    )
