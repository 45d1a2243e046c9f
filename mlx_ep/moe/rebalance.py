"""When slots move between ranks while a model generates, and which.

Rank 0 looks at the load of its last passes and decides; what it decides is broadcast,
so that ranks need not round alike. All is counted in forward passes, which every rank
runs alike:

    ... pass   look: is it time? -> plan, a few layers a pass -> move, a few layers a
    pass, those with the fewest moves first -> pass ...
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ep.comm import Comm, broadcast_object
from mlx_ep.config import EPConfig
from mlx_ep.moe.recorder import RoutingRecorder
from mlx_ep.placement import LayerLoad, Moves, Placement, improve
from mlx_ep.types import to_host

log = logging.getLogger("mlx_ep")

MOST_RANKS = 8  # whose sets are looked at, see `mlx_ep.placement.improve`
LOOK_EVERY = 16  # passes between looks at the balancedness
LEAST_PASSES = 10  # whose balancedness is averaged
OF_BEFORE = 0.5  # of the earlier loads, in the moving average at each look
LAYERS_PLANNED = LAYERS_MOVED = 2  # before one pass


@dataclass(frozen=True)
class RebalanceRule:
    """When to move slots.

    Attributes:
        every: passes between two rebalances; 0: not by their number.
        below: rebalance when the mean over the layers of ``mean / max`` of the ranks'
            distinct experts, averaged over the passes since the last look (`LOOK_EVERY`
            passes), is below it, 0 to 1; 0: not by that. With strategy ``replicated``,
            where a rank sees all tokens.

    Raises:
        ValueError: a number is not one of those.
    """

    every: int = 0
    below: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 0 or not 0 <= self.below <= 1:
            raise ValueError(
                "rebalance_every must be 0 or more, rebalance_below 0 to 1; got "
                f"{self.every} and {self.below}."
            )

    @classmethod
    def of(cls, config: EPConfig, num_ranks: int) -> RebalanceRule:
        """The rule of a configuration.

        Raises:
            ValueError: it does not go with the rest of it, or with so many ranks.
        """
        rule = cls(config.rebalance_every, config.rebalance_below)
        if not rule.is_on:
            return rule
        if config.overlap in ("two", "auto"):
            raise ValueError(
                f"overlap={config.overlap!r} makes two passes of a step, between which "
                "experts cannot move: it cannot be combined with rebalance_every or "
                "rebalance_below. Use overlap='single', or leave them out."
            )
        if rule.below and config.strategy != "replicated":
            raise ValueError(
                "rebalance_below needs strategy='replicated', where rank 0 sees all "
                f"tokens; got {config.strategy!r}. Use rebalance_every."
            )
        if config.ep_size not in (None, num_ranks):
            raise ValueError(
                "Whole experts are rebalanced; it cannot be combined with ep_size, "
                f"which shares their width; got ep_size={config.ep_size}. Leave one of "
                "them out."
            )
        if num_ranks > MOST_RANKS:
            raise ValueError(
                f"Experts are rebalanced between {MOST_RANKS} ranks at most; got "
                f"{num_ranks}. Leave rebalance_every and rebalance_below out."
            )
        return rule

    @property
    def is_on(self) -> bool:
        return self.every > 0 or self.below > 0

    @property
    def interval(self) -> int:
        """Passes between looks."""
        return LOOK_EVERY if self.below else self.every


class _Change(NamedTuple):
    """A layer's new placement; in the order in which layers move."""

    num_transfers: int
    layer: int
    placement: Placement


