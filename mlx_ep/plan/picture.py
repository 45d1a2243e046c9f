"""The recorded load of every layer and rank, before and after, as a picture."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mlx_ep import cli
from mlx_ep.placement import Placement, RecordedRouting, read_record


def check_picture_flags(args: argparse.Namespace) -> None:
    """Make the record the placement; what --plot needs.

    Raises:
        ValueError: the flags do not go together, or matplotlib is not installed.
    """
    if args.record is not None and args.placement_file is not None:
        raise ValueError(
            "--record places by itself; got --placement too. Give one of them."
        )
    args.placement_file = args.record or args.placement_file
    if args.plot is None:
        return
    if args.record is None:
        raise ValueError("--plot draws recorded loads: give --record FILE.npz too.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: pip install "
            "'mlx-ep[plot]', or pip install matplotlib."
        )
    cli.check_output("--plot", args.plot, cli.PICTURES)


def rank_loads(
    record: RecordedRouting, placement: Placement
) -> Float[np.ndarray, "layers P"]:
    """Rows of each rank over their mean, per layer."""
    loads = np.array(  # on host
        [
            placement.of_layer(layer).choice.row_loads(counts)
            for layer, counts in enumerate(record.counts)
        ],
        np.float64,
    )
    return loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-300)


def plot_record(path: Path, file: str, placement: Placement) -> None:
    """Two maps, layers over ranks: experts in order, and as placed.

    Args:
        path: of the PNG file.
        file: the record.
        placement: of the plan.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = read_record(file, placement.num_experts)
    before = Placement.contiguous(placement.num_experts, placement.num_ranks)
    loads = {
        "experts in order": rank_loads(record, before),
        "as placed": rank_loads(record, placement),
    }
    most = max(load.max() for load in loads.values())
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 2 + len(record.counts) / 6), layout="constrained"
    )
    for axis, (name, load) in zip(axes, loads.items()):
        image = axis.imshow(load, aspect="auto", vmin=0, vmax=most, cmap="viridis")
        busiest = load.max(axis=1).mean()
        axis.set_title(f"{name}: busiest rank {busiest:.2f} of the mean")
        axis.set_xlabel("rank")
        axis.set_ylabel("MoE layer")
        axis.set_xticks(range(load.shape[1]))
    figure.colorbar(image, ax=axes, label="rows of a rank over the mean")
    with cli.whole_file(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
