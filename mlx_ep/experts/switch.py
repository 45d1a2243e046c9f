"""A switch with a choice of runners, made anew for each call."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Float32, Int32

from mlx_ep.experts.base import ExpertRunner
from mlx_ep.experts.gather import GatherRunner
from mlx_ep.experts.table import RUNNERS, make_runner
from mlx_ep.metrics import Counters
from mlx_ep.rows import Backend, Mover, Option, uses_metal
from mlx_ep.types import Rows

# The rows of a call (M) -> what runs them.
RunnerChoice = Callable[[int], Option]


class SwitchRunner:
    """Runs rows through a switch of mlx-lm; a `RowsRunner`.

    Attributes:
        choose: what runs a call; default: `gather` where it can, else `blas`.
        mover: sums the outputs of pairs, for runners that leave it to others.
    """

    def __init__(
        self,
        switch: nn.Module,
        choose: RunnerChoice | None = None,
        mover: Mover | None = None,
    ) -> None:
        self.switch = switch
        self.choose = choose
        self.mover = mover or Mover()
        self._runners: dict[str, ExpertRunner] = {}
        self._default: Option | None = None
        self._weights: dict[str, mx.array] = {
            name: child["weight"]
            for name, child in switch.children().items()
            if "weight" in child
        }

    def __call__(
        self, rows: Float[mx.array, "N D"], slots: Int32[mx.array, " N"]
    ) -> Float[mx.array, "N D"]:
        """The unweighted output of each (row, slot) pair, slots ascending.

        As one process computes it: by the switch itself, where that is possible.
        """
        return self.runner(self._first_possible().runner).slot_outputs(rows, slots)

    def partial_sum(self, rows: Rows, counters: Counters) -> Float32[mx.array, "... D"]:
        """See `RowsRunner`, by the runner that is chosen."""
        if self.choose is None:
            option = self._first_possible()
        else:
            # One product of axes: every layer of every step comes by here.
            option = self.choose(rows.x.size // rows.x.shape[-1])
        runner = self.runner(option.runner)
        shape = rows.x.shape
        if len(shape) > 2 and type(runner) is not GatherRunner:
            rows = type(rows)(*(part.flatten(0, -2) for part in rows))
        if option.stream is None:
            total = runner.partial_sum(rows, counters)
        else:
            with mx.stream(option.stream):
                total = runner.partial_sum(rows, counters)
        return total if total.ndim == len(shape) else total.reshape(shape)

    def runner(self, name: str) -> ExpertRunner:
        """A runner of this switch, built once for its present weights."""
        self._forget_old_weights()
        if name not in self._runners:
            self._runners[name] = make_runner(name, self.switch, self.mover)
        return self._runners[name]

    def _forget_old_weights(self) -> None:
        # At every call: by subscript, which is 10 times as fast as by attribute.
        switch = self.switch
        for name, old in self._weights.items():
            if switch[name]["weight"] is not old:
                break
        else:
            return
        weights = {name: switch[name]["weight"] for name in self._weights}
        self._runners, self._default, self._weights = {}, None, weights

    def _first_possible(self) -> Option:
        self._forget_old_weights()
        if self._default is None:
            self._default = self._find_default()
        return self._default

    def _find_default(self) -> Option:
        here: Backend = "metal" if uses_metal() else "cpu"
        for name in ("gather", "blas"):
            if not RUNNERS[name].why_not(self.switch, here):
                return Option(name)
        return Option("gather")  # which says what is wrong


def switch_runner(switch: nn.Module) -> SwitchRunner:
    """The runner of a switch, the same one at every call."""
    found = getattr(switch, "expert_runner", None)
    return install_runner(switch) if found is None else found


def install_runner(
    switch: nn.Module,
    choose: RunnerChoice | None = None,
    mover: Mover | None = None,
) -> SwitchRunner:
    """Give a switch a runner that chooses so, in the place of any earlier one."""
    # A plain object, so that nn.Module does not take it for a parameter or child.
    switch.expert_runner = runner = SwitchRunner(switch, choose, mover)
    return runner
