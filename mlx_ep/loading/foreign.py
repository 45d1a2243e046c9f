"""Values of other people's files in other people's code: what comes of it is told.

mlx-lm and transformers run on what config.json and tokenizers say, and raise whatever a
wrong value makes them raise. Here it becomes a ValueError of one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ep.comm import shortened
from mlx_ep.loading.headers import TensorInfo, quoted
from mlx_ep.models.sites import EXPERT_COUNTS
from mlx_ep.types import view_on_host

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
# More than any model has; a module is made for each layer, a number for each expert.
_MOST_LAYERS = 2000
_MOST_EXPERTS = 100_000
_MOST_MESSAGE = 600


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """What mlx-lm or transformers raises in the body becomes a ValueError.

    Args:
        what: cannot be done, and with which file; the message begins so.
    """
    try:
        yield
    except Exception as error:  # theirs: it depends on the file alone which one it is
        said = " ".join(str(error).split()) or "no reason given"
        if isinstance(error, ValueError) and said.startswith(what):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{shortened(said, _MOST_MESSAGE)}") from error


def check_counts(config: dict[str, Any], tensors: Iterable[str] = ()) -> None:
    """Layers and experts of a config.json, before a module is made for each.

    Args:
        tensors: names of a checkpoint's; none: there is none to compare with.

    Raises:
        ValueError: they are no numbers, more than a model can have, or more layers
            than the checkpoint has.
    """
    found = [int(m[1]) for name in tensors if (m := _LAYER.search(name))]
    most_layers = min(max(found) + 1, _MOST_LAYERS) if found else _MOST_LAYERS
    where = "the weight files hold" if found else "a model can have"
    text = config.get("text_config", config)
    for record in (config, text if isinstance(text, dict) else {}):
        for keys, most in (
            (_LAYER_COUNTS, most_layers),
            (EXPERT_COUNTS, _MOST_EXPERTS),
        ):
            for key in keys:
                value = record.get(key)
                if value is None:
                    continue
                if type(value) is not int or value < 0:
                    raise ValueError(
                        f"config.json must give a whole number as {key}; got "
                        f"{shortened(repr(value), 100)}."
                    )
                if value > most:
                    what = where if keys is _LAYER_COUNTS else "a model can have"
                    raise ValueError(
                        f"config.json says that {key} is {shortened(str(value), 50)}; "
                        f"{what} {most} at most."
                    )


def check_dtypes(model: nn.Module, tensors: dict[str, TensorInfo]) -> None:
    """Weights that are multiplied must be numbers, packed where the layer unpacks them.

    Args:
        model: an outline; nothing of it is evaluated.
        tensors: of the checkpoint, to name the file.

    Raises:
        ValueError: a layer has whole numbers where it needs fractions.
    """
    for path, module in model.named_modules():
        packed = "scales" in module
        for name in ("weight", "bias", "biases"):
            array = module.get(name)
            if not isinstance(array, mx.array) or (packed and name == "weight"):
                continue
            if not mx.issubdtype(array.dtype, mx.floating):
                full = f"{path}.{name}"
                raise ValueError(
                    f"{file_of(full, tensors)}: tensor {quoted(full)} must hold "
                    f"floating-point numbers; it holds {array.dtype}, and nothing says "
                    "how they are packed."
                )


def check_numbers(name: str, array: mx.array) -> None:
    """Raises:
    ValueError: NaN is among a parameter's numbers.
    """
    if not array.size or not mx.issubdtype(array.dtype, mx.floating):
        return
    # The largest of numbers with NaN among them is NaN: one pass, nothing is written.
    if array.dtype == mx.float32 and not mx.metal.is_available():
        with np.errstate(invalid="ignore"):
            # sync: loading. NumPy's reduction is several times as fast on a CPU.
            has_nan = bool(np.isnan(np.max(view_on_host(array))))
    else:
        has_nan = bool(mx.isnan(mx.max(array)).item())  # sync: loading
    if has_nan:
        raise ValueError(
            f"Tensor {quoted(name)} of the checkpoint holds NaN. Download the model "
            "again, or convert it again."
        )


def file_of(name: str, tensors: dict[str, TensorInfo]) -> str:
    """The file that has a tensor, or the first that has one of the same layer."""
    if name in tensors:
        return str(tensors[name].file)
    layer = _LAYER.search(name)
    near = (t for t in tensors.values() if layer and layer[0] in f".{t.name}")
    info = next(near, next(iter(tensors.values()), None))
    return "the checkpoint" if info is None else str(info.file)
