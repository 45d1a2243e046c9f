"""What a model is on this rank, in facts that all ranks must share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_ep.comm.symmetry import digest
from mlx_ep.types import view_on_host

# Files that decide what a model computes or how text becomes tokens.
_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "tiktoken.model", "chat_template.jinja", "chat_template.json",
    "model.safetensors.index.json",
)  # fmt: skip
_MOST_HEADER = 128 << 20  # bytes of a safetensors header that is read


def model_facts(
    path: Path, tokenizer: Any, weight_files: Sequence[Path]
) -> dict[str, str]:
    """The identity of a model folder: of its small files, headers, stop tokens.

    Paths and dates may differ between hosts; contents may not.

    Args:
        path: the folder.
        tokenizer: as loaded, with what the flags changed.
        weight_files: of its checkpoint; none where that is not read. Of these the
            headers count: no rank reads other ranks' experts.
    """
    facts = {"mlx_lm": version("mlx-lm"), "mlx_ep": version("mlx-ep")}
    for name in _FILES:
        file = path / name
        if file.is_file():
            facts[name] = digest(_content(file))
    for file in sorted(weight_files):
        facts[f"header of {file.name}"] = digest(_header(file))
    # As texts: what generation_config.json names need not be numbers, and then stops
    # nothing.
    facts["stop tokens"] = " ".join(sorted(map(str, tokenizer.eos_token_ids)))
    facts["chat template"] = digest(str(getattr(tokenizer, "chat_template", None)))
    return facts


def dense_facts(model: nn.Module, expert_switches: list[nn.Module]) -> dict[str, str]:
    """A checksum of each layer's weights that every rank holds whole.

    Bits are added up as integers, in one pass over the weights. Experts are left out,
    whose weights no two ranks share.

    Args:
        model: with its weights, evaluated.
        expert_switches: the modules of the routed experts.
    """
    experts = {id(array) for switch in expert_switches for _, array in _arrays(switch)}
    names, sums = [], []
    for name, array in _arrays(model):
        if id(array) not in experts and array.size:
            names.append(name)
            sums.append(bit_sum(array))
    layers: dict[str, list[Any]] = {}
    for name, value in zip(names, sums, strict=True):
        layers.setdefault(_layer(name), []).append([name, value])
    return {f"weights of {layer}": digest(found) for layer, found in layers.items()}


def state_digest(state: Any) -> str:
    """A short name of arrays and whatever else a tree holds, such as a KV cache."""
    leaves: Any = tree_flatten(state)
    found = []
    for name, leaf in leaves:
        if isinstance(leaf, mx.array):
            total = bit_sum(leaf) if leaf.size else 0
            found.append([name, str(leaf.dtype), leaf.shape, total])
        else:
            found.append([name, str(leaf)])
    return digest(found)


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(module.parameters())
    return list(found)


def bit_sum(array: mx.array) -> int:
    """The sum of an array's bits as words of 4 bytes, modulo 2^32.

    The same on every device. On a host NumPy adds them, at the speed of the memory.
    """
    if array.dtype == mx.bool_:
        array = array.astype(mx.uint8)
    flat = array.reshape(-1)
    words = flat.view(mx.uint32 if array.nbytes % 4 == 0 else mx.uint8)
    if mx.metal.is_available():
        # sync: once, when it has been read.
        total: Any = words.astype(mx.uint32).sum().item()
        return int(total)
    # sync: once, when it has been read.
    return int(view_on_host(words).sum(dtype=np.uint32))


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
