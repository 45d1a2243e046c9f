"""Where something can be computed, and one way to do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

Backend = Literal["cpu", "metal"]


@dataclass(frozen=True)
class Option:
    """One way to run experts, or to move rows.

    Attributes:
        runner: its name in `mlx_ep.experts.RUNNERS`, or in `mlx_ep.rows.MOVEMENTS`.
        backend: what computes; None: MLX's default device.
    """

    runner: str
    backend: Backend | None = None

    @property
    def stream(self) -> mx.DeviceType | None:
        """Where MLX has to compute, None where it does so by default."""
        if self.backend == "cpu" and mx.default_device() == mx.gpu:
            return mx.cpu
        return None

    def __str__(self) -> str:
        return (
            self.runner if self.backend is None else f"{self.runner} on {self.backend}"
        )


def uses_metal() -> bool:
    """Whether MLX computes on a GPU through Metal in this process."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu
