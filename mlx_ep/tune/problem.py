"""What has several ways to be done: the protocol that experts and movement share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

from mlx_ep.rows import Option

# The size of a case -> its outputs, not evaluated yet.
Solver = Callable[[int], list[mx.array]]


@runtime_checkable
class Problem(Protocol):
    """Something that each option does alike, and not as fast.

    A call has parts that cost alike, such as the slots that its rows visit. What a part
    takes is measured, by its size; what a call takes follows from its parts.

    Attributes:
        title: for a person, ``Experts of ...``.
        task: what an option does, ``run the experts of ...``.
        unit: what sizes count, ``row``.
        part: what is counted for, ``slot``.
        runner: the runner that the configuration forces, or ``auto``.
        tolerance: the largest difference to the reference that is right, relative to
            the largest number.
        case_parts: parts of each call of a case.
        is_held: whether this rank has anything of it; else it has no opinion.
    """

    @property
    def title(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def part(self) -> str: ...
    @property
    def runner(self) -> str: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def case_parts(self) -> int: ...
    @property
    def is_held(self) -> bool: ...

    @property
    def key(self) -> Mapping[str, Any]:
        """What a result depends on beside the machine and the code; for the cache."""
        ...

    def options(self) -> Mapping[Option, str]:
        """Every option, in one order on all ranks; why it is impossible here, or ""."""
        ...

    def is_worth_checking(self, possible: Sequence[Option]) -> bool:
        """Whether to measure at all."""
        ...

    def reference(self) -> Mapping[int, list[np.ndarray]]:
        """What is right, by the size of the case, ascending; in float32."""
        ...

    def solver(self, option: Option) -> Solver:
        """What computes the cases of `reference` by an option."""
        ...

    def case_calls(self, size: int) -> int:
        """Calls of a case of that size, each of which waits for the one before."""
        ...

    def parts(self, num_tokens: int) -> tuple[float, float]:
        """How many parts a call of so many tokens has, and the size of each."""
        ...

    def default(self, num_tokens: int, possible: Sequence[Option]) -> Option:
        """What does a call as long as nothing has been measured."""
        ...


def counted(count: int, unit: str) -> str:
    """``1 row``, ``4 rows``."""
    return f"{count} {unit}{'s' * (count != 1)}"
