"""Every way in which checkpoints on the hub are quantized, on a few architectures.

The widths are multiples of 128, the largest group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model, quantize_model, save_model

from tests.support import tiny
from tests.support.architectures import ARCHITECTURES, Saved, logits, make_model

Setting = dict[str, Any]
Predicate = Callable[[str, nn.Module], bool | Setting]

_WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_moe": ARCHITECTURES["qwen3_moe"] | _WIDE | {"moe_intermediate_size": 128},
    "gpt_oss": ARCHITECTURES["gpt_oss"] | _WIDE,  # with biases
    "dbrx": ARCHITECTURES["dbrx"]  # a list of experts
    | {
        "d_model": 128,
        "ffn_config": ARCHITECTURES["dbrx"]["ffn_config"] | {"ffn_hidden_size": 128},
    },
}


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized.

    Attributes:
        setting: group_size, bits, mode; None: not at all.
        dtype: of what is not packed.
        predicate: of `quantize_model`, for settings per layer.
    """

    setting: Setting | None
    dtype: mx.Dtype = mx.float32
    predicate: Predicate | None = None


def _setting(bits: int, group_size: int, mode: str = "affine") -> Setting:
    return {"group_size": group_size, "bits": bits, "mode": mode}


def _mixed(path: str, module: nn.Module) -> bool | Setting:
    """Another setting for each projection of the experts, and none for a layer."""
    if not hasattr(module, "to_quantized") or re.search(r"(layers|blocks)\.1\.", path):
        return False
    if path.endswith(("down_proj", "w2")):
        return _setting(8, 32)
    if path.endswith(("up_proj", "v1")):
        return _setting(4, 32, "mxfp4")
    return True


QUANTIZATIONS: dict[str, Quantization] = {
    **{
        f"affine {bits}-bit, groups of {group_size}": Quantization(
            _setting(bits, group_size)
        )
        for bits in (2, 3, 4, 5, 6, 8)
        for group_size in (32, 64, 128)
    },
    "mxfp4": Quantization(_setting(4, 32, "mxfp4")),
    "mxfp8": Quantization(_setting(8, 32, "mxfp8")),
    "nvfp4": Quantization(_setting(4, 16, "nvfp4")),
    "mixed": Quantization(_setting(4, 64), predicate=_mixed),
    "affine 4-bit, bfloat16": Quantization(_setting(4, 64), mx.bfloat16),
    "mxfp4, bfloat16": Quantization(_setting(4, 32, "mxfp4"), mx.bfloat16),
    "nvfp4, bfloat16": Quantization(_setting(4, 16, "nvfp4"), mx.bfloat16),
    "affine 4-bit, float16": Quantization(_setting(4, 64), mx.float16),
    "bfloat16": Quantization(None, mx.bfloat16),
    "float16": Quantization(None, mx.float16),
}


def save(folder: Path, name: str, form: str) -> Saved:
    """A checkpoint of an architecture of `WIDE`, with mlx-lm's logits."""
    way = QUANTIZATIONS[form]
    saved = Saved(name, form, folder / f"{name}-{form}".replace(" ", "-"))
    saved.folder.mkdir(parents=True)
    config = {**deepcopy(WIDE[name]), "eos_token_id": 1}
    model = make_model(config)
    model.set_dtype(way.dtype)
    if way.setting is not None:
        model, config = quantize_model(
            model, config, **way.setting, quant_predicate=way.predicate
        )
    save_model(saved.folder, model)
    (saved.folder / "config.json").write_text(json.dumps(config))
    tiny.make_tokenizer().save_pretrained(saved.folder)
    with _experts_in_float32():
        model, _ = load_model(saved.folder)
        np.save(saved.folder / "expected.npy", logits(model))
        if way.dtype != mx.float32:
            model.set_dtype(mx.float32)
            np.save(saved.folder / "float32.npy", logits(model))
    return saved


@contextmanager
def _experts_in_float32() -> Iterator[None]:
    """MLX's CPU backend gathers matrices in float32 only: mlx-lm could not run."""
    own = SwitchLinear.__call__

    def call(
        self: SwitchLinear, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        weight = self["weight"].astype(mx.float32).swapaxes(-1, -2)
        y = mx.gather_mm(
            x.astype(mx.float32),
            weight,
            rhs_indices=indices,
            sorted_indices=sorted_indices,
        ).astype(x.dtype)
        if "bias" in self:
            y = y + mx.expand_dims(self["bias"][indices], -2)
        return y

    SwitchLinear.__call__ = call
    try:
        yield
    finally:
        SwitchLinear.__call__ = own
