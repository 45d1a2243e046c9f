"""Which experts get copies, and where: our own placement, for unequal ranks.

Let ``n(A)`` be the work of a step that only ranks of the set A can do (experts all of
whose copies are in A). The busiest rank has at least ``n(A) / speed(A)`` for every A,
and with the choice of `choice.py` no more than the largest of these, rounded up. A
placement is good if all of them are low in every step, so what is made small here is

    sum over A of  E[n(A)^2] / speed(A)^2
    E[n(A)^2] = sum over experts e, f of A of  C[e, f]

where C counts how often two experts occur in one step (on its diagonal, how often one
does). That takes in both the load of a rank and its spread from step to step: experts
that occur together repel each other. Objective `rows` is the same with ``C[e, f] =
rows[e] * rows[f]``: rows can be divided, so only their mean counts.

Within a layer copies are added one by one, each where it takes most from that sum.
Which layer is next is decided by what the copies take from the busiest rank's work, on
steps drawn as the layer's load has them: a layer with skewed load gets more of the
memory.

Sources: EPLB (github.com/deepseek-ai/EPLB) copies by rows and packs greedily; METRO
(arXiv:2512.09277) says why activated experts count in decode; CRAFT
(arXiv:2603.28768) divides one memory budget among layers by what a copy gains; FlashLB
(vllm-ascend) weighs the spread of loads over steps beside their mean.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_ep.placement.layer_copies import LayerCopies, RankSets
from mlx_ep.placement.load import LayerLoad, Objective, draw_steps, expected_busiest
from mlx_ep.placement.shares import apportion

DRAWN_STEPS = 1000  # of each layer, to know what copies gain
COPIES_AT_ONCE = 32  # parts of the experts that a layer gets at once


@dataclass(frozen=True)
class RankRoom:
    """What one rank has for experts.

    Attributes:
        num_bytes: for experts and copies of all layers.
        slots: most in one layer; None: as many as the bytes hold.
        speed: of reading experts, any unit.
    """

    num_bytes: int
    slots: int | None = None
    speed: float = 1.0


class Balanced(NamedTuple):
    """What was decided.

    Attributes:
        layers: per layer the experts of each rank, in slot order; an expert may be on
            several ranks, never twice on one.
        num_copies: of all layers, beyond one of each expert.
        copy_bytes: of them.
    """

    layers: tuple[tuple[tuple[int, ...], ...], ...]
    num_copies: int
    copy_bytes: int


def balance(
    loads: Sequence[LayerLoad],
    ranks: Sequence[RankRoom],
    expert_bytes: Sequence[int],
    *,
    objective: Objective = "activated",
    replica_bytes: int | None = None,
    base: Sequence[Sequence[int]] | None = None,
) -> Balanced:
    """Place experts, and copies of them for one memory budget.

    Args:
        loads: of each layer.
        ranks: what each rank has.
        expert_bytes: of one expert of each layer.
        objective: "activated": the busiest rank's distinct experts, which is decode;
            "rows": its rows, which is prefill.
        replica_bytes: of all copies beyond one of each expert, on all ranks together;
            None: as much as the ranks have.
        base: the experts of each rank before copies; None: as many as are in proportion
            to its speed, as far as its memory goes, where they add least.

    Raises:
        ValueError: the experts do not fit.
    """
    copies = _Copies(loads, ranks, expert_bytes, objective, base)
    copies.add(replica_bytes)
    return copies.result()


def balance_while_it_pays(
    loads: Sequence[LayerLoad],
    ranks: Sequence[RankRoom],
    expert_bytes: Sequence[int],
    *,
    objective: Objective = "activated",
    base: Sequence[Sequence[int]] | None = None,
    least_gain: float = 0.01,
    parts: int = 16,
) -> tuple[Balanced, list[float]]:
    """As `balance`, with copies as long as they pay.

    Copies are added in steps of ``E / parts`` per layer. It stops before the first
    step that lowers the expected work of the busiest rank by less than `least_gain`,
    or where the memory ends.

    Returns:
        The placement, and that expectation without copies and after each step that was
        taken. The last entry is that of the step that was not worth it, if any.
    """
    num_experts = len(loads[0].used)
    step = max(1, num_experts // parts) * sum(expert_bytes)
    copies = _Copies(loads, ranks, expert_bytes, objective, base)
    expected, best = [copies.expected()], copies.result()
    while True:
        copies.add(step)
        now = copies.result()
        if now.num_copies == best.num_copies:
            return best, expected
        expected.append(copies.expected())
        if expected[-1] > expected[-2] * (1 - least_gain):
            return best, expected
        best = now


def _counts(num_experts: int, ranks: Sequence[RankRoom], all_layers: int) -> list[int]:
    limits = [
        min(
            rank.num_bytes // max(all_layers, 1),
            num_experts if rank.slots is None else rank.slots,
        )
        for rank in ranks
    ]
    if sum(limits) < num_experts:
        raise ValueError(
            f"{num_experts} experts of {all_layers} bytes (all layers) must fit the "
            f"ranks, which have room for {limits}. Use more ranks or more memory."
        )
    speeds = [round(1000 * rank.speed) for rank in ranks]
    return apportion(num_experts, speeds, limits)


class _Copies:
    """The layers of a model while copies are added to them."""

    def __init__(
        self,
        loads: Sequence[LayerLoad],
        ranks: Sequence[RankRoom],
        expert_bytes: Sequence[int],
        objective: Objective,
        base: Sequence[Sequence[int]] | None,
    ) -> None:
        num_experts = len(loads[0].used)
        if base is not None:
            counts = [len(experts) for experts in base]
        else:
            counts = _counts(num_experts, ranks, sum(expert_bytes))
        self.ranks, self.objective = ranks, objective
        self.room = np.array([r.num_bytes for r in ranks], np.int64)  # on host
        self.room -= np.array(counts, np.int64) * sum(expert_bytes)
        self.most = np.array(
            [num_experts if rank.slots is None else rank.slots for rank in ranks]
        )
        self.num_copies = self.copy_bytes = 0
        self._steps: list[np.ndarray] = []
        # Layers that are alike are placed once, as one: without a record all are.
        self.sizes: list[int] = []
        self.layers: list[LayerCopies] = []
        self.index: list[int] = []
        known: dict[tuple[bytes, int], int] = {}
        sets = RankSets([rank.speed for rank in ranks])
        for load, size in zip(loads, expert_bytes, strict=True):
            moments = load.moments(objective)
            key = moments.tobytes(), size
            if key not in known:
                known[key] = len(self.layers)
                self.layers.append(LayerCopies(moments, sets, counts, base))
                self.sizes.append(0)
                if objective == "rows":
                    self._steps.append(np.sqrt(np.diag(moments))[None])
                else:
                    self._steps.append(draw_steps(load, DRAWN_STEPS))
            self.index.append(known[key])
            self.sizes[known[key]] += size
        self.times = np.bincount(self.index)

    def add(self, num_bytes: int | None) -> None:
        """Copies of so many bytes in all; None: as many as there is room for.

        A layer gets them a few at a time, the next ones where they take most from the
        busiest rank's work per byte.
        """
        left = int(self.room.sum()) if num_bytes is None else num_bytes
        queue = [self._ahead(i, left) for i in range(len(self.layers))]
        heapq.heapify(queue)
        while queue:
            ahead = heapq.heappop(queue)
            if not ahead.num_copies:
                continue
            if self.objective == "rows" and self._is_level(ahead.number):
                continue
            size = self.sizes[ahead.number]
            num_bytes = ahead.num_copies * size
            if num_bytes > left or (ahead.taken > self.room).any():
                # Other layers took the room meanwhile.
                heapq.heappush(queue, self._ahead(ahead.number, left))
                continue
            self.layers[ahead.number] = ahead.layer
            self.room -= ahead.taken
            left -= num_bytes
            self.num_copies += ahead.num_copies * int(self.times[ahead.number])
            self.copy_bytes += num_bytes
            heapq.heappush(queue, self._ahead(ahead.number, left))

    def _ahead(self, index: int, left: int) -> _Ahead:
        """A layer with a few more copies."""
        layer, size = self.layers[index].copy(), self.sizes[index]
        room, num_copies = self.room.copy(), 0
        few = max(1, len(layer.on) // COPIES_AT_ONCE)
        while num_copies < few and (num_copies + 1) * size <= left:
            if layer.best(self.most, room >= size) <= 0:
                break
            room[layer.add_best()] -= size
            num_copies += 1
        gain = 1.0
        if len(self.layers) > 1 or self.objective == "rows":
            gain = self._work(index, self.layers[index]) - self._work(index, layer)
        per_byte = gain * int(self.times[index]) / max(num_copies * size, 1)
        return _Ahead(-per_byte, index, num_copies, layer, self.room - room)

    def _is_level(self, number: int) -> bool:
        """Whether a layer's rows are: more copies gain nothing."""
        least = 1 / sum(rank.speed for rank in self.ranks)
        return self._work(number, self.layers[number]) <= least * (1 + 1e-9)

    def result(self) -> Balanced:
        made = [layer.rank_experts() for layer in self.layers]
        layers = tuple(made[index] for index in self.index)
        return Balanced(layers, self.num_copies, self.copy_bytes)

    def expected(self) -> float:
        """The busiest rank's work, mean over the layers."""
        work = [
            self._work(number, layer, rounded=True)
            for number, layer in enumerate(self.layers)
        ]
        return float(np.average(work, weights=self.times))

    def _work(self, number: int, layer: LayerCopies, rounded: bool = False) -> float:
        speeds = [rank.speed for rank in self.ranks]
        if self.objective == "rows":
            rounded = False
        alike = rounded and len(set(speeds)) == 1
        steps = self._steps[number]
        return expected_busiest(layer.rank_experts(), steps, None if alike else speeds)


class _Ahead(NamedTuple):
    """A layer with its next copies; ordered by what they gain per byte, negated."""

    minus_gain: float
    number: int
    num_copies: int
    layer: LayerCopies
    taken: np.ndarray
