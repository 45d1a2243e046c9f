"""plan --record FILE --plot FILE: loads of layers and ranks, before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_ep.placement import Placement, RecordedRouting, write_record
from mlx_ep.plan.__main__ import main
from mlx_ep.plan.picture import rank_loads

PLAN = ["mlx_ep.plan", "--model", "jargon-moe", "--ranks", "2"]


def record_of(counts: list[int]) -> RecordedRouting:
    return RecordedRouting(np.array([np.diag(counts)] * 4), 4)


def test_loads_of_ranks() -> None:
    """Rows of copies are divided: the ranks are level."""
    record = record_of([6, 2, 1, 1])
    plain = rank_loads(record, Placement.contiguous(4, 2))
    np.testing.assert_allclose(plain, [[1.6, 0.4]] * 4)
    copied = rank_loads(record, Placement(((0, 1), (0, 2, 3))))
    np.testing.assert_allclose(copied, [[1.0, 1.0]] * 4)


def test_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, image = tmp_path / "r.npz", tmp_path / "r.png"
    write_record(file, record_of([100, 90, 80, *range(1, 14)]))
    line = [*PLAN, "--record", str(file), "--plot", str(image)]
    monkeypatch.setattr("sys.argv", [*line, "--replica-memory", "0.0005"])
    main()
    assert image.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"--replica-memory 0.0005 --placement {file}" in " ".join(
        printed.replace("\\\n", " ").split()
    )


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--plot", "a.png"], "give --record"),
        (["--record", "a.npz", "--placement", "b.json"], "Give one of them"),
        (["--record", "a.npz"], "cannot be read here"),
        (["--replica-memory", "auto"], "say with --memory"),
        (["--replica-memory", "much"], "number of GB such as"),
    ],
)
def test_wrong_flags(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    match: str,
) -> None:
    monkeypatch.setattr("sys.argv", [*PLAN, *flags])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert match in capsys.readouterr().err
