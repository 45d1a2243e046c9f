"""Tables to paste, and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_ep.benchmark import legacy
from mlx_ep.metrics import STAGES, markdown_table

Measurement = Mapping[str, Any]

LAYER_HEADERS = (
    "T", "arm", "time", "quartiles", "/ tp", "collectives", "bytes", "distinct experts",
    "in communication", "memory", "samples",
)  # fmt: skip

MODEL_HEADERS = (
    "phase", "arm", "tokens/s", "time", "quartiles", "/ tp", "collectives", "bytes",
    "MoE in communication", "memory", "samples",
)  # fmt: skip


def arm_label(record: Measurement, runners: Sequence[str]) -> str:
    """The arm, and what ran its experts where there was a choice."""
    if len(runners) == 1 or not record["arm"].startswith("ep"):
        return str(record["arm"])
    return f"{record['arm']} ({record['runner']})"


def layer_table(records: Sequence[Measurement], runners: Sequence[str]) -> str:
    """One line per tokens and arm."""
    has_legacy = any("legacy_3158" in record for record in records)
    headers = list(LAYER_HEADERS) + ([legacy.LABEL] if has_legacy else [])
    rows = []
    for record in records:
        low, high = record["seconds_quartiles"]
        row = [
            record["tokens"],
            arm_label(record, runners),
            seconds_text(record["seconds_median"]),
            f"{seconds_text(low)} .. {seconds_text(high)}",
            _number(record["ratio_to_tp"]),
            record["collectives"],
            bytes_text(record["bytes"]),
            f"{record['distinct_busiest']:.1f}",
            f"{record['communication_share']:.0%}",
            bytes_text(record["memory_bytes"]),
            record["samples"],
        ]
        if has_legacy:
            is_ep = record["arm"].startswith("ep")
            row.append(_number(record["legacy_3158"]["ratio"] if is_ep else None))
        rows.append(row)
    return markdown_table(headers, rows, left=2)


def point_label(record: Measurement) -> str:
    """What one row or group of bars is about."""
    if record["level"] == "layer":
        return f"T={record['tokens']}"
    return f"{record['phase']}, batch {record['batch']}"


def model_table(records: Sequence[Measurement]) -> str:
    """One line per batch, phase and arm."""
    rows = []
    for record in records:
        low, high = record["seconds_quartiles"]
        share = record["communication_share"]
        rows.append(
            [
                point_label(record),
                record["arm"],
                f"{record['tokens_per_second']:.4g}",
                seconds_text(record["seconds_median"]),
                f"{seconds_text(low)} .. {seconds_text(high)}",
                _number(record["ratio_to_tp"]),
                f"{record['collectives']:.2f}",
                bytes_text(record["bytes"]),
                "-" if share is None else f"{share:.0%}",
                bytes_text(record["memory_bytes"]),
                record["samples"],
            ]
        )
    return markdown_table(MODEL_HEADERS, rows, left=2)


def stage_table(records: Sequence[Measurement], runners: Sequence[str]) -> str:
    """Microseconds of each stage of one MoE layer, by point and arm."""
    rows = [
        [
            point_label(record),
            arm_label(record, runners),
            *(f"{record['stages'][stage] * 1e6:.0f}" for stage in STAGES),
            f"{sum(record['stages'].values()) * 1e6:.0f}",
        ]
        for record in records
    ]
    return markdown_table(["", "us in each stage of", *STAGES, "all"], rows, left=2)


def write_json(
    path: Path, header: Mapping[str, Any], records: Sequence[Measurement]
) -> None:
    """The header's fields and, under "records", the list of records."""
    content = {**header, "records": list(records)}
    path.write_text(json.dumps(content, indent=1) + "\n")


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
