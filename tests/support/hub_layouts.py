"""How checkpoints on the hub lay their experts out, made from mlx-lm's stacks.

Each function takes the tensors of a model as mlx-lm names them and returns them as the
architecture's authors publish them; mlx-lm's `sanitize` does the opposite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import mlx.core as mx

Tensors = dict[str, mx.array]
Layout = Callable[[Tensors], Tensors]

W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def per_expert(
    tensors: Tensors,
    stack: str = ".mlp.switch_mlp.",
    experts: str = ".mlp.experts.",
    names: Mapping[str, str] = {},
) -> Tensors:
    """``STACK.up_proj.weight [E, F, D] -> EXPERTS.{e}.up_proj.weight [F, D]``."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        before, found, after = name.partition(stack)
        if not found:
            split[name] = tensor
            continue
        projection, parameter = after.split(".")
        projection = names.get(projection, projection)
        for expert in range(tensor.shape[0]):
            new = f"{before}{experts}{expert}.{projection}.{parameter}"
            split[new] = mx.contiguous(tensor[expert])
    return split


def fused(
    tensors: Tensors,
    stack: str = ".mlp.switch_mlp.",
    gate_up: str = ".mlp.experts.gate_up_proj",
    down: str = ".mlp.experts.down_proj",
    is_transposed: bool = False,
) -> Tensors:
    """Gate and up in one ``[E, 2F, D]``; transposed: ``[E, D, 2F]`` and down alike."""
    joined = dict(tensors)
    for before in _prefixes(tensors, f"{stack}gate_proj.weight"):
        parts = [
            joined.pop(f"{before}{stack}{projection}.weight")
            for projection in ("gate_proj", "up_proj", "down_proj")
        ]
        both = mx.concatenate(parts[:2], axis=1)
        if is_transposed:
            both, parts[2] = both.swapaxes(1, 2), parts[2].swapaxes(1, 2)
        joined[before + gate_up] = mx.contiguous(both)
        joined[before + down] = mx.contiguous(parts[2])
    return joined


def interleaved(tensors: Tensors) -> Tensors:
    """gpt_oss: rows of gate and up take turns, and so do their biases."""
    joined = dict(tensors)
    stack = ".mlp.experts."
    for before in _prefixes(tensors, f"{stack}gate_proj.weight"):
        for parameter, suffix in (("weight", ".weight"), ("bias", "_bias")):
            gate, up, down = (
                joined.pop(f"{before}{stack}{projection}.{parameter}")
                for projection in ("gate_proj", "up_proj", "down_proj")
            )
            both = mx.stack([gate, up], axis=2).flatten(1, 2)
            joined[f"{before}{stack}gate_up_proj{suffix}"] = both
            joined[f"{before}{stack}down_proj{suffix}"] = down
    return joined


def block_sparse(tensors: Tensors) -> Tensors:
    """kimi: experts as w1, w2, w3 and the router, all under ``block_sparse_moe``."""
    layers = "|".join(map(re.escape, _prefixes(tensors, ".mlp.switch_mlp.up_proj.")))
    moved: Tensors = {}
    split = per_expert(tensors, experts=".block_sparse_moe.experts.", names=W123)
    for name, tensor in split.items():
        name = re.sub(
            rf"^({layers})\.mlp\.(?!experts\.)", r"\1.block_sparse_moe.", name
        )
        bias = ".block_sparse_moe.e_score_correction_bias"
        moved[name.replace(bias, bias.replace("moe.", "moe.gate."))] = tensor
    return moved


def less_one(tensors: Tensors) -> Tensors:
    """qwen3_next: per expert, and the norms as offsets from one."""
    norms = (
        ".input_layernorm.weight",
        ".post_attention_layernorm.weight",
        "model.norm.weight",
        ".q_norm.weight",
        ".k_norm.weight",
    )
    return {
        name: tensor - 1 if name.endswith(norms) else tensor
        for name, tensor in per_expert(tensors).items()
    }


def step(tensors: Tensors) -> Tensors:
    """step3p5: stacks under ``moe``, and the norms as offsets from one."""
    moved: Tensors = {}
    for name, tensor in tensors.items():
        new = name.replace(".mlp.switch_mlp.", ".moe.")
        new = new.replace(".mlp.gate.gate.", ".moe.gate.")
        new = new.replace(".mlp.gate.router_bias", ".moe.router_bias")
        new = new.replace(".mlp.share_expert.", ".share_expert.")
        moved[new] = tensor - 1 if "norm" in name else tensor
    return moved


def laguna(tensors: Tensors) -> Tensors:
    """Per expert; a bias of the router, also ``[E]``, has a name among the experts."""
    moved: Tensors = {}
    for name, tensor in per_expert(tensors).items():
        name = name.replace(".mlp.gate.proj.", ".mlp.gate.")
        bias = ".e_score_correction_bias"
        moved[name.replace(f".gate{bias}", f".experts{bias}")] = tensor
    return moved


def dbrx(tensors: Tensors) -> Tensors:
    """``ffn.experts.{e}.w1.weight [F, D] -> ffn.experts.mlp.w1 [E * F, D]``.

    So is w2, which is turned.
    """
    joined: Tensors = {}
    parts: dict[str, list[mx.array]] = {}
    for name, tensor in tensors.items():
        if found := re.match(r"(.*\.experts)\.\d+\.(w1|v1|w2)\.weight", name):
            turned = tensor.T if found[2] == "w2" else tensor
            parts.setdefault(f"{found[1]}.mlp.{found[2]}", []).append(turned)
        else:
            joined[name] = tensor
    return joined | {name: mx.concatenate(all_of) for name, all_of in parts.items()}


