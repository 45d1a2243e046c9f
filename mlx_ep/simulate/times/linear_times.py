"""What a step takes by four numbers, as `mlx_ep.simulate calibrate` fits them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ep import cli
from mlx_ep.simulate.fields import Fields, read_json
from mlx_ep.simulate.scheduler import StepBatch

FORMAT, VERSION = "mlx_ep.step-costs", 1


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step: the sum of these.

    Attributes:
        step: whatever it computes.
        prompt_token: per token of a prompt.
        sequence: per sequence that decodes.
        key: per key that a decoding token sees.
    """

    step: float | int
    prompt_token: float | int
    sequence: float | int
    key: float | int

    def write(self, file: Path) -> None:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        with cli.whole_file(file) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")


def is_step_costs(file: Path) -> bool:
    """Whether a JSON file says that it holds step costs."""
    content = read_json(file)
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_step_costs(file: Path) -> StepCosts:
    """Raises:
    ValueError: which field is wrong.
    """
    found = Fields(str(file), "", read_json(file))
    found.choice("format", (FORMAT,))
    if found.integer("version") != VERSION:
        raise found.fail("version", f"must be {VERSION}.")
    costs = StepCosts(*(found.number(item.name) for item in fields(StepCosts)))
    found.close()
    return costs


class LinearTimes:
    """Steps of a group of instances; in lock step the longest counts.

    Attributes:
        costs: of a step.
        seen: of every stretch of steps that was asked for: its first step, how many,
            and of the first one prompt tokens, sequences and keys.
    """

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self.seen: list[tuple[int, int, int, int, int]] = []

    def stage_ns(
        self, batches: Sequence[StepBatch], steps: int, first_step: int
    ) -> np.ndarray:
        """See `mlx_ep.simulate.group.StepTimes`; one stage."""
        found = []
        for batch in batches:
            count, keys = len(batch.decodes), sum(batch.decodes)
            prompts = batch.prefill_tokens
            self.seen.append((first_step, steps, prompts, count, keys))
            found.append(
                self.costs.step
                + self.costs.prompt_token * prompts
                + self.costs.sequence * count
                + self.costs.key * (keys + count * np.arange(steps))
            )
        longest = np.max(found, axis=0)
        return np.maximum(np.rint(longest * 1e9), 1).astype(np.int64)[None]

    def features(self, steps: int) -> np.ndarray:
        """``[steps, 4]``: what each step is multiplied with, of a group of one.

        A stretch may have been asked for longer than it was run: what came later
        counts.
        """
        table: Any = np.zeros((steps, 4))
        for first, count, prompts, sequences, keys in self.seen:
            last = min(first + count, steps)
            later = np.arange(last - first)
            table[first:last, 0] = 1
            table[first:last, 1] = prompts
            table[first:last, 2] = sequences
            table[first:last, 3] = keys + sequences * later
        return np.asarray(table)  # on host
