"""Shape legend and the records that flow between the stages of a layer.

One alphabet everywhere (docs, annotations, comments):

    T  tokens on this rank          E  experts (logical)
    D  model width                  K  experts per token
    F  expert width                 P  ranks
    S  slots in the group           L  slots on this rank
    M  rows received                N  (row, slot) pairs this rank computes

A *token* is a vector before packing, a *row* after it. An *expert* is logical, a
*slot* is a physical copy of one on a rank. A *gate* is the routing weight of one
(token, expert) pair; "weight" always means a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Float32, Int32, Shaped

# Logits' logarithms of probabilities in, a token out.
Sampler = Callable[[mx.array], mx.array]

# Of the layer that gives the logits, where the dense part is split.
LMHead = Literal["auto", "whole", "split"]
# What rows travel to the experts of other ranks in; model: in their own dtype.
DispatchDtype = Literal["model", "bf16", "int8", "mxfp8"]


class Routing(NamedTuple):
    """What a router decided for T tokens.

    Attributes:
        expert_ids: the experts of each token; -1 is "no expert".
        gates: the weight of each expert's output in the token's sum.
    """

    expert_ids: Int32[mx.array, "T K"]
    gates: Float32[mx.array, "T K"]


class CompleteRouting(Routing):
    """A routing of which it is known, without reading it, that no id is -1.

    Its ids may be uint32, as MLX's own operations make and take them, and have more
    leading axes than one, as tokens have them in a model: ``[..., K]``.
    """

    __slots__ = ()


class Rows(NamedTuple):
    """What one rank has to compute: rows, and which of its slots each row visits.

    Attributes:
        x: the rows, in the model's dtype.
        slot_ids: this rank's slots that the row visits; -1 where the expert lives
            on another rank (or there is none).
        gates: as in `Routing`.
    """

    x: Float[mx.array, "M D"]
    slot_ids: Int32[mx.array, "M K"]
    gates: Float32[mx.array, "M K"]


class CompleteRows(Rows):
    """Rows of which it is known that no slot id is -1: every pair is this rank's.

    Slot ids may be uint32. There may be more leading axes than one, as in
    `CompleteRouting`.
    """

    __slots__ = ()


class TokenCounts(NamedTuple):
    """How many tokens each rank holds, agreed by all ranks.

    Agree once per step (`mlx_ep.exchange.agree_tokens`) and use it for every layer of
    that step: the number of tokens does not change between layers, and asking again
    costs a collective and a host sync each time.

    Attributes:
        per_rank: T of rank 0, rank 1, ...
    """

    per_rank: tuple[int, ...]

    @property
    def largest(self) -> int:
        """The T of the rank that holds the most."""
        return max(self.per_rank)

    def num_rounds(self, round_tokens: int | None) -> int:
        """Rounds of `round_tokens` tokens a rank; at least 1, also for no tokens."""
        if round_tokens is None:
            return 1
        return max(1, -(-self.largest // round_tokens))

    def of_round(self, index: int, round_tokens: int | None) -> TokenCounts:
        """The tokens that each rank has in one round: 5 and 2 in rounds of 3 give
        (3, 2), then (2, 0).
        """
        if round_tokens is None:
            return self
        done = index * round_tokens
        return TokenCounts(
            tuple(min(max(t - done, 0), round_tokens) for t in self.per_rank)
        )


def to_host(x: Shaped[mx.array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """A copy of `x` in NumPy, of which every value has been computed.

    `np.array` alone waits too, but hides an error: when a rank has left the ring, it
    gives what happens to be in the buffer, where `mx.eval` raises.
    """
    return np.array(view_on_host(x))  # sync: what for is said where it is called.


def view_on_host(x: Shaped[mx.array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """As `to_host`, without a copy: it must not be written to."""
    # sync: what for is said where it is called.
    mx.eval(x)
    return np.asarray(x)


def lists_of_rows(x: Shaped[mx.array, "... K"]) -> list[list[Any]]:
    """The numbers of evaluated `x` as lists of K: all its leading axes as one."""
    rows: list[Any] = x.tolist()  # type: ignore[assignment]  # sync: said by callers.
    for _ in range(x.ndim - 2):
        rows = [row for part in rows for row in part]
    return rows


_PACKED = re.compile(r"(\w+) (\d+) bit/(\d+) (\w+)")
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Packing:
    """How the numbers of a matrix are held.

    Attributes:
        mode: MLX's name of it, ``affine``, ``mxfp4``, ...; ``dense``: not packed.
        bits: of one number.
        group_size: numbers with the same scale; 0 where there are no scales.
        dtype: of scales and offsets, where there are none of the numbers themselves.
    """

    mode: str
    bits: int
    group_size: int
    dtype: str

    @classmethod
    def plain(cls, dtype: str) -> Packing:
        """Numbers as they are."""
        return cls("dense", 8 * _ITEMSIZE[dtype], 0, dtype)

    @classmethod
    def affine(
        cls, bits: int, group_size: int = 64, dtype: str = "bfloat16"
    ) -> Packing:
        """MLX's affine packing: a scale and an offset per group.

        >>> Packing.affine(4).bytes_per_weight
        0.5625
        """
        return cls("affine", bits, group_size, dtype)

    @classmethod
    def of(cls, module: nn.Module, dtype: str | None = None) -> Packing:
        """That of a linear or switch layer, quantized or not.

        Args:
            dtype: of its floating-point numbers, where those that it has do not count;
                None: what it has.
        """
        scales = module.get("scales")
        numbers = module["weight"] if scales is None else scales
        own = dtype_name(numbers.dtype)
        if dtype is not None and mx.issubdtype(numbers.dtype, mx.floating):
            own = dtype
        if scales is None:
            return cls.plain(own)
        return cls(module.mode, module.bits, module.group_size, own)

    @classmethod
    def parse(cls, text: object) -> Packing:
        """What `str` gave, as it stands in files.

        Raises:
            ValueError: it is no such text.
        """
        if isinstance(text, str):
            if text in _ITEMSIZE:
                return cls.plain(text)
            if found := _PACKED.fullmatch(text):
                mode, bits, group_size, dtype = found.groups()
                return cls(mode, int(bits), int(group_size), dtype)
        raise ValueError(
            "A packing must be like 'affine 4 bit/64 bfloat16', or one of "
            f"{', '.join(_ITEMSIZE)}; got {text!r}."
        )

    @property
    def is_packed(self) -> bool:
        return self.mode != "dense"

    @property
    def scale_bytes(self) -> int:
        """What a group has beside its numbers: a scale, in mode affine an offset."""
        return 2 * _ITEMSIZE[self.dtype] if self.mode == "affine" else 1

    @property
    def bytes_per_weight(self) -> float:
        scales = self.scale_bytes / self.group_size if self.group_size else 0.0
        return self.bits / 8 + scales

    def num_bytes(self, weights: int) -> int:
        """Of so many numbers."""
        return round(weights * self.bytes_per_weight)

    @property
    def alike(self) -> list[Packing]:
        """This one, then those with other dtypes of the scales: the same kernels."""
        if self.mode != "affine":
            return [self]
        others = [dtype for dtype in _ITEMSIZE if dtype != self.dtype]
        return [self, *(replace(self, dtype=dtype) for dtype in others)]

    def __str__(self) -> str:
        if not self.is_packed:
            return self.dtype
        return f"{self.mode} {self.bits} bit/{self.group_size} {self.dtype}"


MXFP4 = Packing("mxfp4", 4, 32, "uint8")
MXFP8 = Packing("mxfp8", 8, 32, "uint8")


def dtype_name(dtype: mx.Dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("mlx.core.")


def is_of_kind(kind: Any, value: object) -> bool:
    """Whether a value is one that an annotation allows.

    Args:
        kind: a Literal, a union, ``tuple[X, ...]``, or a class. A whole number is a
            float too; True is no number.
    """
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return value in options
    if get_origin(kind) in (Union, UnionType):
        return any(is_of_kind(option, value) for option in options)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        return all(is_of_kind(options[0], item) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
}


def kind_text(kind: Any) -> str:
    """What `is_of_kind` allows, in words: ``one of a, b`` or ``a number or None``."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, options))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(kind_text, options))
    if get_origin(kind) is tuple:
        return f"a tuple, each {kind_text(options[0])},"
    return "None" if kind is type(None) else _KINDS[kind]


def check_value(name: str, kind: Any, value: object, least: int | None = None) -> None:
    """Raises:
    ValueError: a setting's value is not of its kind, or less than its least.
    """
    if not is_of_kind(kind, value):
        raise ValueError(f"{name} must be {kind_text(kind)}; got {value!r}.")
    if least is not None and isinstance(value, int) and value < least:
        raise ValueError(f"{name} must be {least} or more; got {value}.")
