"""How the exchanges of one model's layers are hidden behind what else there is to do.

`single`: a layer queues its last collective, then its shared experts. `two`: a step is
two micro-batches. Each is built as a forward pass of its own, of which nothing is
evaluated; what its layers would start is a list of operations. Then the operations of
both are started in turn, and the collective of one is under way while the other
computes:

    computing      A0.attention  B0.attention  A0.experts   B0.experts   A1.attention
    on the link                  A0.dispatch   B0.dispatch  A0.combine   B0.combine
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle

import mlx.core as mx

from mlx_ep.comm import Comm
from mlx_ep.config import EPConfig, OverlapMode
from mlx_ep.exchange import ExchangeShape, InFlight, Receive, Strategy
from mlx_ep.metrics import Exposure
from mlx_ep.types import TokenCounts


@dataclass
class Operation:
    """What one layer of a micro-batch starts.

    Attributes:
        name: ``dispatch`` or ``combine``.
        layer: its number.
        tokens: T of this rank in the micro-batch.
        computed: what the collective is given.
        results: of it.
        beside: what is started behind it, such as shared experts.
    """

    name: str
    layer: int
    tokens: int
    computed: mx.array
    results: tuple[mx.array, ...]
    beside: list[mx.array] = field(default_factory=list)


@dataclass
class Overlap:
    """The way of the pass that is being built, alike on all ranks.

    Attributes:
        wanted: by the configuration.
        mode: of this pass; with ``two`` operations are noted and not started.
        exposure: what of the exchanges was not hidden, where it is measured.
    """

    wanted: OverlapMode = "none"
    mode: OverlapMode = "none"
    exposure: Exposure = field(default_factory=Exposure)
    _noted: list[Operation] | None = field(default=None, repr=False)
    _exposed: tuple[int, mx.array] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, config: EPConfig) -> Overlap:
        """What a configuration asks for; `two` and `auto` say the mode of each pass."""
        return cls(config.overlap, "single" if config.overlap == "single" else "none")

    @property
    def is_noting(self) -> bool:
        """Whether a micro-batch is being built."""
        return self._noted is not None

    def note(self, operation: Operation) -> None:
        """One more operation of the micro-batch that is being built."""
        assert self._noted is not None
        self._noted.append(operation)

    def start_beside(self, output: mx.array) -> None:
        """Start what the block computes beside its experts, behind their collective."""
        if self._noted:
            self._noted[-1].beside.append(output)
        elif self.mode != "none":
            mx.async_eval(output)
            if self._exposed is not None:
                tokens, total = self._exposed
                self._exposed = None
                # sync: what the layer waits for is being measured.
                mx.eval(output)
                self.exposure.wait("exposed", tokens, total)

    def expose(self, tokens: int, total: mx.array) -> None:
        """Measure how much longer `total` takes than what is started beside it."""
        self._exposed = (tokens, total)

    @contextmanager
    def passing(self, mode: OverlapMode) -> Iterator[None]:
        """Passes inside are built in this mode."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode, self._exposed = before, None

    def micro_batch(
        self, build: Callable[[], mx.array | None]
    ) -> tuple[mx.array | None, deque[Operation]]:
        """Build a pass and start nothing of it: its output, and its operations."""
        self._noted = []
        try:
            output = build()
            return output, deque(self._noted)
        finally:
            self._noted = None


def asks_host(
    strategy: Strategy,
    comm: Comm,
    tokens: TokenCounts,
    width: int,
    top_k: int,
    itemsize: int,
) -> bool:
    """Whether a strategy waits for numbers in each layer: nothing is under way then.

    Args:
        tokens: T of every rank.
        width: D.
        top_k: K.
        itemsize: bytes of a row's numbers.
    """
    shape = ExchangeShape(
        tokens=tokens,
        width=width,
        top_k=top_k,
        itemsize=itemsize,
        rank=comm.rank,
        transport=comm.transport,
    )
    return strategy.traffic(shape).host_syncs > 0


def start_in_turn(
    batches: Sequence[deque[Operation]],
    exposure: Exposure | None = None,
    eval_layers: int = 0,
) -> None:
    """Start the operations of two micro-batches, one of each in turn.

    Every rank has to call it with the same operations. The lists are empty afterwards:
    what has been started is held by nobody but MLX.

    Args:
        exposure: takes how much longer each collective takes than what is computed
            beside it; every operation is then waited for.
        eval_layers: wait after so many layers; 0: never.
    """
    under_way: list[Receive[Operation] | None] = [None, None]
    started: list[Operation | None] = [None, None]
    layers: set[int] = set()
    with InFlight() as in_flight:
        for side in cycle((0, 1)):
            if not any(batches):
                break
            if not batches[side]:
                continue
            operation = batches[side].popleft()
            receive = under_way[side]
            if receive is not None:  # by what is started now
                received = receive()
                if exposure is not None:
                    _measure(received, started[1 - side], exposure)
            under_way[side] = in_flight.start(
                operation,
                *operation.results,
                *operation.beside,
                name=f"{operation.name} of layer {operation.layer}, part {side}",
            )
            started[side] = operation
            layers.add(operation.layer)
            is_last = side == 1 and operation.name == "combine"
            if eval_layers and is_last and len(layers) % eval_layers == 0:
                # sync: Metal ends a command buffer that waits for a slow rank for 5 s.
                mx.eval(operation.results)
        for left in under_way:
            if left is not None:
                left()


def _measure(received: Operation, other: Operation | None, exposure: Exposure) -> None:
    """How much longer an operation takes than what was started behind it."""
    if other is not None:
        # sync: what a step waits for is being measured.
        mx.eval(other.computed, other.beside)
    layers = int(received.name == "combine")
    exposure.wait("exposed", received.tokens, *received.results, layers=layers)
