"""Which movement runs a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from mlx_ep.placement import Placement
from mlx_ep.rows.device import MetalMovement
from mlx_ep.rows.host import OpsMovement
from mlx_ep.rows.movement import Job, Movement, RowRoutes
from mlx_ep.rows.option import Option, uses_metal

MOVEMENTS: dict[str, Callable[[], Movement]] = {
    "ops": OpsMovement,
    "metal": MetalMovement,
}
OPS = OpsMovement()

# A job and the tokens of a call -> what runs it; the same on every rank.
MovementChoice = Callable[[Job, int], Option]


class Mover:
    """Moves rows in the way that is chosen for each call."""

    def __init__(self, choose: MovementChoice | None = None) -> None:
        """With a policy's choice; without one MLX's ops move, where MLX computes."""
        self.choose = choose
        self._movements: dict[Option, Movement] = {}
        self._chosen: dict[tuple[Job, int], Movement] = {}

    def __call__(self, job: Job, num_tokens: int) -> Movement:
        """The movement for a call of so many tokens; all ranks give the same number."""
        if self.choose is None:
            return OPS
        # Every layer of every step comes by here.
        found = self._chosen.get((job, num_tokens))
        if found is None:
            option = self.choose(job, num_tokens)
            if option not in self._movements:
                self._movements[option] = movement_of(option)
            found = self._chosen[job, num_tokens] = self._movements[option]
        return found


@runtime_checkable
class MovesRows(Protocol):
    """What has a mover: most strategies."""

    @property
    def mover(self) -> Mover: ...


def movement_of(option: Option) -> Movement:
    """What an option stands for, on the device that it names."""
    movement = MOVEMENTS[option.runner]()
    return movement if option.stream is None else OnDevice(movement, option.stream)


def movement_options(width: int, placement: Placement) -> Mapping[Option, str]:
    """Every option for rows of D, with why it is impossible in this process, or ""."""
    no_metal = (
        "" if uses_metal() else "MLX does not compute on a GPU through Metal here"
    )
    return {
        Option("ops", "cpu"): "",
        Option("ops", "metal"): no_metal,
        Option("metal", "metal"): MetalMovement.why_not(width, placement) or no_metal,
    }


class OnDevice:
    """A movement on a device that is not MLX's default one."""

    def __init__(self, movement: Movement, device: mx.DeviceType) -> None:
        self.movement, self.device = movement, device

    def plan_rows(self, *args: Any) -> RowRoutes:
        with mx.stream(self.device):
            return self.movement.plan_rows(*args)

    def pack(self, *args: Any) -> mx.array:
        with mx.stream(self.device):
            return self.movement.pack(*args)

    def add_rows(self, *args: Any) -> mx.array:
        with mx.stream(self.device):
            return self.movement.add_rows(*args)

    def add_ranks(self, *args: Any) -> mx.array:
        with mx.stream(self.device):
            return self.movement.add_ranks(*args)

    def sum_pairs(self, *args: Any) -> mx.array:
        with mx.stream(self.device):
            return self.movement.sum_pairs(*args)

    def to_format(self, *args: Any) -> mx.array:
        with mx.stream(self.device):
            return self.movement.to_format(*args)

    def from_format(self, *args: Any) -> mx.array:
        with mx.stream(self.device):
            return self.movement.from_format(*args)
