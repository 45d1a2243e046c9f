"""Tiny random checkpoints written by transformers, with the logits it gives.

    python -m tests.support.oracle.checkpoints FOLDER NAME ...

in a Python that has PyTorch. The configurations are those of
tests/support/architectures.json; what they leave out has the default of transformers.
Tensor names and layout are those that transformers saves, which are the hub's.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "architectures.json").read_text()
)
VOCABULARY = 300
NUM_TOKENS = 48  # of a prefill; longer than the sliding windows, which are 16
TOKENS = np.random.default_rng(0).integers(2, VOCABULARY, NUM_TOKENS)

_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
_SMALL = {**_VISION, "num_hidden_layers": 1}
_QWEN_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "depth": 1,
    "out_hidden_size": 64, "deepstack_visual_indexes": [0],
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# The two pick other tokens for sparse attention: with as many to pick as there are
# tokens, all else can be compared.
_ALL_TOKENS = {"index_topk": 64}
# What a configuration says beside architectures.json: where transformers' default is
# another variant than mlx-lm's, or a vision tower of full size.
ADDED: dict[str, dict[str, Any]] = {
    "bailing_moe_v3": {
        "pad_token_id": 0, "num_key_value_heads": 4,
        "moe_shared_expert_intermediate_size": 32,
    },
    "deepseek_v32": _ALL_TOKENS,
    "glm_moe_dsa": _ALL_TOKENS,
    "gpt_oss": {"rope_parameters": _ROPE},
    "granitemoehybrid": {"position_embedding_type": "rope"},
    "kimi_k25": {"vision_config": _SMALL, "tie_word_embeddings": False},
    "kimi_linear": {"pad_token_id": 0},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "llama4": {"vision_config": _SMALL, "pad_token_id": 0},
    "longcat_flash": {"head_dim": 16},
    "mimo_v2_flash": {
        "layer_types": [
            "full_attention", "sliding_attention", "sliding_attention",
            "full_attention",
        ],
        "rope_parameters": {
            "full_attention": {**_ROPE, "partial_rotary_factor": 0.5},
            "sliding_attention": {**_ROPE, "partial_rotary_factor": 0.5},
        },
    },
    "minimax_m3_vl": {"vision_config": _SMALL},
    "mistral3": {"vision_config": _SMALL, "tie_word_embeddings": False},
    "jamba": {"num_experts_per_tok": 10},
    "phimoe": {"attention_bias": True, "lm_head_bias": True, "num_experts_per_tok": 2},
    "qwen3_5_moe": {"vision_config": _QWEN_VISION},
    "qwen3_vl_moe": {"vision_config": _QWEN_VISION},
    "solar_open": {"first_k_dense_replace": 0},
}  # fmt: skip
# The same inside text_config.
ADDED_TEXT: dict[str, dict[str, Any]] = {
    "minimax_m3_vl": {
        "rotary_dim": 8, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
    },
    "llama4": {"pad_token_id": 0},
}  # fmt: skip
# In config.json alone: what a value is called that transformers takes from another one.
IN_FILE: dict[str, dict[str, Any]] = {
    # transformers clips the time steps from below, whatever time_step_limit says.
    "nemotron_h": {"time_step_limit": [0.001, 1e9]},
    "nemotron_h_latent": {"time_step_limit": [0.001, 1e9]},
    "granitemoehybrid": {"time_step_limit": [0.0, 1e9]},
    "bailing_moe_v3": {"q_lora_rank": None},  # transformers has none
    "gpt_oss": {
        "quantization_config": {"quant_method": "mxfp4"},
        "rope_theta": 10000.0,
    },
    "mimo_v2_flash": {"swa_num_key_value_heads": 4, "sliding_window_size": 17},
}
# Tensors that are left at 0, because mlx-lm does not read them.
ZERO = {"ernie4_5_moe": "moe_statics"}


def write(folder: Path, name: str) -> None:
    """Write FOLDER/NAME: a checkpoint, config.json and ``logits.npy`` [T, vocabulary].

    Raises:
        LookupError: transformers has no such architecture.
    """
    import torch

    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = _model(_config(name))
    randomise(model, ZERO.get(name))
    packed = pack_experts(model) if name == "gpt_oss" else {}
    model.eval()
    target = folder / name
    model.save_pretrained(target)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)[None], use_cache=False).logits[0]
    np.save(target / "logits.npy", logits.float().numpy())
    file = target / "config.json"
    values = json.loads(file.read_text())
    values = hub_config(values, _values(name)) | IN_FILE.get(name, {})
    file.write_text(json.dumps(values))
    to_hub_layout(name, target / "model.safetensors", packed)


def _values(name: str) -> dict[str, Any]:
    values = {**deepcopy(ARCHITECTURES[name]), **deepcopy(ADDED.get(name, {}))}
    if "text_config" in values:
        values["text_config"] |= deepcopy(ADDED_TEXT.get(name, {}))
    return values


def _config(name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    values = _values(name)
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise LookupError(f"transformers has no model of type {model_type}")
    return AutoConfig.for_model(model_type, **values)


def _model(config: Any) -> Any:
    """transformers' model with plain attention and plain experts, in float32."""
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    if hasattr(config, "text_config"):  # the causal model would be its text part alone
        mappings.reverse()
    for mapping in mappings:
        if type(config) in mapping:
            return mapping[type(config)]._from_config(
                config,
                attn_implementation="eager",
                experts_implementation="eager",
                dtype=torch.float32,
            )
    raise LookupError(f"transformers has no text model for {config.model_type}")


