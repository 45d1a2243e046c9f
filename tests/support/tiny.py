"""Tiny random models of mlx-lm's architectures, in memory and as checkpoints.

Everything is made here; nothing is downloaded. Widths differ from one another, so that
a mixed-up axis is an error and not a coincidence.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 300

_ATTENTION = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    **_ATTENTION,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

# Experts whose width three ranks can share in groups of 32.
WIDE_QWEN3_MOE = {**QWEN3_MOE, "moe_intermediate_size": 96}

QWEN2_MOE = {  # a gated shared expert
    "model_type": "qwen2_moe",
    **_ATTENTION,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 96,
}

DEEPSEEK_V3 = {  # sigmoid router with groups and a correction bias; shared experts; MLA
    "model_type": "deepseek_v3",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
}

GPT_OSS = {  # biases on router and experts, a clamped SwiGLU, attention sinks
    "model_type": "gpt_oss",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_local_experts": 10,
    "num_experts_per_tok": 3,
    "intermediate_size": 32,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
    "rope_scaling": None,
    "layer_types": ["sliding_attention", "full_attention"],
}

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 5,
}

OLMOE = {  # reshapes its sum
    "model_type": "olmoe",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
}

LONGCAT = {  # identity experts: not linear in its experts' outputs alone
    "model_type": "longcat_flash",
    "attention_method": "MLA",
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "moe_topk": 3,
    "expert_ffn_hidden_size": 32,
    "n_routed_experts": 8,
    "zero_expert_num": 2,
    "num_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "routed_scaling_factor": 1.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "attention_bias": False,
    "zero_expert_type": "identity",
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
}

DENSE = {
    "model_type": "qwen3",
    **_ATTENTION,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
}

LLAMA = {**DENSE, "model_type": "llama"}


def make_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A model in float32 whose routers spread tokens over all experts."""
    model_class, args_class = _get_classes(dict(config))
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(deepcopy(config)))
    routers = ("gate.weight", "router.weight", "classifier.weight")
    random = [
        (name, mx.random.normal(p.shape) * (0.3 if name.endswith(routers) else 0.1))
        for name, p in tree_flatten(model.parameters())
        if name.endswith((*routers, "bias"))
    ]
    model.load_weights(random, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model


def save_checkpoint(
    folder: Path,
    config: dict[str, Any],
    seed: int = 0,
    quantization: dict[str, Any] | None = None,
    layout: str = "stacked",
    shards: int = 1,
) -> Path:
    """A folder that mlx_lm.load accepts.

    Args:
        quantization: group_size, bits, mode.
        layout: ``stacked`` (mlx-lm's) or ``per_expert`` (the hub's, for models that
            call the experts' list ``experts``).
        shards: safetensors files, with an index if there are several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**deepcopy(config), "eos_token_id": 1}
    model = make_model(config, seed)
    if quantization:
        model, config = quantize_model(model, config, **quantization)
    save_model(folder, model)
    if layout == "per_expert" or shards > 1:
        weights = dict(tree_flatten(model.parameters()))
        if layout == "per_expert":
            weights = _per_expert(weights)
        _save_shards(folder, weights, shards)
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["experts route tokens over ranks " * 9], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] if m['role'] == 'assistant' else 'user' "
        "}}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return fast


def _per_expert(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    names = {}
    if any("block_sparse_moe" in name for name in weights):  # mixtral's names
        names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    split: dict[str, mx.array] = {}
    for name, weight in weights.items():
        match = re.search(r"\.switch_mlp\.(\w+)\.", name)
        if match is None:
            split[name] = weight
            continue
        before, after = name[: match.start()], name[match.end() :]
        projection = names.get(match[1], match[1])
        for expert in range(weight.shape[0]):
            new = f"{before}.experts.{expert}.{projection}.{after}"
            split[new] = mx.contiguous(weight[expert])
    return split


def _save_shards(folder: Path, weights: dict[str, mx.array], shards: int) -> None:
    for old in folder.glob("model*"):
        old.unlink()
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        mx.save_safetensors(str(folder / file), part, {"format": "mlx"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
