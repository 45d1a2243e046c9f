"""mlx-lm's MoE block in the shape that is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float
from mlx_lm.models.qwen3_moe import ModelArgs, Qwen3MoeSparseMoeBlock

from mlx_ep.benchmark.shapes import LayerShape


def moe_block(shape: LayerShape, gate: nn.Module, switch: Any) -> nn.Module:
    """Router, experts and their weighted sum, with a gate and a switch of the caller's.

    Args:
        gate: the router's linear layer.
        switch: mlx-lm's `SwitchGLU`, or what is called like one.
    """
    block = Qwen3MoeSparseMoeBlock(_block_args(shape))
    block.gate = gate
    block.switch_mlp = switch
    return block.eval()


class OneLayer(nn.Module):
    """A model that is one MoE block, as far as `mlx_ep.models` looks at it."""

    def __init__(self, block: nn.Module, width: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.mlp = block
        self._width, self._dtype = width, dtype

    def make_cache(self) -> list[Any]:
        return []

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        key = mx.random.key(0)
        shape = (*tokens.shape, self._width)
        return self.mlp(mx.random.normal(shape, self._dtype, key=key))


class Router:
    """The routing of mlx-lm's block, by the block's own code.

    It runs with the identity in the place of its experts, whose weighted sum is the
    gates.
    """

    def __init__(self, shape: LayerShape, block: nn.Module) -> None:
        self.block = moe_block(shape, block.gate, self._keep_ids)

    def __call__(self, x: Float[mx.array, "T D"]) -> tuple[mx.array, mx.array]:
        """Ids and gates, ``[T, K]`` both."""
        gates = self.block(x)
        return self.ids, gates

    def _keep_ids(self, x: mx.array, ids: mx.array) -> mx.array:
        self.ids = ids
        num_slots = ids.shape[-1]
        return mx.broadcast_to(mx.eye(num_slots), (*ids.shape, num_slots))


def _block_args(shape: LayerShape) -> ModelArgs:
    """A configuration of which the MoE block uses five numbers."""
    used: Mapping[str, Any] = {
        "hidden_size": shape.width,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": 1,  # the switch is replaced
        "norm_topk_prob": True,
    }
    unused = dict.fromkeys(
        (
            "num_hidden_layers", "intermediate_size", "num_attention_heads",
            "decoder_sparse_step", "vocab_size", "num_key_value_heads", "head_dim",
            "max_position_embeddings",
        ),
        1,
    )  # fmt: skip
    return ModelArgs(
        model_type="qwen3_moe",
        mlp_only_layers=[],
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        **used,
        **unused,
    )
