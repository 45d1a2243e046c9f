"""From one placement of a layer to another: what stays, and who sends what. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mlx_ep.placement.placement import Placement


class SlotMove(NamedTuple):
    """One expert of a layer that travels.

    Attributes:
        source_slot: of the old placement, on rank `source`.
        target_slot: of the new one, on rank `target`.
    """

    source: int
    source_slot: int
    target: int
    target_slot: int


@dataclass(frozen=True)
class Moves:
    """How a layer's slots change on all ranks.

    Attributes:
        kept: per rank and slot of the new placement, the rank's old slot with the same
            expert; -1: the expert comes from another rank.
        transfers: by source, then target, then slot of the target.
    """

    kept: tuple[tuple[int, ...], ...]
    transfers: tuple[SlotMove, ...]

    @classmethod
    def between(cls, old: Placement, new: Placement) -> Moves:
        """Each expert that a rank lacks comes from the old holder that sends least.

            old  0 1 | 2 3      new  0 2 | 3 1      kept  0 -1 | 1 -1
            transfers: rank 0 slot 1 -> rank 1 slot 1; rank 1 slot 0 -> rank 0 slot 1

        Raises:
            ValueError: the placements are of other experts or ranks, or of parts.
        """
        sizes = [(p.num_experts, p.num_ranks) for p in (old, new)]
        if sizes[0] != sizes[1] or old.parts is not None or new.parts is not None:
            raise ValueError(
                f"Slots move between placements of whole experts on the same ranks; "
                f"got (experts, ranks) {sizes[0]} and {sizes[1]}."
            )
        old_slots = [{e: s for s, e in enumerate(held)} for held in old.rank_experts]
        holders = old.choice.holders
        kept, transfers, sent = [], [], [0] * old.num_ranks
        for target, experts in enumerate(new.rank_experts):
            kept.append(tuple(old_slots[target].get(e, -1) for e in experts))
            for slot, expert in enumerate(experts):
                if expert in old_slots[target]:
                    continue
                source = min(holders[expert], key=lambda rank: (sent[rank], rank))
                sent[source] += 1
                at = old_slots[source][expert]
                transfers.append(SlotMove(source, at, target, slot))
        order = sorted(transfers, key=lambda t: (t.source, t.target, t.target_slot))
        return cls(tuple(kept), tuple(order))

    @cached_property
    def most_of_a_pair(self) -> int:
        """The most experts that go from one rank to another."""
        pairs = [(t.source, t.target) for t in self.transfers]
        return max((pairs.count(pair) for pair in set(pairs)), default=0)

    def pair(self, source: int, target: int) -> list[SlotMove]:
        """What goes from one rank to another, in the order in which it travels."""
        return [t for t in self.transfers if (t.source, t.target) == (source, target)]


def keep_slots(old: Placement, rank_experts: Sequence[Sequence[int]]) -> Placement:
    """A placement of these experts in which those that stay keep their slots.

    New ones get the slots that become free, ascending, and then further ones. Where
    a rank has fewer than before, what is beyond its number of slots moves down.

        old 0 1 2, experts 1 2 5  ->  5 1 2;   experts 2  ->  2
    """
    placed = []
    for before, experts in zip(old.rank_experts, rank_experts, strict=True):
        size, wanted = len(experts), set(experts)
        slots = [e if e in wanted else -1 for e in before[:size]]
        slots += [-1] * (size - len(slots))
        rest = iter(sorted(wanted - set(slots)))
        placed.append(tuple(next(rest) if e < 0 else e for e in slots))
    return Placement(tuple(placed))
