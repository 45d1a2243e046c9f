"""Tables to paste, and the JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from mlx_ep import cli
from mlx_ep.benchmark import legacy
from mlx_ep.metrics import STAGES, aligned, markdown_table

Measurement = Mapping[str, Any]

# Two tables each, so that a terminal of 80 columns has room for them.
LAYER_TIMES = ("T", "arm", "time", "quartiles", "/ tp", "n")
LAYER_COSTS = ("T", "arm", "calls", "bytes", "experts", "comm.", "memory")
MODEL_TIMES = ("phase", "arm", "tok/s", "time", "quartiles", "/ tp")
MODEL_COSTS = ("phase", "arm", "calls", "bytes", "comm.", "memory", "n")
LEGEND = (
    "phase: with its batch; n: samples; calls, bytes: of collectives; experts: those "
    "the busiest rank reads; comm.: part of a MoE layer's time in communication."
)


def arm_label(record: Measurement, runners: Sequence[str]) -> str:
    """The arm, and what ran its experts where there was a choice."""
    if len(runners) == 1 or not record["arm"].startswith("ep"):
        return str(record["arm"])
    return f"{record['arm']} ({record['runner']})"


def layer_table(records: Sequence[Measurement], runners: Sequence[str]) -> str:
    """One line per tokens and arm in each of the tables."""
    times, costs, counted = [], [], []
    for record in records:
        low, high = record["seconds_quartiles"]
        label = [record["tokens"], arm_label(record, runners)]
        times.append(
            [
                *label,
                seconds_text(record["seconds_median"]),
                f"{seconds_text(low)} .. {seconds_text(high)}",
                _number(record["ratio_to_tp"]),
                record["samples"],
            ]
        )
        costs.append(
            [
                *label,
                record["collectives"],
                bytes_text(record["bytes"]),
                f"{record['distinct_busiest']:.1f}",
                f"{record['communication_share']:.0%}",
                bytes_text(record["memory_bytes"]),
            ]
        )
        if "legacy_3158" in record and record["arm"].startswith("ep"):
            counted.append([*label, _number(record["legacy_3158"]["ratio"])])
    tables = [
        markdown_table(LAYER_TIMES, times, left=2),
        markdown_table(LAYER_COSTS, costs, left=2),
    ]
    if counted:
        tables.append(markdown_table(["T", "arm", legacy.LABEL], counted, left=2))
    return "\n\n".join([*tables, fill(LEGEND, 79)])


def point_label(record: Measurement) -> str:
    """What one row or group of bars is about."""
    if record["level"] == "layer":
        return f"T={record['tokens']}"
    return f"{record['phase']}, batch {record['batch']}"


def model_table(records: Sequence[Measurement]) -> str:
    """One line per batch, phase and arm in each of the tables."""
    times, costs = [], []
    for record in records:
        low, high = record["seconds_quartiles"]
        share = record["communication_share"]
        label = [f"{record['phase']} {record['batch']}", record["arm"]]
        rate = record["tokens_per_second"]
        times.append(
            [
                *label,
                f"{rate:.0f}" if rate >= 1000 else f"{rate:.4g}",
                seconds_text(record["seconds_median"]),
                f"{seconds_text(low)} .. {seconds_text(high)}",
                _number(record["ratio_to_tp"]),
            ]
        )
        costs.append(
            [
                *label,
                f"{record['collectives']:.2f}",
                bytes_text(record["bytes"]),
                "-" if share is None else f"{share:.0%}",
                bytes_text(record["memory_bytes"]),
                record["samples"],
            ]
        )
    tables = [
        markdown_table(MODEL_TIMES, times, left=2),
        markdown_table(MODEL_COSTS, costs, left=2),
    ]
    return "\n\n".join([*tables, fill(LEGEND, 79)])


def stage_table(records: Sequence[Measurement], runners: Sequence[str]) -> str:
    """Microseconds of each stage of one MoE layer, by arm; a table for each point."""
    tables = []
    for point in dict.fromkeys(map(point_label, records)):
        rows = [
            [
                arm_label(record, runners),
                *(f"{record['stages'][stage] * 1e6:.0f}" for stage in STAGES),
                f"{sum(record['stages'].values()) * 1e6:.0f}",
            ]
            for record in records
            if point_label(record) == point
        ]
        table = aligned([["", *STAGES, "all"], *rows], left=(0,))
        tables.append(f"us in each stage, {point}\n\n```\n{table}\n```")
    return "\n\n".join(tables)


def write_json(
    path: Path, header: Mapping[str, Any], records: Sequence[Measurement]
) -> None:
    """The header's fields and, under "records", the list of records.

    Args:
        path: "-" is the standard output.
    """
    cli.write_json(path, {**header, "records": list(records)})


def seconds_text(seconds: float) -> str:
    """Three digits and a unit: ``16.2 us``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{_digits(seconds * scale)} {unit}"
    return f"{_digits(seconds * 1e6)} us"


def bytes_text(num_bytes: int) -> str:
    """Three digits and a unit: ``16.4 kB``, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{_digits(num_bytes / scale)} {unit}"
    return f"{num_bytes} B"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
