"""The form in which rows travel between ranks."""

from __future__ import annotations

from typing import NamedTuple, get_args

import mlx.core as mx
from jaxtyping import Float, Shaped

from mlx_ep.kernels import RowFormat, format_words
from mlx_ep.rows.movement import Movement
from mlx_ep.rows.mover import OPS, Mover
from mlx_ep.types import DispatchDtype

_WORD_BYTES = 4


def row_format(name: DispatchDtype) -> RowFormat | None:
    """The form of 8 bits a value that a name means; None: values stay numbers."""
    for form in get_args(RowFormat):
        if name == form:
            found: RowFormat = form
            return found
    return None


def row_bytes(name: DispatchDtype, width: int, itemsize: int) -> int:
    """Bytes of a row of D values that travels, scales included.

    >>> [row_bytes(name, 2048, 4) for name in ("model", "bf16", "int8", "mxfp8")]
    [8192, 4096, 2112, 2112]
    """
    if row_format(name) is not None:
        return _WORD_BYTES * format_words(width)
    return width * (2 if name == "bf16" else itemsize)


class RowForm(NamedTuple):
    """How the rows of one exchange travel. Each is made ready once, where it is from.

    Attributes:
        name: of the form.
        movement: what makes rows ready where that takes 8 bits a value, and undoes it.
    """

    name: DispatchDtype
    movement: Movement

    @classmethod
    def of(cls, name: DispatchDtype, mover: Mover, num_tokens: int) -> RowForm:
        """The form of this name, made by what the mover chooses.

        Args:
            num_tokens: of a call, a number that all ranks know.
        """
        is_packed = row_format(name) is not None
        return cls(name, mover("format", num_tokens) if is_packed else OPS)

    def leave(self, x: Float[mx.array, "T D"]) -> Shaped[mx.array, "T W"]:
        """The tokens as they travel. Zeros behind them are rows of zeros."""
        if self.name == "bf16":
            return x.astype(mx.bfloat16)
        form = row_format(self.name)
        return x if form is None else self.movement.to_format(x, form)

    def arrive(
        self, rows: Shaped[mx.array, "M W"], width: int, dtype: mx.Dtype
    ) -> Float[mx.array, "M D"]:
        """What `leave` made ready on the ranks that sent it, in the tokens' dtype."""
        form = row_format(self.name)
        if form is None:
            return rows.astype(dtype)
        return self.movement.from_format(rows, form, width, dtype)
