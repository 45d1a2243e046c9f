"""Requests that a server was measured with, and the CSV of a simulation, alike."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_ep.simulate.fields import Fields

METRICS = ("TTFT", "TPOT", "latency")


@dataclass(frozen=True)
class Observed:
    """Requests by their number, with arrays in s in the same order.

    Attributes:
        arrival: from the first request's on.
        first, last: when the first and last token came, likewise.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    arrival: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """By `METRICS`, s."""
        steps = np.maximum(self.outputs - 1, 1)
        return {
            "TTFT": self.first - self.arrival,
            "TPOT": (self.last - self.first) / steps,
            "latency": self.last - self.arrival,
        }


def read_measured(file: Path) -> Observed:
    """JSON lines with ``input_toks``, ``output_toks`` and, in s of one clock,
    ``queued_ts``, ``first_token_ts``, ``last_token_ts``, in order of ``request_id``.

    Raises:
        ValueError: the file, or which line, is wrong.
    """
    rows = []
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: must be JSON: {error.msg}.") from error
        fields = Fields(where, "", content)
        times = [
            fields.number(key)
            for key in ("queued_ts", "first_token_ts", "last_token_ts")
        ]
        if sorted(times) != times:
            raise fields.fail(
                "first_token_ts", "must lie between queued_ts and last_token_ts."
            )
        rows.append(
            (
                _order(fields, number),
                fields.integer("input_toks", least=1),
                fields.integer("output_toks", least=1),
                *times,
            )
        )
    if not rows:
        raise ValueError(f"{file}: must hold at least one request; it is empty.")
    return _observed(np.array(sorted(rows), np.float64))  # on host


def _order(fields: Fields, line: int) -> int:
    """The number at the end of the id, where there is one."""
    digits = str(fields.value("request_id", line)).rpartition("-")[2]
    return int(digits) if digits.isdigit() else line


def read_simulated(file: Path) -> Observed:
    """The CSV of `mlx_ep.simulate`.

    Raises:
        ValueError: it is not one.
    """
    keys = ("request id", "input", "output", "arrival", "TTFT", "end_time")
    try:
        with file.open(newline="") as lines:
            found = list(csv.DictReader(lines))
        rows = [[float(row[key]) for key in keys] for row in found]
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: is no CSV of mlx_ep.simulate: {error}.") from error
    if not rows:
        raise ValueError(f"{file}: has no requests.")
    table = np.array(sorted(rows))  # on host
    table[:, 4] += table[:, 3]
    table[:, 3:] /= 1e9
    return _observed(table)


def _observed(table: np.ndarray) -> Observed:
    """Of rows (order, input, output, arrival, first, last)."""
    start = table[:, 3].min()
    return Observed(
        table[:, 1].astype(np.int64),
        table[:, 2].astype(np.int64),
        *(table[:, column] - start for column in (3, 4, 5)),
    )
