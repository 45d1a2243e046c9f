"""mlx-lm keeps no multi-token-prediction heads: there is nothing to draft with."""

from __future__ import annotations

import ast
from pathlib import Path

import mlx_lm

# Lengths of what sanitize drops.
_NUMBERS = {"num_nextn_predict_layers"}


def _heads(source: str) -> list[str]:
    """Classes and attributes of a model file that are named after such heads."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.append(node.attr)
    return [
        name
        for name in names
        if ("mtp" in name.lower() or "nextn" in name.lower()) and name not in _NUMBERS
    ]


def test_a_head_would_be_found() -> None:
    source = "class A:\n  def __init__(self):\n    self.mtp_layers = [Block()]\n"
    assert _heads(source) == ["mtp_layers"]
    assert _heads("class MTPBlock:\n  pass\n") == ["MTPBlock"]


def test_mlx_lm_keeps_none() -> None:
    """Fails when mlx-lm begins to: then --draft-model could do without a draft."""
    files = sorted((Path(mlx_lm.__file__).parent / "models").glob("*.py"))
    assert len(files) > 50
    found = {file.name: _heads(file.read_text()) for file in files}
    assert {name: heads for name, heads in found.items() if heads} == {}
