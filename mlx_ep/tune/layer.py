"""What the policy is asked for: a layer, and the user's wishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.experts import expert_weights


@dataclass(frozen=True)
class Wish:
    """What the user asks for.

    Attributes:
        runner: a name in `RUNNERS` that has to be taken, or ``"auto"``.
        backend: ``"cpu"`` or ``"metal"``, or ``"auto"``; MLX_EP_BACKEND goes first.
        warmup: whether options are checked and timed; else the default rule holds.
    """

    runner: str = "auto"
    backend: str = "auto"
    warmup: bool = True


@dataclass(frozen=True)
class Layer:
    """A switch and what its router gives it.

    Attributes:
        dtype: of the rows.
        top_k: K.
    """

    switch: nn.Module
    dtype: mx.Dtype
    top_k: int

    @property
    def shape(self) -> dict[str, Any]:
        """What layers with the same policy have in common, on all ranks."""
        weights = expert_weights(self.switch)
        dtype = str(self.dtype).removeprefix("mlx.core.")
        shape: dict[str, Any] = {"rows": dtype, "top_k": self.top_k}
        if weights is None:
            return {"form": type(self.switch).__name__, **shape}
        return {
            "form": type(weights.activation).__name__,
            "width": weights.up.columns,
            "expert_width": weights.up.rows,
            "packings": [matrices.packing for matrices in weights.matrices],
            "bias": weights.up.bias is not None,
            **shape,
        }

    @property
    def title(self) -> str:
        """The shape, for a person."""
        shape = self.shape
        if "width" not in shape:
            return f"{shape['form']}, {shape['rows']} rows"
        packings = " / ".join(dict.fromkeys(shape["packings"]))
        return (
            f"{shape['width']} x {shape['expert_width']}, {packings}, {shape['form']}, "
            f"{shape['rows']} rows, top {shape['top_k']}"
        )

    @property
    def moved_as(self) -> str:
        """What layers have in common whose rows are moved alike; "" if not known."""
        shape = self.shape
        if "width" not in shape:
            return ""
        return f"{shape['width']} {shape['rows']} {self.top_k}"
