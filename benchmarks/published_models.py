"""Shapes of models whose speed others have published, from their config.json values.

The values are those that the models were published with. How the weights of a
conversion are packed is said where it is known, and "assumed" where it is not.
"""

from __future__ import annotations

from typing import Any

# zai-org/GLM-5: 744 B parameters, 78 layers of which 3 are dense, MLA with an index.
# As mlx-community/GLM-5-8bit-MXFP8, of which exo issue 1468 says 767 GB.
GLM_5 = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "attention_bias": False,
    "quantization": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}

# moonshotai/Kimi-K2.6, the text model: as Kimi-K2.
KIMI_K2: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.827,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "attention_bias": False,
}

# openai/gpt-oss-120b; every second layer has a window of 128 tokens.
GPT_OSS_120B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "rope_theta": 150000,
    "rope_scaling": None,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}

_EIGHT_BITS = {"group_size": 64, "bits": 8, "mode": "affine"}


def kimi_k2_3bit() -> dict[str, Any]:
    """As spicyneuron/Kimi-K2.6-MLX-3.3bit: "3-bit baseline with important layers at
    8-bit and BF16", 3.331 bits per weight.

    Assumed: experts of 3 bit in groups of 128, all else 8 bit in groups of 64.
    """
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "embed_q", "unembed_out",
                 "o_proj")  # fmt: skip
    feed_forward = ("gate_proj", "up_proj", "down_proj")
    exact = {"model.embed_tokens": _EIGHT_BITS, "lm_head": _EIGHT_BITS}
    for index in range(KIMI_K2["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        exact |= {f"{layer}.self_attn.{name}": _EIGHT_BITS for name in attention}
        for name in feed_forward:
            exact[f"{layer}.mlp.{name}"] = _EIGHT_BITS
            exact[f"{layer}.mlp.shared_experts.{name}"] = _EIGHT_BITS
    quantization = {"group_size": 128, "bits": 3, "mode": "affine", **exact}
    return {**KIMI_K2, "quantization": quantization}


def gpt_oss_mxfp4() -> dict[str, Any]:
    """As mlx-community/gpt-oss-120b-MXFP4-Q8: experts in MXFP4, all else of 8 bit.

    Assumed: 8 bit in groups of 64.
    """
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    exact = {"model.embed_tokens": _EIGHT_BITS, "lm_head": _EIGHT_BITS}
    for index in range(GPT_OSS_120B["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        exact |= {f"{layer}.self_attn.{name}": _EIGHT_BITS for name in projections}
        exact[f"{layer}.mlp.router"] = _EIGHT_BITS
    quantization = {"group_size": 32, "bits": 4, "mode": "mxfp4", **exact}
    return {**GPT_OSS_120B, "quantization": quantization}
