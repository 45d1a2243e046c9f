"""The shape of a model for the cost model, from its config.json: nothing is read.

mlx-lm's own model is built and called without being evaluated: its arrays have shapes
and sizes, which is all that is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.cost.shape import LayerShape, MatrixTotal, ModelShape
from mlx_ep.loading.caches import CacheShapes
from mlx_ep.loading.dummy import build_dummy
from mlx_ep.loading.local import count_experts, refuse_dense
from mlx_ep.loading.sizes import DTYPES
from mlx_ep.loading.working import switch_input
from mlx_ep.models import MoESite, find_moe_sites, shard_problem
from mlx_ep.placement import Placement
from mlx_ep.types import Packing

_ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv|ssm")
_LAYER = re.compile(r"(^|\.)(layers|blocks|h)\.\d+\.")
# Ranks that `shard()` is tried with: what it splits in two it splits in four.
_TRIED_RANKS = 2


def model_shape(
    config: dict[str, Any], *, dtype: str = "bfloat16", name: str = ""
) -> ModelShape:
    """What the cost model needs to know of a model.

    Args:
        config: of config.json, with `quantization` where the model is quantized.
        dtype: of what is not packed, of scales and of tokens.
        name: for a person.

    Raises:
        ValueError: mlx-lm has no such model, or it has no routed experts.
    """
    itemsize = DTYPES[dtype].size
    num_experts = count_experts(config)
    refuse_dense(num_experts, "what was asked for")
    model = build_dummy(config, Placement.contiguous(num_experts, 1), 0)
    sites = find_moe_sites(model)
    text = config.get("text_config", config)
    full = _by_part(model, sites, itemsize)
    layers = len(model.layers)
    caches = CacheShapes(model, itemsize, text.get("index_topk", 0))
    macs, top_k = _macs(text), switch_input(model).top_k
    switch = sites[0].projections[-1]
    _, expert_width, width = _matrix(sites[0].projections[0])
    top_k = switch_input(model).top_k  # before shard(), which changes the model
    has_shard = not shard_problem(model, _TRIED_RANKS)
    split = _by_part(model, sites, itemsize) if has_shard else {}

    def part(key: str) -> MatrixTotal:
        found = full.get(key, MatrixTotal())
        less = found.weights - split.get(key, found).weights
        splits = round(less / (1 - 1 / _TRIED_RANKS))
        return MatrixTotal(found.weights, found.num_bytes, splits)

    def each(key: str) -> MatrixTotal:
        found, count = part(key), len(sites)
        return MatrixTotal(
            found.weights // count,
            found.num_bytes // count,
            found.split_weights // count,
        )

    experts = full["experts"]
    layer = LayerShape(
        name=name,
        num_experts=num_experts,
        width=width,
        expert_width=expert_width,
        top_k=top_k,
        expert_bytes=experts.num_bytes // (len(sites) * num_experts),
        packing=Packing.of(switch, dtype),
        itemsize=itemsize,
        num_matrices=len(sites[0].projections),
        shared=each("shared"),
        router=each("router"),
    )
    dense_modules = [m for path, m in _matrices(model) if _ATTENTION.search(path)]
    return ModelShape(
        name=name,
        layer=layer,
        num_layers=layers,
        num_moe_layers=len(sites),
        attention=part("attention"),
        dense=part("dense"),
        head=part("head") if "head" in full else part("embedding"),
        dense_packing=(
            Packing.of(dense_modules[-1], dtype)
            if dense_modules
            else Packing.plain(dtype)
        ),
        kv_bytes=caches.growing + caches.windowed,
        kv_is_split="kv_lora_rank" not in text,
        state_bytes=caches.fixed,
        attention_macs=caches.layers * macs + caches.layers * _indexer_macs(text),
        attention_scores=caches.layers * text.get("num_attention_heads", 0),
        window=caches.window,
        window_kv_bytes=caches.windowed,
        window_macs=caches.window_layers * macs,
        has_shard=has_shard,
    )


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        weight = module.get("weight")
        if isinstance(weight, mx.array) and weight.ndim >= 2:
            yield path, module


def _by_part(
    model: nn.Module, sites: list[MoESite], itemsize: int
) -> dict[str, MatrixTotal]:
    """Weights and bytes of experts, routers, shared experts, attention and the rest."""
    blocks = {site.path: site for site in sites}
    found: dict[str, MatrixTotal] = {}
    for path, module in _matrices(model):
        key = _part_of(path, module, blocks)
        own = MatrixTotal(_numbers(module), _bytes(module, itemsize))
        found[key] = found.get(key, MatrixTotal()) + own
    return found


def _part_of(path: str, module: nn.Module, blocks: dict[str, MoESite]) -> str:
    parents = path.split(".")
    for end in range(len(parents), 0, -1):
        site = blocks.get(".".join(parents[:end]))
        if site is None:
            continue
        inside = ".".join(parents[end:])
        if inside.startswith(f"{site.switch_name}."):
            return "experts"
        # A shared expert's gate has one row, a router one per expert.
        is_router = module.weight.shape[0] == site.num_experts
        return "router" if is_router and "shared" not in inside else "shared"
    if not _LAYER.search(path):
        return "embedding" if "embed" in path or "wte" in path else "head"
    return "attention" if _ATTENTION.search(path) else "dense"


def _matrix(module: nn.Module) -> tuple[int, int, int]:
    """Experts, rows and columns of a stacked projection."""
    experts, rows = module.weight.shape[:2]
    return experts, rows, _numbers(module) // (experts * rows)


def _numbers(module: nn.Module) -> int:
    if "scales" in module:
        return module.scales.size * module.group_size
    return module.weight.size


def _bytes(module: nn.Module, itemsize: int) -> int:
    """Of the arrays of a module, with floating-point ones in the model's dtype."""
    return sum(
        array.size * itemsize
        if mx.issubdtype(array.dtype, mx.floating)
        else array.nbytes
        for array in module.values()
        if isinstance(array, mx.array)
    )


def _macs(text: dict[str, Any]) -> int:
    """Multiply-adds of one layer for one query and one key."""
    heads = text.get("num_attention_heads", 0)
    if "kv_lora_rank" in text:  # MLA
        keys = text.get("qk_nope_head_dim", 0) + text.get("qk_rope_head_dim", 0)
        return heads * (keys + text.get("v_head_dim", 0))
    width = text.get("head_dim") or text.get("hidden_size", 0) // max(heads, 1)
    return 2 * heads * width


def _indexer_macs(text: dict[str, Any]) -> int:
    """Of DeepSeek's sparse attention, which scores all keys to choose some."""
    return int(text.get("index_n_heads", 0) * text.get("index_head_dim", 0))
