"""The code of docs/add-a-model.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mlx_ep
from mlx_ep.models import FAMILIES
from tests.support.architectures import ARCHITECTURES, make_model

PAGE = Path(__file__).parents[2] / "docs" / "add-a-model.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_the_page_adds_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its family dbrx is refused; the page brings it back."""
    monkeypatch.delitem(FAMILIES, "dbrx")
    with pytest.raises(ValueError, match="no routed experts that mlx_ep can find"):
        mlx_ep.parallelize(make_model(ARCHITECTURES["dbrx"]))
    names: dict[str, object] = {"folder": tmp_path}
    for block in _blocks():
        exec(block, names)
    assert FAMILIES["dbrx"].stack_tensors is names["stack_tensors"]
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json"}


def test_the_page_names_files_that_exist() -> None:
    root = PAGE.parents[1]
    text = PAGE.read_text()
    named = re.findall(r"`((?:tests|mlx_ep|tools)/[\w/.]+)`", text)
    assert len(named) > 5
    assert not [name for name in named if not (root / name).exists()]
