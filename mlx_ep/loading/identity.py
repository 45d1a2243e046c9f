"""What a model is on this rank, in facts that all ranks must share."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ep.comm.symmetry import digest
from mlx_ep.types import to_host

# Files that decide what a model computes or how text becomes tokens.
_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "model.safetensors.index.json",
)  # fmt: skip
_MOST_HEADER = 128 << 20  # bytes of a safetensors header that is read


def model_facts(path: Path, tokenizer: Any, with_weights: bool) -> dict[str, str]:
    """The identity of a model folder: of its small files, headers, stop tokens.

    Paths and dates may differ between hosts; contents may not.

    Args:
        path: the folder.
        tokenizer: as loaded, with what the flags changed.
        with_weights: whether its checkpoint is read.
    """
    facts = {"mlx_lm": version("mlx-lm"), "mlx_ep": version("mlx-ep")}
    for name in _FILES:
        file = path / name
        if file.is_file():
            facts[name] = digest(_content(file))
    if with_weights:
        for file in sorted(path.glob("*.safetensors")):
            facts[f"header of {file.name}"] = digest(_header(file))
    facts["stop tokens"] = " ".join(map(str, sorted(tokenizer.eos_token_ids)))
    facts["chat template"] = digest(str(getattr(tokenizer, "chat_template", None)))
    return facts


def dense_facts(model: nn.Module, expert_switches: list[nn.Module]) -> dict[str, str]:
    """A checksum of each layer's weights that every rank holds whole.

    Bits are added up as integers, on the device: one pass over the weights, which is
    little beside reading them. Experts are left out, whose weights no two ranks share.

    Args:
        model: with its weights, evaluated.
        expert_switches: the modules of the routed experts.
    """
    experts = {id(array) for switch in expert_switches for _, array in _arrays(switch)}
    names, sums = [], []
    for name, array in _arrays(model):
        if id(array) not in experts and array.size:
            names.append(name)
            sums.append(_bit_sum(array))
    if not names:
        return {}
    # sync: once, after loading.
    values = to_host(mx.stack(sums)).tolist()  # on host
    layers: dict[str, list[Any]] = {}
    for name, value in zip(names, values, strict=True):
        layers.setdefault(_layer(name), []).append([name, value])
    return {f"weights of {layer}": digest(found) for layer, found in layers.items()}


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(module.parameters())
    return list(found)


def _bit_sum(array: mx.array) -> mx.array:
    kinds = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    if array.dtype == mx.bool_:
        return array.astype(mx.uint64).sum()
    return array.view(kinds[array.dtype.size]).sum().astype(mx.uint64)


def _layer(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``model.layers.3``."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _content(file: Path) -> Any:
    """A JSON file's content, however it is written; another file's bytes."""
    data = file.read_bytes()
    if file.suffix == ".json":
        try:
            return json.loads(data)
        except ValueError:
            return data
    return data


def _header(file: Path) -> bytes:
    with file.open("rb") as opened:
        start = opened.read(8)
        size = min(int.from_bytes(start, "little"), _MOST_HEADER)
        return start + opened.read(size)
