"""The runners by name, and which of them can run a switch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.runners.base import Backend, ExpertRunner, uses_metal
from mlx_ep.runners.blas import BlasRunner
from mlx_ep.runners.gather import GatherRunner
from mlx_ep.runners.metal import MetalRunner


@runtime_checkable
class RunnerType(Protocol):
    """What the table holds: a class, or anything that is called like one."""

    def __call__(self, switch: nn.Module) -> ExpertRunner: ...

    def why_not(self, switch: nn.Module, backend: Backend) -> str:
        """Why it cannot run a switch in this process, or ""."""
        ...


RUNNERS: dict[str, RunnerType] = {
    "gather": GatherRunner,
    "blas": BlasRunner,
    "metal": MetalRunner,
}

# Where each of them can compute.
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "gather": ("metal", "cpu"),
    "blas": ("cpu",),
    "metal": ("metal",),
}


@dataclass(frozen=True)
class Option:
    """One way to run experts.

    Attributes:
        runner: its name in `RUNNERS`.
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


def options(switch: nn.Module) -> Mapping[Option, str]:
    """Every option for a switch, with why it is impossible in this process, or ""."""
    found = {}
    for name, kind in RUNNERS.items():
        for backend in BACKENDS.get(name, ("cpu",)):
            why = kind.why_not(switch, backend)
            if backend == "metal" and not uses_metal():
                why = "MLX does not compute on a GPU through Metal here"
            found[Option(name, backend)] = why
    return found
