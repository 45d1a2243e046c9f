"""DBRX: a list of experts becomes a stack, in the model and in its checkpoints."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_model

import mlx_ep
from mlx_ep.loading import Checkpoint, TensorReader, load_bytes, load_local
from mlx_ep.models import dbrx, find_moe_sites, stack_experts
from mlx_ep.placement import Placement
from tests.support import tiny
from tests.support.architectures import ARCHITECTURES, logits, make_model
from tests.support.hub_layouts import HUB_LAYOUTS

CONFIG = ARCHITECTURES["dbrx"]
AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
EIGHT = {"group_size": 32, "bits": 8, "mode": "affine"}


def _mixed(path: str, module: nn.Module) -> bool | dict[str, Any]:
    """8 bits for the experts of layer 0."""
    if not hasattr(module, "to_quantized"):
        return False
    return EIGHT if ".blocks.0.ffn.experts." in path else True


def _save(folder: Path, form: str) -> Path:
    config = {**deepcopy(CONFIG), "eos_token_id": 1}
    model = make_model(config)
    if form in ("4-bit", "mixed"):
        predicate = _mixed if form == "mixed" else None
        model, config = quantize_model(
            model, config, **AFFINE, quant_predicate=predicate
        )
    if form == "fused":
        tensors = HUB_LAYOUTS["dbrx"](dict(tree_flatten(model.parameters())))
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    else:
        save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("num_ranks", [1, 3, 12])
@pytest.mark.parametrize("form", ["listed", "fused", "4-bit", "mixed"])
def test_ranks_hold_the_model(tmp_path: Path, form: str, num_ranks: int) -> None:
    """Each its own experts, of which it reads nothing but them. 2 of 12 have none."""
    folder = _save(tmp_path, form)
    whole = stack_experts(load_model(folder)[0])
    expected = dict(tree_flatten(whole.parameters()))
    placement = Placement.contiguous(10, num_ranks)
    for rank, experts in enumerate(placement.rank_experts):
        opened = Checkpoint.open(folder)
        with TensorReader() as reader:
            ours = load_local(opened, placement, rank, reader)
        found = dict(tree_flatten(ours.parameters()))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            whole_tensor = expected[name]
            if ".switch_mlp." in name:
                whole_tensor = whole_tensor[mx.array(experts, mx.int32)]
            assert tensor.dtype == whole_tensor.dtype, name
            np.testing.assert_array_equal(np.array(tensor), np.array(whole_tensor))
        held = sum(tensor.nbytes for tensor in found.values())
        assert reader.bytes_read == load_bytes(opened, placement, rank).rank_bytes
        assert reader.bytes_read <= 1.02 * held
        if form == "mixed" and experts:
            assert [s.switch.up_proj.bits for s in find_moe_sites(ours)] == [8, 4]


def test_the_stack_is_the_list() -> None:
    """mlx-lm's loop over tokens gives what all tokens at once give."""
    model = make_model(CONFIG)
    listed = model.layers[0].ffn
    x = mx.random.normal((2, 7, 64), key=mx.random.key(0))
    expected = listed(x)
    stack_experts(model)
    assert type(model.layers[0].ffn) is dbrx.StackedMoeBlock
    assert "experts" not in model.layers[0].ffn
    np.testing.assert_allclose(
        np.array(model.layers[0].ffn(x)), np.array(expected), atol=1e-6
    )
    before = dict(tree_flatten(model.parameters()))
    stack_experts(model)  # a second time changes nothing
    assert all(v is before[k] for k, v in tree_flatten(model.parameters()))


@pytest.mark.parametrize("quantize", [False, True])
def test_a_loaded_model_is_parallelized(quantize: bool) -> None:
    model = make_model(CONFIG)
    if quantize:
        model, _ = quantize_model(model, dict(CONFIG), **AFFINE)
    expected = logits(model)
    model = mlx_ep.parallelize(model)
    assert {block.form.tier for block in model.expert_parallel.blocks} == {"routed"}
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-5)


def test_experts_of_one_layer_with_different_settings_are_refused(
    tmp_path: Path,
) -> None:
    model = make_model(CONFIG)
    one = "transformer.blocks.1.ffn.experts.3.w1"
    quantized, config = quantize_model(
        model,
        dict(CONFIG),
        **AFFINE,
        quant_predicate=lambda path, module: (
            EIGHT if path == one else hasattr(module, "to_quantized")
        ),
    )
    needs = r"All experts of a layer must be quantized alike; .*'bits': 8.*Convert"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=needs):  # there is no weight to be read
        mlx_ep.load(str(tmp_path))
    with pytest.raises(ValueError, match="All experts of a layer must be quantized"):
        mlx_ep.parallelize(quantized)
