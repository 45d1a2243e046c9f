"""``mlx_ep.simulate validate``: a simulation beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ep import cli
from mlx_ep.simulate.flags import check_files
from mlx_ep.simulate.measured import METRICS, Observed, read_measured, read_simulated
from mlx_ep.simulate.plot import plot_comparison

STATISTICS = ("mean", "median", "P90", "P95", "P99")


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="mlx_ep.simulate validate",
        description="TTFT, TPOT and latency, measured and simulated.",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines with queued_ts, first_token_ts and last_token_ts.",
    )
    parser.add_argument(
        "--simulated",
        type=Path,
        required=True,
        metavar="FILE",
        help="The --output of mlx_ep.simulate for the same requests.",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="Draw both, as PNG.")
    cli.add_json_flag(parser, "the table")
    args = parser.parse_args(argv)
    try:
        check_files(args, "json", "plot")
        measured, simulated = (
            read_measured(args.measured),
            read_simulated(args.simulated),
        )
        rows = compare(measured, simulated)
    except ValueError as error:
        parser.error(str(error))
    print(table_text(rows), file=cli.beside(args))
    if args.json is not None:
        cli.write_json(args.json, rows)
    if args.plot is not None:
        plot_comparison(args.plot, measured.metrics, simulated.metrics)


def compare(measured: Observed, simulated: Observed) -> list[dict[str, Any]]:
    """Every statistic of every metric, ms, with the difference in percent.

    Raises:
        ValueError: they are not the same requests.
    """
    if len(measured) != len(simulated):
        raise ValueError(
            f"--measured and --simulated must have the same requests; they have "
            f"{len(measured)} and {len(simulated)}."
        )
    different = np.flatnonzero(
        (measured.inputs != simulated.inputs) | (measured.outputs != simulated.outputs)
    )
    if len(different):
        at = int(different[0])
        raise ValueError(
            f"--measured and --simulated must have the same requests; number {at} has "
            f"{measured.inputs[at]} and {measured.outputs[at]} tokens in the one, "
            f"{simulated.inputs[at]} and {simulated.outputs[at]} in the other."
        )
    rows = []
    for metric in METRICS:
        for name in STATISTICS:
            ours = statistic(name, simulated.metrics[metric]) * 1e3
            theirs = statistic(name, measured.metrics[metric]) * 1e3
            rows.append(
                {
                    "metric": metric,
                    "statistic": name,
                    "measured_ms": theirs,
                    "simulated_ms": ours,
                    "difference_percent": 100 * (ours / theirs - 1) if theirs else 0.0,
                }
            )
    return rows


def statistic(name: str, values: np.ndarray) -> float:
    """One of `STATISTICS`."""
    if name == "mean":
        return float(values.mean())
    return float(np.percentile(values, 50 if name == "median" else int(name[1:])))


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'':16}{'measured':>12}{'simulated':>12}{'diff':>9}"]
    for row in rows:
        lines.append(
            f"{row['metric'] + ' ' + row['statistic']:16}{row['measured_ms']:>12.1f}"
            f"{row['simulated_ms']:>12.1f}{row['difference_percent']:>+8.1f}%"
        )
    return "\n".join(lines)
