"""Every rank holds its experts and the dense tensors, exactly, and nothing else."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ep.loading import Checkpoint, TensorReader, load_bytes, load_local
from mlx_ep.loading import checkpoint as module
from mlx_ep.placement import Placement
from tests.support import tiny

AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}

CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stacked": (tiny.QWEN3_MOE, {}),
    "stacked in 3 files": (tiny.QWEN3_MOE, {"shards": 3}),
    "per expert": (tiny.QWEN3_MOE, {"layout": "per_expert"}),
    "per expert in 3 files": (tiny.QWEN3_MOE, {"layout": "per_expert", "shards": 3}),
    "w1 w2 w3 per expert": (tiny.MIXTRAL, {"layout": "per_expert", "shards": 2}),
    "affine": (tiny.QWEN3_MOE, {"quantization": AFFINE}),
    "affine in 3 files": (tiny.QWEN3_MOE, {"quantization": AFFINE, "shards": 3}),
    "mxfp4": (tiny.QWEN3_MOE, {"quantization": MXFP4, "shards": 2}),
    "shared expert": (tiny.QWEN2_MOE, {}),
    "sigmoid router": (tiny.DEEPSEEK_V3, {"layout": "per_expert"}),
    "biases": (tiny.GPT_OSS, {}),
    "biases, affine": (tiny.GPT_OSS, {"quantization": AFFINE}),
}

Tensors = dict[str, mx.array]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tensors]:
    """A checkpoint, and its tensors as mlx_lm.load gives them."""
    config, options = CHECKPOINTS[request.param]
    folder = tiny.save_checkpoint(tmp_path_factory.mktemp("m"), config, **options)
    model, _ = mlx_lm.load(str(folder))
    return folder, _tensors(model)


def _tensors(model: Any) -> Tensors:
    return dict(tree_flatten(model.parameters()))


@dataclass(frozen=True)
class Held:
    """What a rank holds after loading.

    Attributes:
        counted: the bytes that the reader counted.
        planned: the bytes that the headers promised.
        allocated: the bytes that MLX allocated and has not freed.
    """

    tensors: Tensors
    counted: int
    planned: int
    allocated: int


def _load(folder: Path, placement: Placement, rank: int) -> Held:
    checkpoint = Checkpoint.open(folder)
    planned = load_bytes(checkpoint, placement, rank).rank_bytes
    mx.clear_cache()  # else MLX may give out a buffer that is a bit larger than asked
    gc.collect()  # models of earlier tests, which refer to themselves
    before = mx.get_active_memory()
    with TensorReader() as reader:
        model = load_local(checkpoint, placement, rank, reader)
    allocated = mx.get_active_memory() - before
    return Held(_tensors(model), reader.bytes_read, planned, allocated)


def _is_expert(name: str) -> bool:
    """Whether a parameter of the models of this file is stacked by expert."""
    return ".switch_mlp." in name or ".mlp.experts." in name


def _assert_equal(ours: mx.array, expected: mx.array) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(
        np.array(mx.view(ours, mx.uint8)), np.array(mx.view(expected, mx.uint8))
    )


def _check_union(folder: Path, expected: Tensors, placement: Placement) -> None:
    assert any(map(_is_expert, expected))
    held: dict[str, list[int]] = {name: [] for name in expected if _is_expert(name)}
    for rank, experts in enumerate(placement.rank_experts):
        ours = _load(folder, placement, rank)
        assert ours.tensors.keys() == expected.keys()
        for name, tensor in ours.tensors.items():
            if not _is_expert(name):
                _assert_equal(tensor, expected[name])
                continue
            assert tensor.shape == (len(experts), *expected[name].shape[1:])
            for slot, expert in enumerate(experts):
                _assert_equal(tensor[slot], expected[name][expert])
            held[name] += experts
        # mlx-lm drops nothing of these checkpoints: all that is read is held, and no
        # buffer is larger than the tensor it holds.
        num_bytes = sum(tensor.nbytes for tensor in ours.tensors.values())
        assert ours.counted == ours.planned == num_bytes
        assert num_bytes <= ours.allocated <= 1.1 * num_bytes
    everyone = list(range(placement.num_experts))
    assert all(sorted(experts) == everyone for experts in held.values())


def _num_experts(expected: Tensors) -> int:
    return next(t.shape[0] for name, t in expected.items() if _is_expert(name))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_hold_the_model(saved: tuple[Path, Tensors], num_ranks: int) -> None:
    folder, expected = saved
    placement = Placement.contiguous(_num_experts(expected), num_ranks)
    _check_union(folder, expected, placement)


@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
@pytest.mark.parametrize("quantization", [None, AFFINE, MXFP4])
def test_more_ranks_than_experts(
    tmp_path: Path, layout: str, quantization: dict[str, Any] | None
) -> None:
    folder = tiny.save_checkpoint(
        tmp_path, tiny.MIXTRAL, layout=layout, quantization=quantization
    )
    model, _ = mlx_lm.load(str(folder))
    placement = Placement.contiguous(5, 7)
    assert placement.num_slots(6) == 0
    _check_union(folder, _tensors(model), placement)


@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
def test_scattered_placement(tmp_path: Path, layout: str) -> None:
    """Slots may hold experts in any order, with gaps."""
    folder = tiny.save_checkpoint(tmp_path, tiny.QWEN3_MOE, layout=layout, shards=2)
    model, _ = mlx_lm.load(str(folder))
    placement = Placement(((7, 2, 3, 0), (), (9, 8, 1), (4, 5, 6)))
    _check_union(folder, _tensors(model), placement)


def test_without_aliasing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a buffer cannot be written in place, the tensors are the same."""
    folder = tiny.save_checkpoint(tmp_path, tiny.QWEN3_MOE, quantization=AFFINE)
    model, _ = mlx_lm.load(str(folder))
    monkeypatch.setattr(module, "buffers_alias", lambda: False)
    _check_union(folder, _tensors(model), Placement.contiguous(10, 3))
