"""Time over tokens per arm, and where it goes, as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from mlx_ep import cli
from mlx_ep.benchmark.report import Measurement, arm_label, point_label
from mlx_ep.metrics import STAGES


def check_can_plot() -> None:
    """Raises:
    ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: pip install "
            "'mlx-ep[plot]', or pip install matplotlib. (--json keeps the numbers.)"
        )


def plot_records(
    path: Path, title: str, records: Sequence[Measurement], runners: Sequence[str]
) -> None:
    """Left, time over tokens (level e2e: tokens/s); right, stages stacked per arm.

    Args:
        path: of the PNG file.
        records: of one level.
        runners: of the ep arms.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    draw = _draw_times if records[0]["level"] == "layer" else _draw_rates
    draw(left, records, runners)
    left.legend()
    left.grid(alpha=0.3)
    _stack_stages(right, records, runners)
    figure.suptitle(fill(title, 160), fontsize=9)
    with cli.whole_file(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


def _draw_times(
    axes: Any, records: Sequence[Measurement], runners: Sequence[str]
) -> None:
    """Medians over tokens, one line an arm, between their quartiles."""
    for arm in dict.fromkeys(arm_label(record, runners) for record in records):
        own = [r for r in records if arm_label(r, runners) == arm]
        tokens = [r["tokens"] for r in own]
        medians = [r["seconds_median"] * 1e3 for r in own]
        (line,) = axes.plot(tokens, medians, "o-", label=arm)
        low, high = zip(*(r["seconds_quartiles"] for r in own), strict=True)
        axes.fill_between(
            tokens,
            [s * 1e3 for s in low],
            [s * 1e3 for s in high],
            alpha=0.2,
            color=line.get_color(),
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms per layer")
    tokens = sorted({record["tokens"] for record in records})
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_xticks([], minor=True)


def _draw_rates(
    axes: Any, records: Sequence[Measurement], runners: Sequence[str]
) -> None:
    """Tokens per second, bars of the arms grouped by phase and batch."""
    points = list(dict.fromkeys(point_label(record) for record in records))
    arms = list(dict.fromkeys(arm_label(record, runners) for record in records))
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        rates = {
            point_label(r): r["tokens_per_second"]
            for r in records
            if arm_label(r, runners) == arm
        }
        places = [i + index * width for i in range(len(points))]
        axes.bar(places, [rates[point] for point in points], width, label=arm)
    middle = width * (len(arms) - 1) / 2
    axes.set_xticks([i + middle for i in range(len(points))], points)
    axes.set(yscale="log", ylabel="tokens per second")


def _stack_stages(
    axes: Any, records: Sequence[Measurement], runners: Sequence[str]
) -> None:
    """Bars of shares of each arm's time, grouped by point."""
    places, names = [], []
    bars: list[Mapping[str, float]] = []
    place, last = 0, ""
    for record in records:
        if not sum(record["stages"].values()):
            continue
        place += 2 if last not in ("", point_label(record)) else 1
        last = point_label(record)
        places.append(place)
        names.append(f"{last} {arm_label(record, runners)}")
        bars.append(record["stages"])
    bottom = [0.0] * len(bars)
    for stage in STAGES:
        shares = [100 * bar[stage] / sum(bar.values()) for bar in bars]
        axes.bar(places, shares, bottom=bottom, label=stage)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_xticks(places, names, rotation=90, fontsize=7)
    axes.set_ylabel("% of a MoE layer, its stages timed one by one")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
