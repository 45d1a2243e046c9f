"""docs/oracle.md, without PyTorch."""

from __future__ import annotations

from pathlib import Path

from tests.support.oracle.checkpoints import ADDED, ARCHITECTURES
from tests.support.oracle.compare import CANNOT, NOTES


def test_every_architecture_has_a_row() -> None:
    table = Path(__file__).parents[2] / "docs" / "oracle.md"
    rows = [line.split("|") for line in table.read_text().splitlines()]
    cells = {row[1].strip(): row[2:-1] for row in rows if len(row) > 3}
    for name in ARCHITECTURES:
        row = cells[f"`{name}`"]
        if name in CANNOT:
            assert row == [f" {CANNOT[name]} "]
        elif len(row) > 1:
            assert float(row[0]) <= 1e-4
            assert row[3].strip() == NOTES.get(name, "")


def test_notes_are_of_architectures() -> None:
    assert set(NOTES) | set(CANNOT) | set(ADDED) <= set(ARCHITECTURES)