@dataclass
class Rebalancer:
    """Moves slots of a model's MoE layers between ranks, between forward passes.

    Args:
        rule: when.
        comm: the ranks, at most `MOST_RANKS`.
        recorder: of this rank; started where it is needed: on rank 0, or on all ranks
            where each has tokens of its own.
        placement_of: gives a layer's present placement.
        place: gives a layer another one, on all ranks together, tells its recorders,
            and says how many bytes travelled.
        sums_loads: ranks have tokens of their own, so that their loads are added.
    """

    rule: RebalanceRule
    comm: Comm
    recorder: RoutingRecorder
    placement_of: Callable[[int], Placement]
    place: Callable[[int, Placement], int]
    sums_loads: bool = False
    num_rebalances: int = 0
    _pass: int = 0
    _looked: int = 0
    _done: int = 0
    _average: np.ndarray | None = None
    _planned: int | None = None
    _changes: list[_Change] = field(default_factory=list)
    _moving: list[_Change] = field(default_factory=list)
    _gains: list[tuple[float, float]] = field(default_factory=list)
    _bytes: int = 0
    _slots: int = 0
    _seconds: float = 0.0
    _last_skip: str = ""

    def before_pass(self) -> None:
        """Called on every rank before each forward pass's first MoE layer."""
        self._pass += 1
        if self._moving:
            self._move()
        elif self._planned is not None:
            self._plan()
        elif self._pass - self._looked >= self.rule.interval:
            self._look()

    def _look(self) -> None:
        """Take in the load since the last look, and decide whether to rebalance."""
        self._looked, reason = self._pass, ""
        if self.sums_loads or self.comm.rank == 0:
            both, evenness = self.recorder.take()
            if self.sums_loads:
                # sync: the loads of the ranks' own tokens, once in a look.
                both = to_host(self.comm.all_reduce(mx.array(both.astype(np.int32))))
            before = 0.0 if self._average is None else OF_BEFORE * self._average
            self._average = before + both
            reason = self._reason_to_wait([distinct for _, distinct in evenness])
        # sync: what rank 0 has decided says which collectives are next.
        waits = to_host(self.comm.broadcast(mx.array(bool(reason))))
        if waits:
            self._skip(reason)
            return
        self._planned = 0
        if self.comm.rank == 0:
            log.info("[Rebalance] start: forward_pass_id=%d", self._pass - 1)

    def _reason_to_wait(self, evenness: list[float]) -> str:
        rule = self.rule
        assert self._average is not None
        if not self._average.any():
            return "nothing was recorded"
        is_time = rule.every and self._pass - self._done >= rule.every
        if is_time or not rule.below:
            return ""
        if len(evenness) < LEAST_PASSES:
            return f"fewer than {LEAST_PASSES} passes since the last look"
        mean = sum(evenness) / len(evenness)
        if mean >= rule.below:
            return f"the balancedness {mean:.3f} is not below {rule.below:g}"
        return ""

    def _plan(self) -> None:
        """New placements of a few layers, by rank 0; after the last one, of all."""
        assert self._planned is not None
        num_layers = self.recorder.num_layers
        first, self._planned = self._planned, self._planned + LAYERS_PLANNED
        if self.comm.rank == 0:
            for layer in range(first, min(self._planned, num_layers)):
                self._improve(layer)
        if self._planned < num_layers:
            return
        self._planned = None
        found = [(c.num_transfers, c.layer, c.placement.rank_experts)
                 for c in sorted(self._changes)]  # fmt: skip
        for number, layer, ranks in broadcast_object(self.comm, found):
            placement = Placement(tuple(map(tuple, ranks)))
            self._moving.append(_Change(number, layer, placement))
        self._changes = []
        if not self._moving:
            self._done = self._looked = self._pass
            self._skip("no few exchanges make the busiest rank read 1% fewer experts")

    def _improve(self, layer: int) -> None:
        assert self._average is not None
        both = self._average[layer]
        if not both.any():
            return
        old = self.placement_of(layer)
        load = LayerLoad(np.diagonal(both).copy(), both, self.recorder.top_k)
        new, before, after = improve(old, load)
        if new is not old:
            number = len(Moves.between(old, new).transfers)
            self._changes.append(_Change(number, layer, new))
            self._gains.append((before, after))

    def _move(self) -> None:
        """The next layers of the plan."""
        start = time.perf_counter()
        for number, layer, placement in self._moving[:LAYERS_MOVED]:
            self._bytes += self.place(layer, placement)
            self._slots += number
        self._seconds += time.perf_counter() - start
        del self._moving[:LAYERS_MOVED]
        if self._moving:
            return
        self.num_rebalances += 1
        self._done = self._looked = self._pass
        if self.comm.rank == 0:
            before, after = np.mean(self._gains, axis=0)
            log.info(
                "[Rebalance] done: forward_pass_id=%d layers=%d slots=%d bytes=%d "
                "seconds=%.3f; the busiest rank is expected to read %.2f experts a "
                "token in these layers instead of %.2f",
                self._pass - 1, len(self._gains), self._slots, self._bytes,
                self._seconds, after, before,
            )  # fmt: skip
        self._gains, self._bytes, self._slots, self._seconds = [], 0, 0, 0.0
        self._last_skip = ""

    def _skip(self, reason: str) -> None:
        if self.comm.rank:
            return
        # The same reason again and again is of no use to a reader.
        kind = reason.rstrip("0123456789. ").split(" 0.")[0]
        level = logging.DEBUG if kind == self._last_skip else logging.INFO
        self._last_skip = kind
        log.log(level, "[Rebalance] skip: forward_pass_id=%d %s", self._pass - 1,
                reason)  # fmt: skip
