"""The runners by name, and which of them can run a switch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import mlx.nn as nn

from mlx_ep.experts.base import ExpertRunner
from mlx_ep.experts.blas import BlasRunner
from mlx_ep.experts.gather import GatherRunner
from mlx_ep.experts.metal import MetalRunner
from mlx_ep.rows import Backend, Mover, Option, uses_metal


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


def make_runner(name: str, switch: nn.Module, mover: Mover) -> ExpertRunner:
    """The runner of a name for a switch; `gather` leaves sums of pairs to a mover."""
    kind = RUNNERS[name]
    return kind(switch, mover) if kind is GatherRunner else kind(switch)


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
