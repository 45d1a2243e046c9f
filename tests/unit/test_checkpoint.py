"""Reading parts of a checkpoint, and refusing what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.loading import checkpoint as module
from mlx_ep.loading.checkpoint import Checkpoint, TensorReader, buffers_alias
from mlx_ep.loading.rank_tensors import load_bytes
from mlx_ep.placement import Placement
from tests.support import tiny


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacked")
    return tiny.save_checkpoint(folder, tiny.QWEN3_MOE, shards=3)


def _bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint8))


@pytest.mark.parametrize("aliasing", [True, False])
@pytest.mark.parametrize(
    "dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.uint8]
)
def test_read_rows_equals_mlx(
    tmp_path: Path, dtype: mx.Dtype, aliasing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "buffers_alias", lambda: aliasing)
    monkeypatch.setattr(module, "_READ_BYTES", 100)  # many reads per tensor
    tensors = {
        "a": mx.random.randint(0, 200, (5, 7, 3)).astype(dtype),
        "b": mx.random.randint(0, 200, (11,)).astype(dtype),
    }
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    infos = Checkpoint.open(tmp_path).tensors
    with TensorReader() as reader:
        whole = reader.read(infos["b"])
        assert whole.dtype == dtype
        np.testing.assert_array_equal(_bits(whole), _bits(tensors["b"]))
        for rows in ([0], [4, 2, 3], [1, 2, 3], list(range(5))):
            reader.bytes_read = 0
            part = reader.read_rows(infos["a"], rows)
            assert part.shape == (len(rows), 7, 3)
            expected = tensors["a"][mx.array(rows)]
            np.testing.assert_array_equal(_bits(part), _bits(expected))
            assert reader.bytes_read == part.nbytes


def test_buffers_alias_here() -> None:
    assert buffers_alias()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
def test_plan_covers_the_checkpoint(
    tmp_path: Path, layout: str, num_ranks: int
) -> None:
    folder = tiny.save_checkpoint(tmp_path, tiny.QWEN3_MOE, layout=layout)
    checkpoint = Checkpoint.open(folder)
    placement = Placement.contiguous(10, num_ranks)
    plans = [load_bytes(checkpoint, placement, rank) for rank in range(num_ranks)]
    assert len({plan.dense_bytes for plan in plans}) == 1
    experts = sum(plan.expert_bytes for plan in plans)
    assert experts + plans[0].dense_bytes == plans[0].total_bytes
    # 2 MoE layers, 3 matrices of 32 x 64 float32 per expert
    assert experts == 10 * 2 * 3 * 32 * 64 * 4


def test_experts_under_unknown_names_are_refused(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.zeros((4,))})
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    with pytest.raises(ValueError, match="have no tensor under a name that is known"):
        load_bytes(Checkpoint.open(tmp_path), Placement.contiguous(4, 2), 0)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)


def test_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Checkpoint.open(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no model\*\.safetensors"):
        Checkpoint.open(tmp_path)


def test_missing_shard(stacked: Path, tmp_path: Path) -> None:
    for file in stacked.iterdir():
        if file.name != "model-00002-of-00003.safetensors":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"lacks 1 of the 3 weight files.*model-00002"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(stacked: Path, tmp_path: Path, keep: int) -> None:
    for file in stacked.iterdir():
        data = file.read_bytes()
        is_cut = file.name == "model-00003-of-00003.safetensors"
        (tmp_path / file.name).write_bytes(data[:keep] if is_cut else data)
    with pytest.raises(ValueError, match=r"model-00003-of-00003.*truncated"):
        Checkpoint.open(tmp_path)


def test_not_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"xx")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Checkpoint.open(tmp_path)


def test_broken_index(stacked: Path, tmp_path: Path) -> None:
    for file in stacked.iterdir():
        (tmp_path / file.name).symlink_to(file)
    index = tmp_path / "model.safetensors.index.json"
    index.unlink()
    index.write_text(json.dumps({"weights": {}}))
    with pytest.raises(ValueError, match="not a valid index"):
        Checkpoint.open(tmp_path)