def deepseek_v41(tensors: Tensors) -> Tensors:
    """Names of its own for everything; one projection without its groups' axis."""
    moved: Tensors = {}
    for name, tensor in per_expert(
        tensors, ".mlp.experts.switch_mlp.", ".mlp.experts.", W123
    ).items():
        name = {"lm_head.weight": "head.weight"}.get(name, name.removeprefix("model."))
        for ours, theirs in _DEEPSEEK_V41:
            name = name.replace(ours, theirs)
        moved[name] = tensor.flatten(0, 1) if name.endswith("wo_a.weight") else tensor
    return moved


_DEEPSEEK_V41 = (
    ("shared_experts.gate_proj.", "shared_experts.w1."),
    ("shared_experts.down_proj.", "shared_experts.w2."),
    ("shared_experts.up_proj.", "shared_experts.w3."),
    (".gate.e_score_correction_bias", ".gate.bias"),
    (".indexer.k_proj.", ".indexer.wk."),
    (".compressor.kv_norm.", ".compressor.norm."),
    (".q_a_norm.", ".q_norm."),
    (".o_a_proj.", ".wo_a."),
    (".o_b_proj.", ".wo_b."),
    (".gate_proj.", ".wgate."),
    (".kv_proj.", ".wkv."),
    (".q_a_proj.", ".wq_a."),
    (".q_b_proj.", ".wq_b."),
    (".sinks", ".attn_sink"),
    (".attn_hc.", ".hc_attn_"),
    (".ffn_hc.", ".hc_ffn_"),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".input_layernorm.", ".attn_norm."),
    (".self_attn.", ".attn."),
    (".mlp.", ".ffn."),
    ("embed_tokens.", "embed."),
)


def _prefixes(tensors: Tensors, part: str) -> list[str]:
    """What stands before `part` in the names that contain it."""
    return [name.partition(part)[0] for name in tensors if part in name]


_SAME_CONTAINER = partial(per_expert, stack=".mlp.experts.")
_MIXTRAL = partial(
    per_expert,
    stack=".block_sparse_moe.switch_mlp.",
    experts=".block_sparse_moe.experts.",
    names=W123,
)
_GRANITE = partial(
    fused,
    stack=".block_sparse_moe.switch_mlp.",
    gate_up=".block_sparse_moe.input_linear.weight",
    down=".block_sparse_moe.output_linear.weight",
)
_FEED_FORWARD = partial(
    per_expert, stack=".feed_forward.switch_mlp.", experts=".feed_forward.experts."
)
_NEMOTRON = partial(
    per_expert,
    stack=".mixer.switch_mlp.",
    experts=".mixer.experts.",
    names={"fc1": "up_proj", "fc2": "down_proj"},
)

HUB_LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            "qwen2_moe", "qwen3_moe", "olmoe", "mellum", "deepseek", "deepseek_v2",
            "deepseek_v3", "kimi_k2", "joyai_llm_flash", "deepseek_v32", "glm_moe_dsa",
            "glm4_moe", "glm4_moe_lite", "solar_open", "kimi_vl", "kimi_k25",
            "exaone_moe", "ernie4_5_moe", "hunyuan", "longcat_flash",
            "longcat_flash_ngram", "mimo_v2_flash", "bailing_moe",
            "bailing_moe_linear", "bailing_hybrid", "bailing_moe_v3",
        ),
        per_expert,
    ),
    **dict.fromkeys(("Klear", "afmoe", "dots1"), _SAME_CONTAINER),
    **dict.fromkeys(
        ("mixtral", "phimoe", "minimax", "minimax_m2", "minimax_m3_vl"), _MIXTRAL
    ),
    **dict.fromkeys(("kimi_linear", "kimi_k3"), block_sparse),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), _GRANITE),
    **dict.fromkeys(("qwen3_5_moe", "mistral4", "mistral3"), fused),
    "qwen3_next": less_one,
    "lfm2_moe": partial(_FEED_FORWARD, names=W123),
    "jamba": _FEED_FORWARD,
    "phixtral": partial(per_expert, stack=".moe.switch_mlp.", experts=".moe.mlp."),
    **dict.fromkeys(("nemotron_h", "nemotron_h_latent"), _NEMOTRON),
    "gemma4_text": partial(
        fused,
        stack=".experts.switch_glu.",
        gate_up=".experts.gate_up_proj",
        down=".experts.down_proj",
    ),
    "llama4": partial(
        fused,
        stack=".feed_forward.experts.",
        gate_up=".feed_forward.experts.gate_up_proj",
        down=".feed_forward.experts.down_proj",
        is_transposed=True,
    ),
    "qwen3_vl_moe": partial(fused, is_transposed=True),
    "gpt_oss": interleaved,
    "step3p5": step,
    "deepseek_v41": deepseek_v41,
    "dbrx": dbrx,
    "laguna": laguna,
}  # fmt: skip


def layout_name(name: str) -> str:
    """What an architecture's layout on the hub is, in words."""
    layout = HUB_LAYOUTS[name]
    function = layout.func if isinstance(layout, partial) else layout
    transposed = isinstance(layout, partial) and "is_transposed" in layout.keywords
    return {
        per_expert: "per expert",
        fused: "fused, transposed" if transposed else "fused",
        interleaved: "fused, interleaved",
        block_sparse: "per expert",
        less_one: "per expert",
        step: "stacked, other names",
        deepseek_v41: "per expert",
        dbrx: "fused, without an axis",
        laguna: "per expert",
    }[function]
