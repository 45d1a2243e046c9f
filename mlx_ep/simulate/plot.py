"""Pictures of a simulation."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mlx_ep import cli
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.results import NS, Served, moments

_MOST_POINTS = 20000


def check_can_plot() -> None:
    """Raises:
    ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: pip install "
            "'mlx-ep[plot]', or pip install matplotlib."
        )


def plot_run(
    file: Path, engine: Simulation, requests: Sequence[Served], interval: float | int
) -> None:
    """TTFT and ITL over time, running and waiting requests, KV blocks: one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        4, 1, figsize=(11, 12), sharex=True, layout="constrained"
    )
    arrivals = np.array([one.arrival + one.ttft for one in requests]) / NS  # on host
    axes[0].plot(arrivals, [one.ttft / 1e6 for one in requests], ".", markersize=4)
    axes[0].set_ylabel("TTFT (ms)")
    axes[0].set_title("time to first token, at the first token")
    times, gaps = _gaps(requests)
    axes[1].plot(times, gaps, ".", markersize=2, alpha=0.4)
    axes[1].set_ylabel("ITL (ms)")
    axes[1].set_title("time between tokens")
    found = moments(engine, interval)
    ends = [moment.end for moment in found]
    axes[2].plot(ends, [m.running for m in found], label="running")
    axes[2].plot(ends, [m.waiting for m in found], label="waiting")
    axes[2].set_ylabel("requests")
    axes[2].set_title("requests of all instances")
    axes[2].legend(loc="upper right")
    axes[3].plot(ends, [100 * m.pool for m in found])
    axes[3].set_ylim(0, 105)
    axes[3].set_ylabel("KV blocks in use (%)")
    axes[3].set_title("KV pool of the fullest instance")
    axes[3].set_xlabel("simulated time (s)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    for axis in axes[:3]:
        axis.set_ylim(bottom=0)
    with cli.whole_file(file) as picture:
        figure.savefig(picture, dpi=110)
    plt.close(figure)


def _gaps(requests: Sequence[Served]) -> tuple[np.ndarray, np.ndarray]:
    """When tokens came, s, and how long after the one before, ms; at most so many."""
    total = sum(len(one.itl) for one in requests)
    every = max(1, total // _MOST_POINTS)
    times, gaps = [np.zeros(0)], [np.zeros(0)]
    for one in requests:
        ends = one.arrival + one.ttft + np.cumsum(one.itl)
        times.append(ends[::every] / NS)
        gaps.append(one.itl[::every] / 1e6)
    return np.concatenate(times), np.concatenate(gaps)


def plot_comparison(
    file: Path, measured: Mapping[str, np.ndarray], simulated: Mapping[str, np.ndarray]
) -> None:
    """How many requests stay below a time, per metric, measured and simulated.

    Args:
        measured, simulated: s of each request, by metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(measured), figsize=(5 * len(measured), 4.5), layout="constrained"
    )
    for axis, (name, values) in zip(axes, measured.items()):
        for label, found in (("measured", values), ("simulated", simulated[name])):
            part = 100 * np.arange(1, len(found) + 1) / len(found)
            axis.step(np.sort(found) * 1e3, part, where="post", label=label)
        axis.set_title(name)
        axis.set_xlabel("ms")
        axis.set_xlim(left=0)
        axis.set_ylabel("requests (%)")
        axis.grid(alpha=0.3)
        axis.legend()
    with cli.whole_file(file) as picture:
        figure.savefig(picture, dpi=110)
    plt.close(figure)
