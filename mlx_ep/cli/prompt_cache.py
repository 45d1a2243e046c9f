"""Prompt caches in files, as ``mlx_lm.cache_prompt`` writes them.

With attention replicated every rank holds the same KV cache, and one file serves all;
each rank reads it from its own disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache

from mlx_ep.comm import Comm, agreed
from mlx_ep.comm.symmetry import check_alike
from mlx_ep.loading import EMBEDDED_MODEL, find_model
from mlx_ep.loading.identity import state_digest


@dataclass(frozen=True)
class PromptCache:
    """A KV cache from a file, and what the file says of it.

    Attributes:
        layers: the cache, one object per layer (of the draft model too, if it was made
            with one).
        model: the name of the model that made it.
        tokenizer_config: the arguments of its tokenizer.
    """

    layers: list[Any]
    model: str
    tokenizer_config: dict[str, Any]

    def check_length(self, num_layers: int) -> None:
        """Raises:
        ValueError: the cache is not one of `num_layers` layers.
        """
        if len(self.layers) != num_layers:
            raise ValueError(
                "--prompt-cache-file must hold a KV cache for each layer of --model "
                f"(and of --draft-model), {num_layers}; it holds {len(self.layers)}. "
                "Make it again."
            )


def read_prompt_cache(
    file: Path, model: str | None, kv_bits: int | None, kv_group_size: int, comm: Comm
) -> PromptCache:
    """Read a prompt cache and check that it is for this run, as mlx_lm.generate does.

    Args:
        model: what --model says; None takes the file's.

    Raises:
        ValueError: on every rank: a rank cannot read it, or it is another model's or
            quantized in another way.
    """

    def read() -> PromptCache:
        found = _read(file)
        _check(found, model, kv_bits, kv_group_size)
        return found

    cache = agreed(comm, read)
    check_alike(
        comm,
        cache_facts(cache),
        "--prompt-cache-file must hold the same on all ranks; copy one rank's file to "
        "all, as these differ:",
    )
    return cache


def cache_facts(cache: PromptCache) -> dict[str, str]:
    """What of a cache must be alike on all ranks, by layer."""
    facts = {
        f"layer {number}": state_digest(layer.state)
        for number, layer in enumerate(cache.layers)
    }
    return facts | {"tokenizer arguments": str(cache.tokenizer_config)}


def _read(file: Path) -> PromptCache:
    if not file.is_file():  # mx.load would say so only when it is evaluated
        raise ValueError(f"--prompt-cache-file must be a file; there is no {file}.")
    try:
        layers, metadata = load_prompt_cache(str(file), return_metadata=True)
        return PromptCache(
            layers, metadata["model"], json.loads(metadata["tokenizer_config"])
        )
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"--prompt-cache-file {file} is not one that cache_prompt made: "
            f"{' '.join(str(error).split())}"
        ) from error


def _check(
    cache: PromptCache, model: str | None, kv_bits: int | None, kv_group_size: int
) -> None:
    if model is not None and _place(model) != _place(cache.model):
        raise ValueError(
            f"--prompt-cache-file was made with --model {cache.model}; got --model "
            f"{model}. Leave --model out, or make the cache again."
        )
    first = cache.layers[0]
    if not isinstance(first, QuantizedKVCache):
        return
    if kv_bits not in (None, first.bits) or kv_group_size != first.group_size:
        raise ValueError(
            f"--prompt-cache-file is quantized with --kv-bits {first.bits} "
            f"--kv-group-size {first.group_size}; got --kv-bits {kv_bits} "
            f"--kv-group-size {kv_group_size}."
        )


def _place(model: str) -> str:
    """A folder by its full path, an overlay by its model: ways to name it are one."""
    is_here = model == EMBEDDED_MODEL or Path(model).expanduser().is_dir()
    return str(find_model(model).resolve()) if is_here else model
