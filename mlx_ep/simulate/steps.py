"""The steps of one group: when each ended, and what it held."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Stretch(NamedTuple):
    """Steps that are alike.

    Attributes:
        step: the first; `steps` of them.
        prompts, outputs: tokens that each computes of prompts, and makes.
        running, waiting: requests.
        memory: bytes that the fullest device has in use.
        pool: part of the KV blocks in use, of the fullest instance.
    """

    step: int
    steps: int
    prompts: int
    outputs: int
    running: int
    waiting: int
    memory: float | int
    pool: float | int


class StepLog:
    """Ends of steps, by number, and stretches of steps that are alike."""

    def __init__(self) -> None:
        self._ends = np.zeros(1024, np.int64)
        self.count = 0
        self.stretches: list[Stretch] = []

    @property
    def ends(self) -> np.ndarray:
        """``[steps]`` ns."""
        return self._ends[: self.count]

    def add(self, ends: np.ndarray, stretch: Stretch) -> None:
        needed = self.count + len(ends)
        if needed > len(self._ends):
            grown = np.zeros(max(needed, 2 * len(self._ends)), np.int64)
            grown[: self.count] = self.ends
            self._ends = grown
        self._ends[self.count : needed] = ends
        self.count = needed
        self.stretches.append(stretch)
