"""The shapes that the cost model takes, and those of real configurations."""

from __future__ import annotations

import pytest

from mlx_ep.cost.shape import (
    MatrixTotal,
    layer_from_json,
    model_from_json,
    named_layer,
)
from mlx_ep.loading.shape import model_shape
from mlx_ep.types import MXFP4, Packing
from tests.support import tiny
from tests.support.round_numbers import MODEL


def test_named_layers_and_packings() -> None:
    layer = named_layer("kimi-k2", scale=4)
    assert (layer.num_experts, layer.width, layer.expert_width) == (384, 1792, 512)
    assert layer.bytes_per_weight == 0.5625
    assert named_layer("8,64,128,2", MXFP4).expert_bytes == 3 * 64 * 128 * 17 // 32
    assert (
        named_layer("8,64,128,2", Packing.affine(4, 64, "float32")).bytes_per_weight
        == 0.625
    )
    for name, message in (("kimi", "must be one of"), ("8,64,128", "four numbers")):
        with pytest.raises(ValueError, match=message):
            named_layer(name)
    with pytest.raises(ValueError, match="multiples of the packing's group"):
        named_layer("kimi-k2", scale=3)
    with pytest.raises(ValueError, match="top_k must be at most"):
        named_layer("8,64,128,9")


def test_shapes_survive_json() -> None:
    layer = named_layer("mixtral-8x7b")
    assert layer_from_json(layer.to_json()) == layer
    assert model_from_json(MODEL.to_json()) == MODEL
    with pytest.raises(ValueError, match="has no widht"):
        layer_from_json({**layer.to_json(), "widht": 1})
    with pytest.raises(ValueError, match="lacks values"):
        layer_from_json({"width": 1})


CONFIGURATIONS = {
    "qwen3_moe": tiny.QWEN3_MOE,
    "deepseek_v3": tiny.DEEPSEEK_V3,
    "gpt_oss": tiny.GPT_OSS,
    "qwen2_moe": tiny.QWEN2_MOE,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_model_shape_counts_every_matrix(name) -> None:
    """Against the parameters of the model itself."""
    from mlx.utils import tree_flatten

    config = CONFIGURATIONS[name]
    shape = model_shape(config, dtype="float32")
    parameters = dict(tree_flatten(tiny.make_model(config).parameters()))
    matrices = {
        path: array
        for path, array in parameters.items()
        if path.endswith("weight") and array.ndim > 1 and "embed_tokens" not in path
    }
    counted = shape.attention + shape.dense + shape.head
    each = shape.layer.router.weights + shape.layer.shared.weights
    each += shape.layer.num_experts * shape.layer.expert_weights
    total = counted.weights + shape.num_moe_layers * each
    assert total == sum(array.size for array in matrices.values())
    assert shape.num_layers == config["num_hidden_layers"]
    assert shape.layer.top_k == config["num_experts_per_tok"]


def test_model_shape_of_known_numbers() -> None:
    shape = model_shape(tiny.QWEN3_MOE)
    layers, heads, kv_heads, head = 3, 4, 2, 16
    assert shape.kv_bytes == layers * 2 * kv_heads * head * 2
    assert shape.attention_macs == layers * 2 * heads * head
    assert shape.attention_scores == layers * heads
    assert shape.num_moe_layers == 2
    # shard() splits the four projections and the dense layer's three.
    assert shape.attention.split_weights == shape.attention.weights
    assert shape.dense.split_weights == shape.dense.weights == 3 * 64 * 96
    assert shape.layer.router == MatrixTotal(640, 1280)
    assert shape.has_shard and shape.kv_is_split
    assert not model_shape(tiny.QWEN2_MOE).has_shard
    windowed = model_shape(tiny.GPT_OSS)
    assert (windowed.window, windowed.window_kv_bytes) == (16, windowed.kv_bytes // 2)
    latents = model_shape(tiny.DEEPSEEK_V3)
    assert not latents.kv_is_split and latents.kv_bytes == 3 * (32 + 16) * 2


def test_model_shape_of_a_quantized_model() -> None:
    config = {**tiny.QWEN3_MOE, "quantization": {"group_size": 32, "bits": 4}}
    shape = model_shape(config)
    assert shape.layer.packing == Packing.affine(4, 32)
    assert shape.layer.expert_bytes == Packing.affine(4, 32).num_bytes(3 * 64 * 32)
    assert shape.dense_packing == shape.layer.packing
    assert shape.attention.num_bytes == Packing.affine(4, 32).num_bytes(
        shape.attention.weights
    )


def test_held_bytes_by_arm() -> None:
    whole = MODEL.num_bytes
    assert MODEL.held_bytes("single", 2) == whole
    experts = MODEL.expert_bytes
    assert MODEL.held_bytes("ep-replicated", 2) == whole - experts // 2
    split = MODEL.held_bytes("ep-tensor", 2)
    assert split == whole - experts // 2 - 20_000
    assert MODEL.held_bytes("tp", 2) == split - 15_000
    assert MODEL.held_bytes("ep-replicated", 3) == whole - experts + 2 * 3 * 10_000
