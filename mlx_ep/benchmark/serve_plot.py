"""What the clients of a loaded server saw, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_ep import cli
from mlx_ep.benchmark.load import Reply


def plot_loads(
    path: Path,
    title: str,
    loads: Sequence[tuple[int | None, Sequence[Reply]]],
    summaries: Sequence[dict[str, Any]],
) -> None:
    """Left, tokens/s over the load; middle and right, how TTFT and ITL are spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    names = ["any" if count is None else str(count) for count, _ in loads]
    rates = [one["output_tokens_per_second"] for one in summaries]
    axes[0].plot(names, rates, "o-")
    axes[0].set(xlabel="requests at once", ylabel="output tokens per second", ylim=0)
    for name, (_, replies) in zip(names, loads, strict=True):
        good = [reply for reply in replies if not reply.error]
        firsts = sorted(reply.ttft * 1e3 for reply in good)
        gaps = sorted(gap * 1e3 for reply in good for gap in reply.gaps)
        for axis, values in ((axes[1], firsts), (axes[2], gaps)):
            shares = [(i + 1) / len(values) for i in range(len(values))]
            axis.step(values, shares, where="post", label=f"{name} at once")
    axes[1].set(xlabel="TTFT, ms", ylabel="share of requests", ylim=(0, 1))
    axes[2].set(xlabel="ITL, ms", ylabel="share of gaps", ylim=(0, 1), xscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.suptitle(title, fontsize=9)
    with cli.whole_file(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
