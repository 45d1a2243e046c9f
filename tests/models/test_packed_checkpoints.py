"""Checkpoints as they are published: packed numbers, and layers that mlx-lm drops.

Ranks are loaded one after another in this process. MLX's CPU backend cannot run most
of these models, so that parameters are compared and not logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_ep.loading import Checkpoint, TensorReader, load_bytes, load_local
from mlx_ep.models import find_moe_sites
from mlx_ep.placement import Placement
from tests.support.architectures import ARCHITECTURES, make_model
from tests.support.hub_layouts import HUB_LAYOUTS, Tensors, fused

Pack = Callable[[mx.array], dict[str, mx.array]]


def _fp8_blocks(weight: mx.array) -> dict[str, mx.array]:
    """One scale per 128 x 128 numbers; these matrices are smaller than that."""
    return {
        "weight": mx.to_fp8(weight * 64),
        "weight_scale_inv": mx.full((1, 1), 1 / 64),
    }


def _mxfp8(weight: mx.array) -> dict[str, mx.array]:
    packed, scales = mx.quantize(weight, 32, 8, "mxfp8")
    return {"weight": packed.view(mx.uint8), "weight_scale_inv": scales}


def _int4(weight: mx.array) -> dict[str, mx.array]:
    """8 numbers per int32, offset by 8."""
    packed, scales, _ = mx.quantize(weight, 32, 4)
    return {
        "weight_packed": packed.view(mx.int32),
        "weight_scale": scales,
        "weight_shape": mx.array(weight.shape),
    }


def _mxfp4(weight: mx.array) -> dict[str, mx.array]:
    packed, scales = mx.quantize(weight, 32, 4, "mxfp4")
    return {"weight_packed": packed.view(mx.uint8), "weight_scale": scales}


def _fp4_tiles(weight: mx.array) -> dict[str, mx.array]:
    packed, scales = mx.quantize(weight, 32, 4, "mxfp4")
    return {"weight": packed.view(mx.uint8), "scale": scales}


def _per_expert(name: str, pack: Pack) -> Tensors:
    """An architecture's layout on the hub, each expert's matrices packed."""
    packed: Tensors = {}
    for key, tensor in _hub(name).items():
        if ".experts." not in key or tensor.ndim != 2:
            packed[key] = tensor
            continue
        before = key.removesuffix("weight")
        packed |= {before + part: value for part, value in pack(tensor).items()}
    return packed


def _hub(name: str) -> Tensors:
    model = make_model(ARCHITECTURES[name])
    return HUB_LAYOUTS[name](dict(tree_flatten(model.parameters())))


def _gpt_oss_mxfp4() -> Tensors:
    """``gate_up_proj_blocks [E, 2F, D/32, 16]`` and ``_scales [E, 2F, D/32]``."""
    packed: Tensors = {}
    for key, tensor in _hub("gpt_oss").items():
        if ".experts." not in key or key.endswith("_bias"):
            packed[key] = tensor
            continue
        weight, scales = mx.quantize(tensor, 32, 4, "mxfp4")
        before = key.removesuffix(".weight")
        blocks = weight.view(mx.uint8).reshape(*scales.shape, 16)
        packed |= {f"{before}_blocks": blocks, f"{before}_scales": scales}
    return packed


def _mistral4_fp8() -> Tensors:
    """Fused, one scale per expert, and activation scales that nobody reads."""
    packed: Tensors = {}
    for key, tensor in _hub("mistral4").items():
        packed[key] = tensor
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[key] = mx.to_fp8(tensor * 64)
            packed[f"{key}_scale_inv"] = mx.full((10, 1, 1), 1 / 64)
            packed[f"{key}_activation_scale"] = mx.array(1.0)
    return packed


def _with_dropped_layers() -> Tensors:
    """deepseek_v3 with layer 61, which predicts a second token; mlx-lm drops it."""
    tensors = _hub("deepseek_v3")
    second = {
        key.replace("layers.2.", "layers.61."): tensor
        for key, tensor in tensors.items()
        if "layers.2." in key
    }
    return tensors | second


def _minimax_m3_fused() -> Tensors:
    """Stacked, gate and up in one."""
    model = make_model(ARCHITECTURES["minimax_m3_vl"])
    stack = ".block_sparse_moe.switch_mlp."
    return fused(
        dict(tree_flatten(model.parameters())),
        stack,
        gate_up=f"{stack}gate_up_proj.weight",
        down=f"{stack}down_proj.weight",
    )


INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
MXFP4 = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}

# What is published, and its quantization_config.
CHECKPOINTS: dict[str, tuple[str, Callable[[], Tensors], dict[str, str] | None]] = {
    "gpt_oss mxfp4": ("gpt_oss", _gpt_oss_mxfp4, {"quant_method": "mxfp4"}),
    "deepseek_v3 fp8": (
        "deepseek_v3",
        lambda: _per_expert("deepseek_v3", _fp8_blocks),
        None,
    ),
    "deepseek_v3 with layer 61": ("deepseek_v3", _with_dropped_layers, None),
    "minimax fp8": ("minimax", lambda: _per_expert("minimax", _fp8_blocks), None),
    "mimo_v2_flash fp8": (
        "mimo_v2_flash",
        lambda: _per_expert("mimo_v2_flash", _fp8_blocks),
        None,
    ),
    "mistral4 fp8": ("mistral4", _mistral4_fp8, None),
    "kimi_k25 int4": ("kimi_k25", lambda: _per_expert("kimi_k25", _int4), INT4),
    "kimi_k3 mxfp4": ("kimi_k3", lambda: _per_expert("kimi_k3", _mxfp4), MXFP4),
    "minimax_m3_vl mxfp8": (
        "minimax_m3_vl",
        lambda: _per_expert("minimax_m3_vl", _mxfp8),
        {"quant_method": "mxfp8"},
    ),
    "minimax_m3_vl fused": ("minimax_m3_vl", _minimax_m3_fused, None),
    "deepseek_v41 fp4": (
        "deepseek_v41",
        lambda: _per_expert("deepseek_v41", _fp4_tiles),
        {"quant_method": "mxfp4"},
    ),
}


def _save(
    folder: Path, name: str, tensors: Tensors, quantization: dict[str, str] | None
) -> Path:
    config: dict[str, Any] = deepcopy(ARCHITECTURES[name])
    if quantization:
        config["quantization_config"] = quantization
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_ranks_hold_the_model(tmp_path: Path, checkpoint: str) -> None:
    name, make, quantization = CHECKPOINTS[checkpoint]
    folder = _save(tmp_path, name, make(), quantization)
    model, _ = load_model(folder)
    expected = dict(tree_flatten(model.parameters()))
    switches = tuple(f"{s.path}.{s.switch_name}." for s in find_moe_sites(model))
    placement = Placement.contiguous(10, 3)
    for rank, experts in enumerate(placement.rank_experts):
        opened = Checkpoint.open(folder)
        with TensorReader() as reader:
            ours = load_local(opened, placement, rank, reader)
        assert reader.bytes_read == load_bytes(opened, placement, rank).rank_bytes
        found = dict(tree_flatten(ours.parameters()))
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            whole = expected[key]
            if key.startswith(switches):
                whole = whole[mx.array(experts)]
            assert tensor.dtype == whole.dtype, key
            np.testing.assert_array_equal(
                np.array(mx.contiguous(tensor).view(mx.uint8)),
                np.array(mx.contiguous(whole).view(mx.uint8)),
                err_msg=key,
            )


def test_a_shared_expert_among_the_routed_ones_is_refused(tmp_path: Path) -> None:
    """Some conversions of minimax_m3_vl append the shared expert to the stacks."""
    tensors: Tensors = {}
    for key, tensor in _minimax_m3_fused().items():
        if ".switch_mlp." in key:
            tensor = mx.concatenate([tensor, tensor[:1]])
        tensors[key] = tensor
    checkpoint = Checkpoint.open(_save(tmp_path, "minimax_m3_vl", tensors, None))
    with pytest.raises(ValueError, match=r"must hold 10 experts.*mlx_lm\.convert"):
        load_bytes(checkpoint, Placement.contiguous(10, 2), 0)
