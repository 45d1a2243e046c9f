"""Routing policies against tokens drawn one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_ep.simulate.routing import (
    Loads,
    chances_of,
    largest_of_normals,
    make_routing,
    read_recording,
)


def _drawn(
    experts: int, top_k: int, ranks: int, tokens: int, draws: int = 4000
) -> Loads:
    """Tokens that choose their experts uniformly, many times."""
    random = np.random.default_rng(5)
    pairs, distinct = [], []
    for _ in range(draws):
        keys = random.random((tokens, experts))
        chosen = np.argpartition(keys, top_k - 1, axis=1)[:, :top_k]
        counts = np.bincount(chosen.ravel(), minlength=experts).reshape(ranks, -1)
        pairs.append(counts.sum(axis=1))
        distinct.append((counts > 0).sum(axis=1))
    return Loads(np.array(pairs), np.array(distinct))


@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 64])
def test_even_and_busiest_against_draws(tokens: int) -> None:
    """BALANCED: distinct experts of all ranks; COPY: those of the busiest: 2%."""
    drawn = _drawn(128, 8, 2, tokens)
    even = make_routing("BALANCED", 128, 8, 2).loads(tokens)
    assert even.distinct.sum() == pytest.approx(drawn.distinct.sum(1).mean(), rel=0.02)
    assert even.pairs.sum() == tokens * 8
    busiest = make_routing("COPY", 128, 8, 2).loads(tokens)
    assert busiest.distinct.max() == pytest.approx(
        drawn.distinct.max(1).mean(), rel=0.02
    )
    assert busiest.pairs.max() == pytest.approx(drawn.pairs.max(1).mean(), rel=0.02)


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_random_is_like_draws(tokens: int) -> None:
    routing = make_routing("RAND", 64, 4, 4, seed=3)
    assert routing.is_sampled
    found, drawn = routing.loads(tokens), _drawn(64, 4, 4, tokens, 1000)
    assert found.distinct.mean() == pytest.approx(drawn.distinct.mean(), rel=0.05)
    assert found.distinct.max(1).mean() == pytest.approx(
        drawn.distinct.max(1).mean(), rel=0.1
    )
    again = make_routing("RAND", 64, 4, 4, seed=3).loads(tokens)
    assert (found.pairs == again.pairs).all()
    other = make_routing("RAND", 64, 4, 4, seed=4).loads(tokens)
    assert (found.pairs != other.pairs).any()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_turns_reach_all_ranks(ranks: int, tokens: int) -> None:
    found = make_routing("RR", 16, 2, ranks).loads(tokens)
    assert found.pairs.sum() == 2 * tokens
    assert found.distinct.sum() == min(2 * tokens, 16)
    assert found.pairs.max() - found.pairs.min() <= 1
    if 2 * tokens >= ranks:
        assert (found.distinct > 0).all()


def test_largest_of_normals() -> None:
    drawn = np.random.default_rng(0).standard_normal((100_000, 8)).max(axis=1).mean()
    assert largest_of_normals(8) == pytest.approx(drawn, abs=0.01)
    assert largest_of_normals(1) == 0


def test_weights(tmp_path: Path) -> None:
    """An expert that every token takes, and one that none takes."""
    file = tmp_path / "weights.json"
    file.write_text(json.dumps([100, 1, 1, 0]))
    loads = make_routing("CUSTOM", 4, 2, 2, file=file).loads(1)
    assert loads.pairs.tolist() == [[1.5, 0.5]]
    many = make_routing("CUSTOM", 4, 2, 2, file=file).loads(1000)
    assert many.distinct[0] == pytest.approx([2, 1])
    file.write_text(json.dumps([[1, 1, 0, 0], [0, 0, 1, 1]]))
    layers = make_routing("CUSTOM", 4, 2, 2, file=file).loads(3)
    assert layers.distinct.tolist() == [[2, 0], [0, 2]]
    for bad in ([1, 2, 3], [1, 0, 0, 0], [1, 1, -1, 1], "no"):
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"weights\.json"):
            make_routing("CUSTOM", 4, 2, 2, file=file)


def test_chances_sum_to_top_k() -> None:
    weights = np.random.default_rng(1).exponential(size=(5, 12)) ** 4
    chances = chances_of(weights, 4, "here")
    assert chances.sum(axis=1) == pytest.approx(4)
    assert (chances >= 0).all() and (chances <= 1 + 1e-12).all()


def _recording(folder: Path, counts: np.ndarray, **changes: object) -> Path:
    file = folder / "routing.npz"
    pairs = np.zeros((*counts.shape, counts.shape[1]), np.int64)
    for layer, row in enumerate(counts):
        np.fill_diagonal(pairs[layer], row)
    np.savez(file, counts=counts, coactivations=pairs)
    described = {"format": "mlx_ep.routing", "version": 1, "num_experts": 4, "top_k": 2}
    file.with_suffix(".json").write_text(json.dumps(described | changes))
    return file


def test_recording(tmp_path: Path) -> None:
    counts = np.array([[10, 10, 10, 10], [20, 10, 10, 0]])
    file = _recording(tmp_path, counts)
    assert read_recording(file, 4, 2).chances.tolist() == [[0.5] * 4, [1, 0.5, 0.5, 0]]
    loads = make_routing("TRACE", 4, 2, 2, file=file).loads(1)
    assert loads.pairs.tolist() == [[1, 1], [1.5, 0.5]]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"format": "other"}, "format: must be one of mlx_ep.routing"),
        ({"num_experts": 8}, "num_experts: must be 4 here; got 8"),
        ({"top_k": 1}, "top_k: must be 2 here; got 1"),
    ],
)
def test_bad_recordings(changes: dict[str, object], text: str, tmp_path: Path) -> None:
    file = _recording(tmp_path, np.full((1, 4), 3), **changes)
    with pytest.raises(ValueError, match=text):
        read_recording(file, 4, 2)


def test_recording_with_other_pairs(tmp_path: Path) -> None:
    file = _recording(tmp_path, np.full((1, 4), 3))
    np.savez(file, counts=np.full((1, 4), 3), coactivations=np.ones((1, 4, 4), int))
    with pytest.raises(ValueError, match="counts on the diagonal"):
        read_recording(file, 4, 2)
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="is no recording"):
        read_recording(file, 4, 2)
