"""The map expert -> (rank, slot), and its use on routed ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate, pairwise

import mlx.core as mx
import numpy as np
from jaxtyping import Int32, Integer

from mlx_ep.placement.choice import DECODE_TOKENS, ReplicaChoice
from mlx_ep.placement.level import level_rows
from mlx_ep.placement.parts import Part, check_parts, ranges
from mlx_ep.placement.stages import StageLayers


@dataclass(frozen=True)
class Placement:
    """Which experts each rank holds, in slot order, and which part of their width.

    Attributes:
        rank_experts: one tuple per rank; ``rank_experts[r][s]`` is the expert in
            slot s of rank r. Ranks may hold different numbers, also none. An expert
            may have copies on several ranks; `serve` says which one a step uses.
        parts: one per rank: what it holds of the width of its experts, an expert then
            lives on several ranks; None where ranks hold whole experts.
        note: why there are as many copies as there are, for a person.
        layers: of each MoE layer once the model is loaded, where layers differ; this
            placement is then what a checkpoint is read by, the same in all layers.
        stage: the layers that these ranks hold, one stage of a pipeline; None: all.

    Raises:
        ValueError: the tuples do not hold each of the experts 0..E-1, one is twice on
            a rank, the parts of an expert are not its width, or a layer's placement
            is of other experts or ranks.
    """

    rank_experts: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...] | None = None
    note: str = field(default="", compare=False)
    layers: tuple[Placement, ...] = ()
    stage: StageLayers | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for layer in self.layers:
            sizes = layer.num_experts, layer.num_ranks
            is_whole = self.parts is None and layer.parts is None
            if sizes != (self.num_experts, self.num_ranks) or not is_whole:
                raise ValueError(
                    f"A layer's placement must be of {self.num_experts} whole experts "
                    f"on {self.num_ranks} ranks; got {sizes[0]} on {sizes[1]}."
                )
        if self.parts is not None:
            check_parts(self.rank_experts, self.parts)
            return
        if self.is_dense:
            return
        held = sorted({expert for rank in self.rank_experts for expert in rank})
        is_twice = any(len(set(rank)) < len(rank) for rank in self.rank_experts)
        if not held or held != list(range(len(held))) or is_twice:
            raise ValueError(
                "A placement must hold each of the experts 0..E-1, none twice on a "
                f"rank; got {self.rank_experts}."
            )

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Consecutive experts on each rank, the first ranks taking the remainder.

        10 experts on 4 ranks: 3, 3, 2, 2. 2 experts on 3 ranks: 1, 1, 0.

        Raises:
            ValueError: num_experts or num_ranks is below 1.
        """
        if num_experts < 1 or num_ranks < 1:
            raise ValueError(
                "A placement needs at least 1 expert and 1 rank; got "
                f"{num_experts} experts and {num_ranks} ranks."
            )
        share, remainder = divmod(num_experts, num_ranks)
        return cls.from_counts([share + (r < remainder) for r in range(num_ranks)])

    @classmethod
    def of_model(cls, num_experts: int, num_ranks: int) -> Placement:
        """`contiguous`; of a dense model (0 experts) one in which no rank has any."""
        if num_experts == 0:
            return cls(((),) * num_ranks)
        return cls.contiguous(num_experts, num_ranks)

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> Placement:
        """Consecutive experts, ``counts[r]`` of them on rank r.

        2, 0, 3: experts 0 and 1 on rank 0, none on rank 1, 2 to 4 on rank 2.
        """
        ends = pairwise(accumulate(counts, initial=0))
        return cls(tuple(tuple(range(start, stop)) for start, stop in ends))

    @classmethod
    def from_groups(
        cls, counts: Sequence[int], widths: Sequence[Sequence[int]]
    ) -> Placement:
        """Consecutive experts in groups of consecutive ranks that share their width.

        Counts 2, 1 and widths (5, 3), (4, 4) of F = 8:

            rank 0   experts 0 1   columns 0..4
            rank 1   experts 0 1   columns 5..7
            rank 2   expert 2      columns 0..3
            rank 3   expert 2      columns 4..7

        Args:
            counts: experts of each group.
            widths: columns of each rank of each group.
        """
        experts, parts = [], []
        for group, of_ranks in zip(cls.from_counts(counts).rank_experts, widths):
            for start, stop in pairwise(accumulate(of_ranks, initial=0)):
                experts.append(group)
                parts.append(Part(start, stop, sum(of_ranks)))
        return cls(tuple(experts), tuple(parts))

    @property
    def num_ranks(self) -> int:
        return len(self.rank_experts)

    @property
    def is_dense(self) -> bool:
        """Whether there are ranks and no expert on any: the model has none."""
        return bool(self.rank_experts) and not any(self.rank_experts)

    @cached_property
    def num_experts(self) -> int:
        return len({expert for experts in self.rank_experts for expert in experts})

    def part(self, rank: int) -> Part | None:
        """What `rank` holds of the width of its experts; None: all of it."""
        return self.parts[rank] if self.parts is not None else None

    def of_layer(self, layer: int) -> Placement:
        """The placement of one MoE layer, by its number from 0 on."""
        return self.layers[layer] if self.layers else self

    @cached_property
    def digest(self) -> str:
        """A short text that differs where placements do."""
        content = f"{self.rank_experts}{self.parts and list(map(tuple, self.parts))}"
        content += "".join(layer.digest for layer in self.layers)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def num_slots(self, rank: int) -> int:
        """L, the experts that `rank` holds."""
        return len(self.rank_experts[rank])

    @cached_property
    def num_copies(self) -> int:
        """Slots of all ranks beyond one of each expert; of whole experts."""
        return sum(map(len, self.rank_experts)) - self.num_experts

    @cached_property
    def has_replicas(self) -> bool:
        """Whether an expert has copies, on several ranks."""
        return self.parts is None and self.num_copies > 0

    @cached_property
    def is_everywhere(self) -> bool:
        """Whether every rank holds every expert whole, in all layers."""
        held = {len(set(experts)) for experts in self.rank_experts}
        is_whole = self.parts is None and held == {self.num_experts}
        return is_whole and all(layer.is_everywhere for layer in self.layers)

    @cached_property
    def slots(self) -> Placement:
        """The slots of all ranks counted through, each in one place.

        What `serve` returns are its "experts". Without copies: this placement.

            rank 0: experts 0 1 2   rank 1: experts 2 3   ->   0 1 2 | 3 4
        """
        if not self.has_replicas:
            return self
        return _of_counts(tuple(len(experts) for experts in self.rank_experts))

    @cached_property
    def choice(self) -> ReplicaChoice:
        """Chooses among the copies of experts."""
        holders: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.rank_experts):
            for expert in experts:
                holders[expert].append(rank)
        return ReplicaChoice(holders, self.num_ranks)

    def serve(
        self, expert_ids: Int32[np.ndarray, "T K"], levels_rows: bool = False
    ) -> Int32[np.ndarray, "T K"]:
        """The slot that serves each routed expert, as `slots` counts them; -1 for -1.

        A function of the ids alone: ranks that know the same ids decide alike. Up to
        `DECODE_TOKENS` tokens the busiest rank reads as few experts as is possible,
        above it has as few rows.

        Args:
            expert_ids: of all tokens that are computed together.
            levels_rows: up to `DECODE_TOKENS` tokens, of the choices with as few
                experts on the busiest rank take one with few rows on the busiest.
        """
        if not self.has_replicas:
            return expert_ids
        if len(expert_ids) <= DECODE_TOKENS:
            flat, table = expert_ids.reshape(-1).tolist(), self._slot_numbers  # on host
            chosen = self._chosen(flat, levels_rows and len(expert_ids) > 1)
            of_expert = {e: table[rank][e] for e, rank in chosen.items()}
            of_expert[-1] = -1
            slots = np.array([of_expert[e] for e in flat], np.int32)  # on host
            return slots.reshape(expert_ids.shape)
        ranks = self.choice.rows(expert_ids)
        return np.where(ranks < 0, -1, self.slot_table[ranks, expert_ids])

    def serve_on(
        self, expert_ids: list[list[int]], rank: int, levels_rows: bool = False
    ) -> list[list[int]]:
        """The slots on `rank` that `serve` chooses, -1 where another rank serves.

        In Python, for steps of decode: NumPy's functions take 10 to 60 us each
        between layers (measured on x86), and there is one call per layer.

        Args:
            expert_ids: [T, K] with T up to `DECODE_TOKENS`.
            levels_rows: see `serve`.
        """
        flat = [expert for row in expert_ids for expert in row]
        chosen = self._chosen(flat, levels_rows and len(expert_ids) > 1)
        numbers = self._local_numbers[rank]
        local = {e: numbers[e] if r == rank else -1 for e, r in chosen.items()}
        local[-1] = -1
        return [[local[expert] for expert in row] for row in expert_ids]

    def _chosen(self, flat: list[int], levels_rows: bool) -> dict[int, int]:
        """The rank that serves each distinct expert of a step of decode."""
        if not levels_rows:
            return self.choice.experts(flat)
        return level_rows(self.choice, Counter(e for e in flat if e >= 0))

    @cached_property
    def _local_numbers(self) -> list[dict[int, int]]:
        """Per rank, the slot on it of each expert that it holds."""
        return [{e: slot for slot, e in enumerate(own)} for own in self.rank_experts]

    @cached_property
    def _slot_numbers(self) -> list[list[int]]:
        return self.slot_table.tolist()  # on host

    @cached_property
    def slot_table(self) -> Int32[np.ndarray, "P E"]:
        """Per rank the slot of each expert, counted through all ranks; -1: none."""
        table = np.full((self.num_ranks, self.num_experts), -1, np.int32)
        first = 0
        for row, experts in zip(table, self.rank_experts):
            row[list(experts)] = first + np.arange(len(experts))
            first += len(experts)
        return table

    @cached_property
    def expert_ranks(self) -> Int32[np.ndarray, " E"]:
        """The first rank that holds each expert; of a shared width the first part.

        So each expert is named once. What has to reach all parts of an expert asks
        `local_slots` of every rank.
        """
        ranks = np.empty(self.num_experts, np.int32)
        for rank, experts in reversed(list(enumerate(self.rank_experts))):
            part = self.part(rank)
            if part is None or part.is_first:
                ranks[list(experts)] = rank
        return ranks

    @cached_property
    def expert_slots(self) -> Int32[np.ndarray, " E"]:
        """The slot of each expert on the rank that holds it (`expert_ranks`)."""
        slots = np.empty(self.num_experts, np.int32)
        for rank, experts in reversed(list(enumerate(self.rank_experts))):
            part = self.part(rank)
            if part is None or part.is_first:
                slots[list(experts)] = np.arange(len(experts))
        return slots

    def local_slots(
        self, expert_ids: Integer[mx.array, "... K"], rank: int
    ) -> Integer[mx.array, "... K"]:
        """The slot on `rank` of each routed expert, -1 where it lives elsewhere.

        An id of -1 (no expert) gives -1. Every rank that holds a part of an expert has
        a slot for it: their outputs add up. int32; a rank that has everything in order
        gives the ids themselves. Where experts have copies, ask this of `slots`, with
        what `serve` chose.
        """
        assert not self.has_replicas, "every copy would be counted"
        return self.own_slots(expert_ids, rank)

    def own_slots(
        self, expert_ids: Integer[mx.array, "... K"], rank: int
    ) -> Integer[mx.array, "... K"]:
        """The slot of `rank`'s own copy of each routed expert; -1 where it has none.
        For a rank that computes its tokens alone.
        """
        if self.has_all_in_order(rank):
            return expert_ids
        return self._slot_tables[rank][expert_ids]

    def local_slots_on_host(
        self, expert_ids: Int32[np.ndarray, "T K"], rank: int
    ) -> Int32[np.ndarray, "T K"]:
        """`local_slots` of ids that the host has."""
        assert not self.has_replicas, "every copy would be counted"
        return self._host_slot_tables[rank][expert_ids]

    def has_all_in_order(self, rank: int) -> bool:
        """Whether `rank` holds every expert, in the slot of its number."""
        return self._in_order[rank]

    @cached_property
    def _in_order(self) -> list[bool]:
        everything = tuple(range(self.num_experts))
        return [experts == everything for experts in self.rank_experts]

    @cached_property
    def _slot_tables(self) -> list[mx.array]:
        return [mx.array(table) for table in self._host_slot_tables]

    @cached_property
    def _host_slot_tables(self) -> Int32[np.ndarray, "P more"]:
        """Per rank, the slot of each expert or -1.

        Entry E answers for the id -1, which as an index means "the last one".
        """
        tables = np.full((self.num_ranks, self.num_experts + 1), -1, np.int32)
        for table, experts in zip(tables, self.rank_experts):
            table[list(experts)] = np.arange(len(experts))
        return tables

    def describe(self, rank: int) -> str:
        """For a person: ``experts 32..63 (32 of 64 per layer)``.

        Of a stage with its layers before: ``layers 0..3 of 8; experts ...``.

        With parts: ``experts 32..63 (32 of 64 per layer), width 0..383 of 768``.
        """
        if self.stage is not None:
            whole = replace(self, stage=None)
            return f"{self.stage.describe()}; {whole.describe(rank)}"
        if self.is_dense:
            return "a dense model, without routed experts"
        experts = self.rank_experts[rank]
        share = f"({len(experts)} of {self.num_experts} per layer)"
        text = f"experts {ranges(experts) or 'none'} {share}"
        if self.layers:
            of_layers = [layer.num_copies for layer in self.layers]
            return (
                f"{text}; {sum(of_layers)} copies in all layers, {min(of_layers)} to "
                f"{max(of_layers)} of a layer{self.note and ': '}{self.note}"
            )
        if self.has_replicas:
            return (
                f"{text}; {self.num_copies} copies on all ranks"
                f"{self.note and ': '}{self.note}"
            )
        part = self.part(rank)
        if part is None or not experts:
            return text
        return f"{text}, width {part.start}..{part.stop - 1} of {part.width}"


@cache
def _of_counts(counts: tuple[int, ...]) -> Placement:
    """One for all layers that have so many slots."""
    return Placement.from_counts(counts)
