"""mlx_ep.perplexity against float64 on mlx-lm's logits of one process."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_ep
from mlx_ep.loading import find_model
from mlx_ep.perplexity import Perplexity, cut, perplexity
from tests.support import tiny
from tests.support.ranks import run_commands, run_ranks

pytestmark = pytest.mark.requires("ranks")

PERPLEXITY = [sys.executable, "-m", "mlx_ep.perplexity"]
TEXT = "experts route tokens over ranks, and ranks route experts over tokens. " * 9


def _expected(folder: str, text: str, length: int, samples: int) -> tuple[float, float]:
    """e^mean and its error in float64, one sequence at a time."""
    model, tokenizer = mlx_lm.load(folder)[:2]
    tokens = tokenizer.encode(text)
    losses: list[float] = []
    for sample in range(min(samples, len(tokens) // length)):
        sequence = tokens[sample * length : (sample + 1) * length]
        logits = np.array(model(mx.array(sequence)[None])[0]).astype(np.float64)
        for position in range(length - 1):
            row = logits[position]
            losses.append(np.log(np.exp(row).sum()) - row[sequence[position + 1]])
    value = float(np.exp(np.mean(losses)))
    return value, value * float(np.std(losses, ddof=1)) / len(losses) ** 0.5


def _measure(group: mx.distributed.Group, folder: str, text: str) -> Perplexity:
    model, tokenizer = mlx_ep.load(folder, group)
    return perplexity(model, cut(tokenizer.encode(text), 24, 5), batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "transport"), [(2, "ring"), (3, "mpi")])
def test_it_is_that_of_one_process(
    tmp_path: Path, num_ranks: int, transport: str
) -> None:
    folder = str(tiny.save_checkpoint(tmp_path, tiny.QWEN3_MOE))
    value, error = _expected(folder, TEXT, 24, 5)
    ranks = run_ranks(num_ranks, _measure, folder, TEXT, transport=transport)
    for found in ranks:
        assert found.num_tokens == 5 * 23
        np.testing.assert_allclose(found.value, value, rtol=1e-5)
        np.testing.assert_allclose(found.standard_error, error, rtol=1e-4)
    assert len({found.value for found in ranks}) == 1


def test_the_command_needs_no_file() -> None:
    text = (Path(mlx_ep.__file__).parent / "embedded" / "jargon.txt").read_text()
    value, _ = _expected(str(find_model("jargon-moe")), text, 128, 3)
    options = ["--sequence-length", "128", "--num-samples", "3", "--batch-size", "2"]
    first, second = run_commands(2, [*PERPLEXITY, *options])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert second.stdout == ""
    found = re.search(r"^Perplexity: ([\d.]+) ± [\d.]+$", first.stdout, re.MULTILINE)
    assert found is not None
    assert abs(float(found[1]) - value) < 2e-3
    assert value < 10  # it was trained on this text; a guess among its tokens is 1024
    assert "Tokens: 381, in 3 sequences" in first.stdout
    assert "Tokens per second: " in first.stdout


@pytest.mark.slow
def test_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    for options, said in (
        (["--text", str(tmp_path / "none.txt")], "--text: "),
        (["--text", str(tmp_path / "short.txt")], "at least --sequence-length 512"),
    ):
        first, second = run_commands(2, [*PERPLEXITY, *options])
        assert (first.returncode, second.returncode) == (2, 2), first.stderr
        assert first.stderr.startswith("mlx_ep.perplexity: error: ")
        assert said in first.stderr
        assert len(first.stderr.splitlines()) == 1
        assert second.stderr == ""


def test_a_text_is_cut_into_whole_sequences() -> None:
    assert cut(range(10), 3, -1).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut(range(10), 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut(range(10), 10, 256).shape == (1, 10)
    for length, samples in ((1, 1), (3, 0), (3, -2), (11, 1)):
        with pytest.raises(ValueError, match="must"):
            cut(range(10), length, samples)
