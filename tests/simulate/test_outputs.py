"""What the command draws and writes: plots, whole files, a bar on a terminal."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_ep.simulate import results
from tests.support.simulate.running import run_command
from tests.support.simulate.tutorial import TUTORIAL, tutorial_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tutorial_folder(tmp_path, monkeypatch)


def test_plots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TTFT and ITL, running and waiting requests, KV blocks: with the run's numbers."""
    import matplotlib.pyplot as plt

    drawn: list[tuple[str, list[tuple[np.ndarray, np.ndarray]]]] = []
    close = plt.close

    def keep(figure: Any) -> None:
        for axis in figure.axes:
            lines = [(line.get_xdata(), line.get_ydata()) for line in axis.lines]
            drawn.append((axis.get_ylabel(), lines))
        close(figure)

    monkeypatch.setattr(plt, "close", keep)
    outcome = run_command([*TUTORIAL.split(), "--plot", "p.png"])
    assert outcome.code == 0
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    labels = [label for label, _ in drawn]
    assert labels == ["TTFT (ms)", "ITL (ms)", "requests", "KV blocks in use (%)"]
    with open("out.csv") as file:
        rows = list(csv.DictReader(file))
    ttft, itl = drawn[0][1][0], drawn[1][1][0]
    assert sorted(ttft[1]) == sorted(int(row["TTFT"]) / 1e6 for row in rows)
    gaps = [gap for row in rows for gap in json.loads(row["ITL"])]
    assert sorted(itl[1]) == pytest.approx(sorted(gap / 1e6 for gap in gaps))
    running, _waiting = (np.array(line[1]) for line in drawn[2][1])
    pool = np.array(drawn[3][1][0][1])
    assert running.max() > 0 and 0 < pool.max() <= 100


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.png"])
def test_an_interruption_leaves_no_half_a_file(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a result is written: a line, 130, and what was there before."""
    flags = {"out.csv": (), "out.json": ("--json", name), "out.png": ("--plot", name)}
    (folder / name).write_text("of the run before")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if name == "out.csv":
        monkeypatch.setattr(results.Totals, "add", stop)
    elif name == "out.json":
        monkeypatch.setattr(Path, "write_text", stop)
    else:
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", stop)
    outcome = run_command([*TUTORIAL.split(), *flags[name]])
    assert (outcome.code, outcome.err) == (130, "[mlx_ep] interrupted (Ctrl-C)\n")
    monkeypatch.undo()
    assert (folder / name).read_text() == "of the run before"
    assert not list(folder.glob(".out*"))


def test_a_folder_that_only_seems_to_be_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise FileNotFoundError  # /proc, for root

    monkeypatch.setattr("mlx_ep.cli.inputs.TemporaryFile", refuse)
    outcome = run_command([*TUTORIAL.split(), "--output", "new.csv"])
    assert outcome.code == 2
    assert "--output must be a file in a folder that can be written" in outcome.err


def test_a_plot_has_an_ending_that_can_be_drawn(folder: Path) -> None:
    outcome = run_command([*TUTORIAL.split(), "--plot", "p.xyz"])
    assert outcome.code == 2
    assert "--plot must end in .png, .pdf, .svg; got p.xyz." in outcome.err
    assert not (folder / "out.csv").exists()


def test_a_bar_on_a_terminal_only(folder: Path) -> None:
    """It counts requests up to the last one."""
    assert "req" not in run_command(TUTORIAL.split()).err
    err = run_command(TUTORIAL.split(), _Terminal).err
    assert "0/20" in err and "req" in err
