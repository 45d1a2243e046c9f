"""What an overlay reads, and that it loads every architecture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import psutil
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.utils import load_model, sharded_load

from mlx_ep.overlay.make import make_overlay
from tests.support import architectures, tiny
from tests.support.hub_layouts import HUB_LAYOUTS
from tests.support.metal_stand_in import metal_stand_in
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.requires("ranks")


def _bytes_read() -> int:
    return psutil.Process().io_counters().read_chars  # type: ignore[attr-defined]


def _sharded_load(group: mx.distributed.Group, overlay: str) -> dict[str, Any]:
    before = _bytes_read() if sys.platform == "linux" else 0
    model, tokenizer = sharded_load(overlay, None, group, trust_remote_code=True)
    read = _bytes_read() - before if sys.platform == "linux" else 0
    steps = stream_generate(model, tokenizer, list(range(3, 43)), 8)
    return {
        "tokens": [step.token for step in steps],
        "read": read,
        "held": model.expert_parallel.reports[group.rank()].held_bytes,
        "class": (type(model).__module__, type(model).__name__),
        "computed": model.expert_parallel.counters.pairs_computed,
        "routed": model.expert_parallel.counters.pairs_routed,
    }


@pytest.mark.slow
def test_a_rank_reads_its_experts_only(tmp_path: Path) -> None:
    """Though mlx-lm makes the model twice and opens all files."""
    config = {**tiny.MIXTRAL, "num_local_experts": 10, "intermediate_size": 2048}
    folder = tiny.save_checkpoint(tmp_path / "model", config, shards=2)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    steps = stream_generate(model, tokenizer, list(range(3, 43)), 8)
    expected = [step.token for step in steps]
    overlay = make_overlay(str(folder), tmp_path / "overlay")
    ranks = run_ranks(2, _sharded_load, str(overlay))
    for rank in ranks:
        assert rank["tokens"] == expected
        assert rank["class"] == ("mlx_lm.models.mixtral", "Model")
        assert rank["held"] < 0.55 * whole
        # Beside the weights: Python files, the tokenizer twice, config.json.
        assert rank["read"] < rank["held"] + 0.1 * whole
    assert sum(rank["computed"] for rank in ranks) == ranks[0]["routed"]


def _load_all(
    group: mx.distributed.Group, saved: list[tuple[str, str]]
) -> dict[str, float]:
    differences = {}
    for name, folder in saved:
        expected = np.load(Path(folder) / "expected.npy")
        with metal_stand_in():
            model, _ = sharded_load(f"{folder}-ep", None, group, trust_remote_code=True)
            difference = np.abs(architectures.logits(model) - expected).max()
        differences[name] = float(difference / np.abs(expected).max())
    return differences


def _hub_or_float32(name: str) -> list[str]:
    return ["hub"] if name in HUB_LAYOUTS else ["float32"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_architecture(tmp_path: Path) -> None:
    names = architectures.ARCHITECTURES
    saved = architectures.save_all(tmp_path, names, _hub_or_float32)
    for one in saved:
        with metal_stand_in():
            overlay = make_overlay(str(one.folder), Path(f"{one.folder}-ep"))
            model, _ = load_model(overlay, trust_remote_code=True)  # one process
            np.testing.assert_array_equal(architectures.logits(model), one.expected)
    pairs = [(one.name, str(one.folder)) for one in saved]
    for differences in run_ranks(2, _load_all, pairs, timeout=900):
        assert set(differences) == set(names)
        assert max(differences.values()) < 1e-5, differences
