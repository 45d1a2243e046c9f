"""What runs experts: the protocol, and the weights that it finds in a switch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Float32, Int32, Shaped
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from mlx_ep.metrics import Counters
from mlx_ep.types import Packing, Rows


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """One matrix per slot of this rank, ``y = weight[slot] @ x + bias[slot]``.

    Attributes:
        weight: ``[L, rows, columns]``, or words of packed columns.
        scales: of a packed weight, one per `group_size` columns.
        offsets: what MLX's affine mode calls biases.
        bias: the bias of the layer, ``[L, rows]``.
        global_scale: of nvfp4, one per slot.
        packing: of the weight.
    """

    weight: Shaped[mx.array, "L rows words"]
    packing: Packing
    scales: Shaped[mx.array, "L rows G"] | None = None
    offsets: Shaped[mx.array, "L rows G"] | None = None
    bias: Float[mx.array, "L rows"] | None = None
    global_scale: Shaped[mx.array, ...] | None = None

    @property
    def num_slots(self) -> int:
        return self.weight.shape[0]

    @property
    def rows(self) -> int:
        return self.weight.shape[1]

    @property
    def columns(self) -> int:
        if self.scales is None:
            return self.weight.shape[2]
        return self.scales.shape[2] * self.packing.group_size


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of a switch: ``down(activation(up(x), gate(x)))``.

    Attributes:
        gate: None for experts of two matrices: ``down(activation(up(x)))``.
        activation: the switch's own module, a callable.
    """

    gate: Matrices | None
    up: Matrices
    down: Matrices
    activation: Any

    @property
    def matrices(self) -> list[Matrices]:
        """In the order in which they are applied."""
        return [m for m in (self.gate, self.up, self.down) if m is not None]

    @property
    def num_slots(self) -> int:
        return self.up.num_slots

    @property
    def weights_per_slot(self) -> int:
        """Numbers that make up one expert."""
        return sum(m.rows * m.columns for m in self.matrices)


# The forms that are known, by the code that runs them: a subclass may do otherwise.
_FORMS = {SwitchGLU: ("gate_proj", "up_proj", "down_proj"), SwitchMLP: ("fc1", "fc2")}


def expert_weights(switch: nn.Module) -> ExpertWeights | None:
    """The weights of a switch, or None where it is of a form that is not known."""
    names = next((n for form, n in _FORMS.items() if _runs_as(switch, form)), ())
    parts = [_matrices(switch[name]) for name in names]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    *gate, up, down = known
    return ExpertWeights(gate[0] if gate else None, up, down, switch.activation)


def _runs_as(switch: nn.Module, form: type[nn.Module]) -> bool:
    return type(switch).__call__ is form.__call__


def _matrices(linear: nn.Module) -> Matrices | None:
    bias = linear.get("bias")
    if type(linear) is SwitchLinear:
        return Matrices(weight=linear.weight, packing=Packing.of(linear), bias=bias)
    if type(linear) is not QuantizedSwitchLinear:
        return None
    return Matrices(
        weight=linear.weight,
        packing=Packing.of(linear),
        scales=linear.scales,
        offsets=linear.get("biases"),
        bias=bias,
        global_scale=linear.get("global_scale"),
    )


@runtime_checkable
class ExpertRunner(Protocol):
    """One way to run the experts of a switch. It keeps no state between calls."""

    def partial_sum(self, rows: Rows, counters: Counters) -> Float32[mx.array, "M D"]:
        """Each row's gate-weighted sum over the slots of this rank; else zeros.

        Args:
            rows: the rows and the slots they visit.
            counters: of this rank; told what was computed.
        """
        ...

    def slot_outputs(
        self, rows: Float[mx.array, "N D"], slots: Int32[mx.array, " N"]
    ) -> Float[mx.array, "N D"]:
        """The unweighted output of each (row, slot) pair, slots ascending."""
        ...
