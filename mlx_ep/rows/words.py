"""Rows as words of 8 bytes: the CPU copies one number after another, of any size."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from jaxtyping import Shaped

# Where MLX copies a part into a larger array it goes number by number: four 2-byte
# numbers take as long as four words of 8 bytes.
_WORDS = {8: mx.uint64, 4: mx.uint32}


def join(parts: Sequence[Shaped[mx.array, "_ D"]]) -> Shaped[mx.array, "m D"]:
    """The rows of all parts, one part after another, as `mx.concatenate` gives them.

    Args:
        parts: of one dtype and width D.
    """
    first = parts[0]
    size = first.shape[1] * first.dtype.size
    fitting = [
        word
        for bytes_, word in _WORDS.items()
        if bytes_ > first.dtype.size and size % bytes_ == 0
    ]
    if not fitting or not size or mx.default_device() == mx.gpu:
        return mx.concatenate(list(parts))
    words = [part.view(fitting[0]) for part in parts]
    return mx.concatenate(words).view(first.dtype)


def with_zeros(x: Shaped[mx.array, "n D"], num_rows: int) -> Shaped[mx.array, "m D"]:
    """The rows with `num_rows` rows of zeros behind them."""
    return join([x, mx.zeros((num_rows, x.shape[1]), x.dtype)]) if num_rows else x
