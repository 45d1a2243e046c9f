"""What the router did: counts, co-activations, and how even the ranks' loads were.

Routed ids are kept as they are, and counted some steps later, when they have been
computed long since: nothing waits for the device, and counting many steps at once is
cheap.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from jaxtyping import Int

from mlx_ep.placement import Placement, RecordedRouting, write_record
from mlx_ep.types import to_host

log = logging.getLogger("mlx_ep")

WINDOWS = (10, 100, 1000)
# Passes that are kept uncounted. The last ones may not be computed yet.
MOST_UNCOUNTED, LEAST_UNCOUNTED = 64, 4


class RoutingRecorder:
    """Counts the routing of a model's MoE layers on this rank.

    A pass ends when its first layer is called again. For each, when it is counted, the
    logger `mlx_ep` has at level DEBUG, and for the last one of all at level INFO,

        [Expert Balancedness] forward_pass_id=7 current_pass_balancedness=0.812
        last_10_average_balancedness=0.793 ...

    in one line: the mean over the layers of ``mean / max`` of the ranks' rows, for the
    pass and its averages over 10, 100 and 1000; then the same of the distinct experts
    that ranks read.

    Args:
        placements: of the experts of each MoE layer, for the loads of ranks.
        is_apart: each rank computes its own tokens (strategy `local`): this one does
            not know the loads of others, and says nothing of their balance.
    """

    def __init__(self, placements: Sequence[Placement], is_apart: bool = False) -> None:
        self._placements, self._is_apart = list(placements), is_apart
        self.num_layers, self.top_k = len(placements), 0
        self.num_experts = placements[0].num_experts
        self.is_running = False
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded."""
        size = self.num_experts
        self._both = np.zeros((self.num_layers, size, size), np.int64)
        self._passes: deque[dict[int, mx.array]] = deque()
        self._balance: deque[tuple[float, float]] = deque(maxlen=max(WINDOWS))
        self.num_passes = self.num_tokens = 0

    def start(self) -> None:
        """Record from now on."""
        self.is_running = True

    def stop(self) -> None:
        """Record no more; what was recorded stays."""
        self.is_running = False
        self._count(len(self._passes))
        if self._balance:
            log.info(self.line())

    def place(self, layer: int, placement: Placement) -> None:
        """A layer has another placement from now on."""
        self._count(max(len(self._passes) - LEAST_UNCOUNTED, 0))
        self._placements[layer] = placement

    def take(self) -> tuple[Int[np.ndarray, "layers E E"], list[tuple[float, float]]]:
        """What was recorded since the last time, which is forgotten here.

        The last passes, which may not be computed yet, are left for the next time.

        Returns:
            The coactivations, and the balancedness of each pass (of at most the last
            1000): of rows, and of distinct experts.
        """
        self._count(max(len(self._passes) - LEAST_UNCOUNTED, 0))
        both, self._both = self._both, np.zeros_like(self._both)
        evenness = list(self._balance)
        self._balance.clear()
        return both, evenness

    def observer(self, layer: int) -> Callable[[mx.array], None]:
        """What takes the routed ids ``[T, K]`` of one layer's calls."""

        def observe(expert_ids: mx.array) -> None:
            if not self.is_running:
                return
            if not self._passes or layer in self._passes[-1]:
                self._passes.append({})
                if len(self._passes) > MOST_UNCOUNTED:
                    self._count(len(self._passes) - LEAST_UNCOUNTED)
            self._passes[-1][layer] = expert_ids
            self.top_k = expert_ids.shape[1]

        return observe

    @property
    def coactivations(self) -> Int[np.ndarray, "layers E E"]:
        """Tokens that took both of two experts; on the diagonal, one."""
        self._count(len(self._passes))
        return self._both

    @property
    def balancedness(self) -> list[tuple[float, float]]:
        """Of the last passes, oldest first: of rows, and of distinct experts."""
        self._count(len(self._passes))
        return list(self._balance)

    def record(self) -> RecordedRouting:
        """What was recorded on this rank."""
        return RecordedRouting(self.coactivations, self.top_k)

    def dump(self, path: str | Path) -> None:
        """Write what was recorded on this rank (`mlx_ep.placement.record`).

        Raises:
            ValueError: nothing was recorded, or the name does not end in .npz.
        """
        record = self.record()
        if not record.coactivations.any():
            raise ValueError(
                "Nothing was recorded: no layer ran between start and stop."
            )
        write_record(path, record, num_tokens=self.num_tokens)

    def _count(self, num_passes: int) -> None:
        """Count the oldest passes, each layer's together."""
        by_layer: dict[int, list[np.ndarray]] = {}
        numbers: dict[int, list[int]] = {}
        sums, layers_of = np.zeros((num_passes, 2)), np.zeros((num_passes, 1))
        for number in range(num_passes):
            layers = self._passes.popleft()
            for layer, array in layers.items():
                # sync: ids of earlier passes, which have been computed.
                ids = to_host(array)
                by_layer.setdefault(layer, []).append(ids)
                numbers.setdefault(layer, []).append(number)
            self.num_tokens += len(ids)
            layers_of[number] = len(layers)
        for layer, found in by_layer.items():
            lengths = [len(ids) for ids in found]
            ids = np.concatenate(found).astype(np.int32)
            if not self._is_apart:
                sums[numbers[layer]] += self._evenness(layer, ids, lengths)
            taken = np.zeros((len(ids), self.num_experts + 1), np.float32)
            np.put_along_axis(taken, ids, 1.0, axis=1)  # -1 is the last column
            taken = taken[:, :-1]
            self._both[layer] += np.rint(taken.T @ taken).astype(np.int64)
        if self._is_apart:
            self.num_passes += num_passes
            return
        for rows, distinct in (sums / layers_of).tolist():  # on host
            self._note_pass(rows, distinct)

    def _evenness(self, layer: int, ids: np.ndarray, lengths: list[int]) -> np.ndarray:
        """``[passes, 2]``: mean over maximum of the ranks' rows, and of their experts.

        Args:
            ids: of one layer, all passes.
            lengths: tokens of each pass.
        """
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        loads = [_rank_loads(part, self._placements[layer]) for part in parts]
        found = [[_evenness(n) for n in of_pass] for of_pass in loads]
        return np.array(found)  # on host

    def _note_pass(self, rows: float, distinct: float) -> None:
        self._balance.append((rows, distinct))
        self.num_passes += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug(self.line())

    def line(self) -> str:
        """Of the last pass that was counted."""
        table = np.array(self._balance)  # on host
        parts = [f"[Expert Balancedness] forward_pass_id={self.num_passes - 1}"]
        for column, name in enumerate(("balancedness", "activated_balancedness")):
            values = table[:, column]
            parts.append(f"current_pass_{name}={values[-1]:.3f}")
            parts += [
                f"last_{n}_average_{name}={values[-n:].mean():.3f}" for n in WINDOWS
            ]
        return " ".join(parts)


def _evenness(loads: np.ndarray) -> float:
    """Mean over maximum; 1: all alike, or nothing to do."""
    numbers = loads.tolist()  # on host
    most = max(numbers)
    return sum(numbers) / (len(numbers) * most) if most else 1.0


def _rank_loads(ids: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Rows and distinct experts of each rank."""
    slots = placement.serve(ids)
    slots = slots[slots >= 0]
    of_slot, num_ranks = placement.slots.expert_ranks, placement.num_ranks
    rows = np.bincount(of_slot[slots], minlength=num_ranks)
    if len(ids) == 1:
        return rows, rows
    return rows, np.bincount(of_slot[np.unique(slots)], minlength=num_ranks)
