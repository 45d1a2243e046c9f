"""A request while it is served."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mlx_ep.simulate.traces import TraceRequest


@dataclass(slots=True, eq=False)
class ServedRequest:
    """What an engine knows of a request.

    Attributes:
        index: the request's number in the trace.
        arrival: ns.
        asked: as the trace has it.
        follow: the rest of its session.
        names: of the blocks of its tokens, as far as they are known.
        computed: tokens whose keys and values are computed or scheduled to be.
        total: tokens that there are, counting those that scheduled steps will make.
        made: output tokens that scheduled steps make.
        wanted: output tokens that it makes on this instance.
        room: tokens that its blocks hold.
        own_blocks: that it alone uses; `shared`: names of the others.
        named: blocks of `names` that were looked at.
        scheduled, first, end: ns, or -1.
        entry: the instance that makes its first token.
        instance: that serves it (the last one).
        emitted: pairs (step, count): its tokens come at the ends of `count` steps from
            `step` on.
        preempted: how often.
    """

    index: int
    arrival: int
    asked: TraceRequest
    follow: tuple[TraceRequest, ...] = ()
    names: list[int] = field(default_factory=list)
    computed: int = 0
    total: int = 0
    made: int = 0
    wanted: int = 0
    room: int = 0
    own_blocks: int = 0
    shared: list[int] = field(default_factory=list)
    named: int = 0
    scheduled: int = -1
    first: int = -1
    end: int = -1
    entry: int = -1
    instance: int = -1
    emitted: list[int] = field(default_factory=list)
    earlier: list[np.ndarray] = field(default_factory=list)
    preempted: int = 0

    @property
    def outputs(self) -> int:
        return self.asked.output_tokens

    @property
    def num_blocks(self) -> int:
        return self.own_blocks + len(self.shared)

    def emit(self, step: int, count: int = 1) -> None:
        """Tokens at the ends of `count` steps from `step` on."""
        if self.emitted and self.emitted[-2] + self.emitted[-1] == step:
            self.emitted[-1] += count
        else:
            self.emitted += [step, count]

    def take_back(self) -> None:
        """The last token will not come: its step was scheduled before a preemption."""
        self.made -= 1
        self.emitted[-1] -= 1
        if not self.emitted[-1]:
            del self.emitted[-2:]

    def token_times(self, ends: np.ndarray) -> np.ndarray:
        """When each output token came, ns.

        Args:
            ends: of the steps of the group that served it last.
        """
        parts = list(self.earlier)
        for step, count in zip(self.emitted[::2], self.emitted[1::2]):
            parts.append(ends[step : step + count])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