def randomise(model: Any, zero: str | None = None) -> None:
    """Give every tensor of a checkpoint random values, also those that start as 0.

    Matrices so that activations keep their size; vectors (norms, biases, decays) their
    own start and some noise. A router that is 0 would send all tokens alike.

    Args:
        zero: tensors with this in their names become 0 instead.
    """
    import torch

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if zero and zero in key:
                tensor.zero_()
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim < 2:
                tensor += 0.1 * noise
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    model.tie_weights()


_REWRITTEN = (
    "bailing_moe_v3", "gpt_oss", "kimi_k25", "kimi_linear", "longcat_flash",
    "qwen3_5_moe", "qwen3_vl_moe",
)  # fmt: skip


def to_hub_layout(name: str, file: Path, packed: dict[str, Any]) -> None:
    """Where transformers 5.23 saves another layout than the hub's: the hub's.

    Args:
        packed: of `pack_experts`, instead of the tensors that they stand for.
    """
    from safetensors.torch import load_file, save_file

    if name not in _REWRITTEN:
        return
    tensors = load_file(file)
    if rename := _HUB_NAMES.get(name):
        pattern, replacement = rename
        tensors = {re.sub(pattern, replacement, k): v for k, v in tensors.items()}
    if name == "qwen3_vl_moe":  # [E, out, in] -> [E, in, out]
        for key in [key for key in tensors if ".mlp.experts." in key]:
            tensors[key] = tensors[key].swapaxes(-1, -2).contiguous()
    if name == "qwen3_5_moe":
        tensors = _fuse_experts(tensors)
    if name == "longcat_flash":  # the identity experts, which hold nothing there
        tensors = {k: v for k, v in tensors.items() if not re.search(r"ts\.1[01]\.", k)}
    for key, tensor in packed.items():
        tensors.pop(key.removesuffix("_blocks").removesuffix("_scales"), None)
        tensors[key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def pack_experts(model: Any) -> dict[str, Any]:
    """Give gpt_oss experts that mxfp4 can hold, and return them packed as on the hub.

    Groups of 32 numbers share a power of two, ``scale - 127``; a byte holds two
    numbers, the first in its low half (OCP Microscaling Formats, E2M1).

    Returns:
        ``NAME_blocks`` [E, out, in / 32, 16] and ``NAME_scales`` [E, out, in / 32] for
        each weight NAME [E, in, out].
    """
    import torch

    generator = torch.Generator().manual_seed(3)
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat([positive, -positive])
    packed = {}
    for name, weight in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = weight.shape
        groups = (experts, outputs, inputs // 32)
        codes = torch.randint(0, 16, (*groups, 32), generator=generator)
        scales = torch.randint(122, 125, groups, generator=generator)
        values = numbers[codes] * torch.exp2(scales - 127.0)[..., None]
        weight.copy_(values.reshape(experts, outputs, inputs).swapaxes(1, 2))
        low, high = codes[..., ::2], codes[..., 1::2]
        packed[f"{name}_blocks"] = (low | high << 4).to(torch.uint8)
        packed[f"{name}_scales"] = scales.to(torch.uint8)
    return packed


# Its rules for one part of these models rename another part too.
_HUB_NAMES = {
    "bailing_moe_v3": (r"(\.layers\.[02]\.attention\.)dense", r"\1o_proj"),
    "kimi_k25": (
        r"^model\.(mm_projector)|^(language_model\.model\.)blocks",
        lambda match: match[1] or match[2] + "layers",
    ),
    "kimi_linear": (r"^(model\.layers\.0\.)block_sparse_moe", r"\1mlp"),
}


def _fuse_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """Experts one by one -> gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""
    import torch

    fused = {k: v for k, v in tensors.items() if ".mlp.experts." not in k}
    blocks = {k.split(".experts.")[0] for k in tensors if ".mlp.experts." in k}
    for block in blocks:
        experts = [f"{block}.experts.{e}." for e in range(10)]
        both = [
            torch.cat([tensors[f"{e}{name}_proj.weight"] for name in ("gate", "up")])
            for e in experts
        ]
        down = [tensors[f"{e}down_proj.weight"] for e in experts]
        fused[f"{block}.experts.gate_up_proj"] = torch.stack(both)
        fused[f"{block}.experts.down_proj"] = torch.stack(down)
    return fused


def hub_config(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """config.json as checkpoints on the hub have it.

    transformers 5 writes the rotary embedding's parameters in one record; checkpoints
    of earlier versions, and mlx-lm, have them beside the other values.

    Args:
        values: as transformers wrote it.
        given: as the architecture's tiny configuration says it.
    """
    merged = {**values, **given}
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        merged.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            merged.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    for part in ("text_config",):
        if isinstance(given.get(part), dict):
            merged[part] = hub_config(values[part], given[part])
    merged["eos_token_id"] = 1
    return merged


def main() -> None:
    warnings.simplefilter("ignore")
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    problems = {}
    for name in names:
        try:
            write(folder, name)
        # Whatever transformers raises is what the table says of the architecture.
        except Exception as error:
            if os.environ.get("TRACE"):
                raise
            problems[name] = " ".join(f"{type(error).__name__}: {error}".split())
    (folder / "problems.json").write_text(json.dumps(problems, indent=2))


if __name__ == "__main__":
    main()
