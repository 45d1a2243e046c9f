"""A part of an expert's width, and numbers in runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Columns ``start..stop-1`` of the width F of experts.

    These are rows of the gate and up matrices and columns of the down matrix. The
    outputs of the parts of an expert add up to its output; the bias of the down
    matrix belongs to the part that starts at 0.
    """

    start: int
    stop: int
    width: int

    @property
    def columns(self) -> int:
        return self.stop - self.start

    @property
    def is_first(self) -> bool:
        return self.start == 0


def check_parts(rank_experts: Sequence[Sequence[int]], parts: Sequence[Part]) -> None:
    """That the parts of an expert, over all ranks, make up its width.

    Raises:
        ValueError: they do not, or there are not as many parts as ranks.
    """
    if len(parts) != len(rank_experts):
        raise ValueError(
            f"A placement of {len(rank_experts)} ranks must have as many parts; got "
            f"{len(parts)}."
        )
    held: dict[int, list[Part]] = {}
    for experts, part in zip(rank_experts, parts, strict=True):
        for expert in experts:
            held.setdefault(expert, []).append(part)
    wholes = {tuple(sorted(of_one)) for of_one in held.values()}
    if sorted(held) != list(range(len(held))) or not held:
        raise ValueError(
            f"A placement must hold each of the experts 0..E-1; got {rank_experts}."
        )
    for whole in wholes:
        ends = [0, *(part.stop for part in whole)]
        starts = [*(part.start for part in whole), whole[0].width]
        if starts != ends or any(part.columns < 1 for part in whole):
            raise ValueError(
                "The parts of an expert must make up its width, without gap or "
                f"overlap; got {list(map(tuple, whole))}."
            )


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers, as (first, count), in the given order."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def ranges(numbers: Sequence[int]) -> str:
    """``0..3,7`` of 0, 1, 2, 3, 7."""
    return ",".join(
        f"{first}..{first + count - 1}" if count > 1 else str(first)
        for first, count in runs(numbers)
    )
