"""The examples of docs/mixture-of-experts.md, as a reader would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_ep.moe import MixtureOfExperts
from tests.support.ranks import run_commands

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mixture-of-experts.md"


def example(index: int) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    return str(blocks[index])


@pytest.mark.requires("ranks")
@pytest.mark.parametrize(
    "index, said",
    [
        (0, ["rank 0 holds 8 of 16 experts", "rank 1 holds 8 of 16 experts"]),
        (1, ["rank 0: 2 tokens, ", "rank 1: 3 tokens, "]),
    ],
)
def test_the_examples_run_on_two_ranks(index, said, tmp_path) -> None:
    script = tmp_path / "layer.py"
    script.write_text(example(index))
    ranks = run_commands(2, [sys.executable, str(script)])
    for rank, words in zip(ranks, said, strict=True):
        assert rank.returncode == 0, rank.stderr
        assert words in rank.stdout


def test_the_examples_run_on_one_rank(tmp_path) -> None:
    script = tmp_path / "layers.py"
    script.write_text(example(0) + example(1))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rank 0 holds 16 of 16 experts" in done.stdout


@pytest.mark.parametrize("strategy", ["replicated", "gathered", "normal"])
def test_a_gradient_is_refused_by_name(strategy) -> None:
    from mlx_ep import EPConfig

    layer = MixtureOfExperts(64, 32, 8, 2, config=EPConfig(strategy=strategy))
    x = mx.random.normal((4, 64))
    with pytest.raises(ValueError, match="MixtureOfExperts has no gradient"):
        nn.value_and_grad(layer, lambda x: layer(x).sum())(x)
    with pytest.raises(ValueError, match="MixtureOfExperts has no gradient"):
        mx.grad(lambda x: layer(x).sum())(x)
