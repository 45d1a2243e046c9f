"""Parts of the width of experts: what is read, and that the parts make the whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.config import EPConfig
from mlx_ep.loading import Checkpoint, TensorReader, choose_placement, load_local
from mlx_ep.loading import checkpoint as module
from mlx_ep.loading.dummy import build_dummy
from mlx_ep.loading.local import outline
from mlx_ep.loading.sizes import expert_sizes, experts_bytes, held_bytes
from mlx_ep.loading.widths import width_problem
from mlx_ep.placement import Placement, place
from tests.support import tiny
from tests.support.architectures import ARCHITECTURES, make_model
from tests.support.hub_layouts import HUB_LAYOUTS

AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
# An expert of 96 columns: 3 quantization groups.
QWEN3_MOE = {**tiny.QWEN3_MOE, "moe_intermediate_size": 96}
GPT_OSS = {**tiny.GPT_OSS, "intermediate_size": 96}  # biases
PHIXTRAL = {  # SwitchMLP, with biases
    **ARCHITECTURES["phixtral"],
    "model_dim": 32,
}

CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stacked": (QWEN3_MOE, {}),
    "per expert in 3 files": (QWEN3_MOE, {"layout": "per_expert", "shards": 3}),
    "affine": (QWEN3_MOE, {"quantization": AFFINE}),
    "mxfp4": (QWEN3_MOE, {"quantization": MXFP4}),
    "biases": (GPT_OSS, {}),
    "biases, affine": (GPT_OSS, {"quantization": AFFINE}),
    "two matrices": (PHIXTRAL, {}),
}

Tensors = dict[str, mx.array]
# 3 ranks share 10 experts; two groups of two; one with a rank that has no experts.
PLACEMENTS = {
    "3 ranks, one group": Placement.from_groups([10], [(32, 32, 32)]),
    "4 ranks, two groups": Placement.from_groups([7, 3], [(64, 32), (32, 64)]),
    "a group without experts": Placement.from_groups([10, 0], [(64, 32), (64, 32)]),
}


def _tensors(model: Any) -> Tensors:
    return dict(tree_flatten(model.parameters()))


def _is_expert(name: str) -> bool:
    return ".switch_mlp." in name or ".mlp.experts." in name


def _axis(name: str) -> int | None:
    """The axis of F of a stacked parameter."""
    projection, parameter = name.split(".")[-2:]
    if projection in ("down_proj", "fc2"):
        return None if parameter == "bias" else 2
    return 1


def _check(
    folder: Path, expected: Tensors, placement: Placement, num_experts: int
) -> list[tuple[int, int]]:
    """The parts of all ranks make the model's tensors; (read, held) of every rank."""
    assert placement.parts is not None
    seen = {n: np.zeros(t.shape, np.int8) for n, t in expected.items() if _is_expert(n)}
    assert seen
    sizes = []
    for rank, (experts, part) in enumerate(
        zip(placement.rank_experts, placement.parts, strict=True)
    ):
        checkpoint = Checkpoint.open(folder)
        with TensorReader() as reader:
            model = load_local(checkpoint, placement, rank, reader)
        ours = _tensors(model)
        held = sum(tensor.nbytes for tensor in ours.values())
        assert held == held_bytes(outline(checkpoint, placement, rank))
        sizes.append((reader.bytes_read, held))
        missing = {name for name in expected if name not in ours}
        if part.is_first:
            assert not missing
        assert all(name.endswith(("down_proj.bias", "fc2.bias")) for name in missing)
        for name, tensor in ours.items():
            whole = expected[name]
            if not _is_expert(name):
                assert mx.array_equal(tensor, whole)
                continue
            index: list[Any] = [mx.array(experts, mx.int32)]
            if (axis := _axis(name)) is not None:
                size = whole.shape[axis]
                ends = [end * size // part.width for end in (part.start, part.stop)]
                index += [slice(None)] * (axis - 1) + [slice(*ends)]
            if experts:
                assert mx.array_equal(tensor, whole[tuple(index)])
            assert tensor.shape[0] == len(experts)
            seen[name][(list(experts), *index[1:])] += 1
    for name, times in seen.items():
        assert (times == 1).all(), name  # the union is all, without overlap
    return sizes


def _combinations() -> Iterator[Any]:
    """Every checkpoint with one placement; the others take longer."""
    for index, checkpoint in enumerate(CHECKPOINTS):
        for number, placement in enumerate(PLACEMENTS):
            is_slow = number != index % len(PLACEMENTS)
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(checkpoint, placement, marks=marks)


@pytest.mark.parametrize(("checkpoint", "placement"), list(_combinations()))
def test_parts_make_the_whole(tmp_path: Path, checkpoint: str, placement: str) -> None:
    config, options = CHECKPOINTS[checkpoint]
    folder = tiny.save_checkpoint(tmp_path, config, **options)
    model, _ = mlx_lm.load(str(folder))
    _check(folder, _tensors(model), _scaled(placement, config), 10)


def _scaled(name: str, config: dict[str, Any]) -> Placement:
    """The placement for the width of a configuration (phixtral's is 4 D = 128)."""
    placement = PLACEMENTS[name]
    if config is not PHIXTRAL:
        return placement
    counts = [10] if "one" in name else [7, 3]
    widths = [(50, 60, 18)] if "one" in name else [(1, 127), (64, 64)]
    return Placement.from_groups(counts, widths)


@pytest.mark.parametrize("min_span", [1, 4096])
@pytest.mark.parametrize("layout", ["stacked", "per_expert"])
def test_bytes_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, min_span: int
) -> None:
    """Rows are read exactly. Short columns are read with what lies between them."""
    monkeypatch.setattr(module, "_MIN_SPAN_BYTES", min_span)
    folder = tiny.save_checkpoint(tmp_path, QWEN3_MOE, layout=layout)
    model, _ = mlx_lm.load(str(folder))
    placement = PLACEMENTS["3 ranks, one group"]
    expected = _tensors(model)
    sizes = _check(folder, expected, placement, 10)
    down = sum(t.nbytes for n, t in expected.items() if "switch_mlp.down_proj" in n)
    for read, held in sizes:
        assert read == (held if min_span == 1 else held + down * 2 // 3)


def test_uneven_columns_at_once(tmp_path: Path) -> None:
    """Columns of 4 KiB and more are read by themselves."""
    config = {**tiny.MIXTRAL, "intermediate_size": 2048, "num_hidden_layers": 1}
    folder = tiny.save_checkpoint(tmp_path, config)
    model, _ = mlx_lm.load(str(folder))
    placement = Placement.from_groups([5], [(1024, 1024)])
    for read, held in _check(folder, _tensors(model), placement, 5):
        assert read == held


FUSED = ("gpt_oss", "qwen3_5_moe", "qwen3_vl_moe", "granitemoe", "deepseek_v41")


@pytest.mark.parametrize("name", FUSED)
def test_fused_checkpoints_are_cut_later(tmp_path: Path, name: str) -> None:
    """Gate and up in one tensor are read whole; what is held is the part."""
    config = ARCHITECTURES[name]
    model = make_model(config)
    expected = _tensors(model)
    hub = HUB_LAYOUTS[name](dict(expected))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), hub)
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    placement = choose_placement(
        EPConfig(ep_size=1),
        10,
        3,
        lambda: outline(checkpoint, Placement.contiguous(10, 1), 0),
    )
    assert placement.parts is not None
    width = placement.parts[0].width
    assert sorted(p.columns for p in placement.parts)[0] == width // 3
    for rank, part in enumerate(placement.parts):
        with TensorReader() as reader:
            ours = _tensors(load_local(checkpoint, placement, rank, reader))
        for path, tensor in ours.items():
            whole = expected[path]
            if tensor.shape == whole.shape:
                continue
            axis = _axis(path)
            assert axis is not None
            cut = (*[slice(None)] * axis, slice(part.start, part.stop))
            assert mx.array_equal(tensor, whole[cut])
            assert tensor.shape[axis] == part.columns


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"muse_spark"}))
def test_parts_of_every_architecture(name: str) -> None:
    """Of the model that its config.json makes, the parts weigh what the whole does."""
    config = ARCHITECTURES[name]
    whole = build_dummy(config, Placement.contiguous(10, 1), 0)
    sizes = expert_sizes(whole)
    placement = place(replace(sizes, unit=1), 3, ep_size=1)
    assert width_problem(whole) == ""
    parts = [build_dummy(config, placement, rank) for rank in range(3)]
    assert sum(map(experts_bytes, parts)) == experts_bytes(whole)
    assert all(
        held_bytes(part) - experts_bytes(part) == sizes.dense_bytes for part in parts
    )


class _MixingActivation(nn.Module):
    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return mx.softmax(gate, axis=-1) * x


class _OtherSwitch(SwitchGLU):
    pass


def test_what_cannot_be_parted() -> None:
    model = tiny.make_model(QWEN3_MOE)
    switch = model.layers[1].mlp.switch_mlp
    switch.activation = _MixingActivation()
    config = EPConfig(ep_size=1)
    with pytest.raises(ValueError, match=r"\(_MixingActivation\) mixes columns"):
        choose_placement(config, 10, 2, lambda: model)
    model.layers[1].mlp.switch_mlp.__class__ = _OtherSwitch
    with pytest.raises(ValueError, match=r"_OtherSwitch.*do more than their matrices"):
        choose_placement(config, 10, 2, lambda: model)
