"""Every option for a problem, checked against its float32 reference and timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ep.rows import Option
from mlx_ep.tune.problem import Problem, Solver, counted
from mlx_ep.tune.timing import in_turn, seconds_of
from mlx_ep.types import to_host

# Of what is checked and how: results of another version are measured again.
CHECKS_VERSION = 4
# An option is not timed with a larger case where the call would probably take longer.
MAX_SECONDS = 0.1
TIMED_SECONDS = 0.01  # a call is repeated until it has taken so long


@dataclass(frozen=True)
class Finding:
    """What was found out about one option.

    Attributes:
        sizes: of a part, ascending; of experts the rows that visit a slot.
        seconds: of one part of so many, its share of a call.
        error: the largest difference to the reference, relative to the largest output.
        left_out: why it must not be used, or "".
    """

    sizes: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    error: float = 0.0
    left_out: str = ""

    def of_size(self, size: float | int) -> float:
        """Between measurements and beyond them, on the straight line of the nearest."""
        if len(self.sizes) == 1:
            return self.seconds[0] * max(1.0, size / self.sizes[0])
        last = len(self.sizes) - 1
        upper = next((i for i in range(1, last) if self.sizes[i] >= size), last)
        (x0, x1), (y0, y1) = (
            v[upper - 1 : upper + 1] for v in (self.sizes, self.seconds)
        )
        # Noise must not make a larger part cheaper.
        slope = max(0.0, (y1 - y0) / (x1 - x0))
        return max(y0 + slope * (size - x0), self.seconds[0])

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: object) -> Finding:
        """The record of `to_json`.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(content, Mapping) or set(content) != set(cls().to_json()):
            raise ValueError(f"it must have {', '.join(cls().to_json())}")
        series = {name: content[name] for name in ("sizes", "seconds")}
        for name, values in series.items():
            if not isinstance(values, Sequence) or not all(map(_is_number, values)):
                raise ValueError(f"{name} must be numbers from 0 on")
        sizes = tuple(series["sizes"])
        if len(sizes) != len(series["seconds"]) or list(sizes) != sorted(set(sizes)):
            raise ValueError("sizes must ascend, and have seconds each")
        error, left_out = content["error"], content["left_out"]
        if not isinstance(error, float | int) or not isinstance(left_out, str):
            raise ValueError("error must be a number and left_out a text")
        return cls(sizes, tuple(series["seconds"]), error, left_out)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < float("inf")


@dataclass
class _Trial:
    """An option while it is tried."""

    solver: Solver | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    error: float = 0.0
    left_out: str = ""
    is_done: bool = False

    def leave_out(self, why: str) -> None:
        self.left_out, self.is_done = why, True


def measure(problem: Problem, options: Iterable[Option]) -> dict[Option, Finding]:
    """Check and time options, in turn: load of the machine hits all of them alike.

    Args:
        problem: what they do.
        options: those that are possible in this process.
    """
    trials = {option: _Trial() for option in options}
    reference = problem.reference()
    for size, expected in reference.items():
        firsts: dict[Option, float] = {}
        for option, trial in trials.items():
            if not trial.is_done:
                firsts[option] = _check(problem, option, trial, size, expected)
        calls = {o: _Evaluated(o, t, size) for o, t in trials.items() if not t.is_done}
        # One call was timed already, and is enough where it took very long.
        short = {o: c for o, c in calls.items() if firsts[o] <= 3 * MAX_SECONDS}
        samples = in_turn(short, rounds=1, seconds=TIMED_SECONDS)
        for option in calls:
            fastest = min([firsts[option], *samples.get(option, [])])
            parts = problem.case_parts * problem.case_calls(size)
            trials[option].seconds[size] = fastest / parts
            _stop_where_slow(trials[option], size, list(reference), problem)
    return {option: _finding(trial) for option, trial in trials.items()}


def _check(
    problem: Problem,
    option: Option,
    trial: _Trial,
    size: int,
    expected: list[np.ndarray],
) -> float:
    """Compare a case with the reference; seconds of the call."""
    try:
        with mx.stream(option.stream or mx.default_device()):
            trial.solver = trial.solver or problem.solver(option)
        found: list[mx.array] = []
        seconds = seconds_of(lambda: found.extend(_Evaluated(option, trial, size)()))
    except (RuntimeError, ValueError) as failure:  # MLX's, say of a compiler
        trial.leave_out(f"it failed: {failure}")
        return 0.0
    pairs = zip(found, expected, strict=True)
    difference = float(np.max([relative_error(*pair) for pair in pairs]))
    trial.error = float(np.max([trial.error, difference]))
    if not difference <= problem.tolerance:  # not `>`, which is false for NaN
        trial.leave_out(
            f"with {counted(size, problem.unit)} per {problem.part} it differs from "
            f"the reference by {difference:.2g} of the largest number; "
            f"{problem.tolerance:.2g} is allowed"
        )
    return seconds


class _Evaluated:
    """A case of an option, evaluated."""

    def __init__(self, option: Option, trial: _Trial, size: int) -> None:
        assert trial.solver is not None
        self.option, self.solver, self.size = option, trial.solver, size

    def __call__(self) -> list[mx.array]:
        with mx.stream(self.option.stream or mx.default_device()):
            outputs = self.solver(self.size)
            # sync: this is what is timed.
            mx.eval(outputs)
        return outputs


def _stop_where_slow(
    trial: _Trial, size: int, sizes: list[int], problem: Problem
) -> None:
    """No larger case, where it would probably take too long."""
    later = sizes[sizes.index(size) + 1 :]
    if not later:
        return
    known = list(trial.seconds.items())[-2:]
    expected = known[-1][1]  # weights are read once for all rows, at best
    if len(known) == 2:
        (x0, y0), (x1, y1) = known
        expected = y1 + (y1 - y0) / (x1 - x0) * (later[0] - x1)
    parts = problem.case_parts * problem.case_calls(later[0])
    trial.is_done = expected * parts > MAX_SECONDS


def _finding(trial: _Trial) -> Finding:
    if trial.left_out:
        return Finding(error=trial.error, left_out=trial.left_out)
    values = list(trial.seconds.values())
    # A larger case is no less work: a smaller time says that others were busy.
    ascending = tuple(min(values[i:]) for i in range(len(values)))
    return Finding(tuple(trial.seconds), ascending, trial.error)


def relative_error(got: mx.array, expected: np.ndarray) -> float:
    """The largest difference over the largest expected number; NaN stays NaN.

    Infinite for another shape.
    """
    if got.shape != expected.shape:
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    # sync: at warm-up, of what has been evaluated.
    values = to_host(got.astype(mx.float32))
    return float(np.abs(values - expected).max(initial=0.0)) / scale
