"""How the exchanges of one model's layers are hidden behind what else there is to do.

`single`: a layer queues its last collective, then its shared experts. `two`: a step is
two micro-batches, forward passes that take turns. Each starts an exchange of a layer
and lets the other go on until that has started one too. So the collective of one is
under way while the other computes:

    computing      A0.attention  B0.attention  A0.experts   B0.experts   A1.attention
    on the link                  A0.dispatch   B0.dispatch  A0.combine   B0.combine

Where they take turns is a matter of the model's layers alone. All ranks start the same
collectives in the same order, also where some of them wait for numbers on the host in
the middle of a pass, and others have no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
from greenlet import getcurrent, greenlet

from mlx_ep.config import EPConfig, OverlapMode
from mlx_ep.exchange import InFlight
from mlx_ep.metrics import Exposure, StageTimings


@dataclass(frozen=True)
class Operation:
    """What one layer of a micro-batch starts.

    Attributes:
        name: ``dispatch`` or ``combine``.
        layer: its number.
        tokens: T of this rank in the micro-batch.
        computed: what the collective is given.
        results: of it.
    """

    name: str
    layer: int
    tokens: int
    computed: mx.array
    results: tuple[mx.array, ...]


@dataclass
class Overlap:
    """The way of the pass that is being built, alike on all ranks.

    Attributes:
        wanted: by the configuration.
        mode: of this pass.
        exposure: what of the exchanges was not hidden, where it is measured.
        turns: of the micro-batches that are being built; None: there are none.
    """

    wanted: OverlapMode = "none"
    mode: OverlapMode = "none"
    exposure: Exposure = field(default_factory=Exposure)
    turns: Turns | None = field(default=None, repr=False)
    _exposed: tuple[int, mx.array] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, config: EPConfig) -> Overlap:
        """What a configuration asks for; `two` and `auto` say the mode of each pass."""
        return cls(config.overlap, "single" if config.overlap == "single" else "none")

    def start_beside(self, output: mx.array) -> None:
        """Start what the block computes beside its experts, behind their collective."""
        if self.mode == "none":
            return
        mx.async_eval(output)
        if self._exposed is not None:
            tokens, total = self._exposed
            self._exposed = None
            # sync: what the layer waits for is being measured.
            mx.eval(output)
            self.exposure.wait("exposed", tokens, total)

    def seconds_to_hide(self, timings: StageTimings) -> float:
        """Of what there is to hide, timed so far: one collective with `single`."""
        seconds = timings.seconds
        moved = 0.0 if self.mode == "single" else seconds["dispatch"]
        return seconds["combine"] + moved

    def measure_hidden(
        self, tokens: int, total: mx.array, seconds: float | None
    ) -> None:
        """Time the exchange of a layer: alone, or what is not hidden of it.

        Args:
            total: of the layer; how much longer it takes than what is started beside
                it is measured, with `single`.
            seconds: that the exchange took alone; None: it was not timed.
        """
        if seconds is not None:
            self.exposure.add("alone", tokens, seconds, 1)
        elif self.mode == "single":
            self._exposed = (tokens, total)

    @contextmanager
    def passing(self, mode: OverlapMode) -> Iterator[None]:
        """Passes inside are built in this mode."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode, self._exposed = before, None

    def in_turn(
        self,
        passes: Sequence[Callable[[], Any]],
        enter: Callable[[int], None],
        is_timed: bool = False,
    ) -> list[Any]:
        """Run two passes that take turns; what they return.

        Every rank has to call it, with passes through the same layers.

        Args:
            enter: called with the number of a pass before each of its turns.
            is_timed: measure how much longer each collective takes than what the other
                pass computes meanwhile. Every operation is then waited for.
        """
        self.turns = Turns(self.exposure if is_timed else None)
        try:
            with self.passing("two"):
                return self.turns.run(passes, enter)
        finally:
            self.turns = None


class Turns:
    """Passes that run in turn, on one thread.

    Args:
        exposure: takes how much longer collectives take than what hides them.
    """

    def __init__(self, exposure: Exposure | None = None) -> None:
        self._exposure = exposure
        self._in_flight = InFlight()
        self._part = 0
        self._started: list[Operation | None] = [None, None]

    def run(
        self, passes: Sequence[Callable[[], Any]], enter: Callable[[int], None]
    ) -> list[Any]:
        """See `Overlap.in_turn`."""
        outputs: list[Any] = [None for _ in passes]

        def body(part: int) -> None:
            outputs[part] = passes[part]()

        parts = [greenlet(partial(body, part)) for part in range(len(passes))]
        try:
            with self._in_flight:
                while not all(each.dead for each in parts):
                    for self._part, each in enumerate(parts):
                        if not each.dead:
                            enter(self._part)
                            each.switch()
        finally:
            for each in parts:  # where one failed the other does not go on
                if not each.dead:
                    each.throw()
        return outputs

    def take(self, operation: Operation) -> None:
        """Start an operation; returns when the other pass has started one too.

        To be called inside a pass.
        """
        part, caller = self._part, getcurrent().parent
        assert caller is not None, "not inside a pass"
        receive = self._in_flight.start(
            operation,
            *operation.results,
            name=f"{operation.name} of layer {operation.layer}, part {part}",
        )
        if self._exposure is not None:
            self._started[part] = operation
        caller.switch()
        received = receive()
        if self._exposure is not None:
            self._measure(received, self._started[1 - part], self._exposure)

    @staticmethod
    def _measure(
        received: Operation, other: Operation | None, exposure: Exposure
    ) -> None:
        """How much longer an operation takes than what was started behind it."""
        if other is not None:
            # sync: what a step waits for is being measured.
            mx.eval(other.computed)
        layers = int(received.name == "combine")
        exposure.wait("exposed", received.tokens, *received.results, layers=layers)
