"""The headers of safetensors files: what each tensor is and where it lies, checked.

The format: 8 bytes little-endian header length, a JSON header that gives each tensor's
dtype, shape and byte range, then the tensors. A file may come from anywhere, so that
nothing in a header is believed before it is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx

from mlx_ep.comm import shortened

# As mlx.core.load maps them: MLX keeps the 8-bit floats as their bits.
DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "F8_E4M3": mx.uint8,
    "F8_E8M0": mx.uint8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
}

MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_MOST_DIMENSION = 2**31 - 1  # MLX counts in 32 bits
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `num_bytes` bytes from `offset` of `file` on."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file, in the header's order; no tensor is read.

    Raises:
        ValueError: the file cannot be read, is no safetensors file or is shorter than
            its header says, or an entry is not in order; with the tensor's name.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise ValueError(
                    f"{file} is a Git LFS pointer, not the file that it points to. "
                    "Fetch the files (git lfs pull), or download the model again."
                )
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > size - 8:
                raise ValueError(
                    f"{file} is truncated: it has {size} bytes, its header alone needs "
                    f"{8 + length}. Download the file again."
                )
            if length > MOST_HEADER_BYTES:
                raise ValueError(
                    f"{file} is not a safetensors file: its header would have "
                    f"{length} bytes, {MOST_HEADER_BYTES} are the most."
                )
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        why = f" ({error.args[0]})" if isinstance(error, _TwiceError) else ""
        raise ValueError(
            f"{file} is not a safetensors file: its header is not JSON{why}."
        ) from None
    if not isinstance(header, dict):
        raise ValueError(
            f"{file} is not a safetensors file: its header is not a JSON object."
        )
    header.pop("__metadata__", None)
    found = [
        _tensor(file, name, entry, 8 + length, size) for name, entry in header.items()
    ]
    _check_overlaps(found)
    return found


class _TwiceError(ValueError):
    """A JSON object that has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(f"it has {quoted(key)} twice")
        found[key] = value
    return found


def _tensor(file: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    """One entry of a header.

    Args:
        data: where the tensors begin in the file.
        size: of the file.
    """

    def refuse(why: str) -> ValueError:
        return ValueError(f"{file}: tensor {quoted(name)} {why}.")

    if not isinstance(entry, dict):
        raise refuse("must have dtype, shape and data_offsets")
    dtype, shape, offsets = map(entry.get, ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(
            f"has dtype {quoted(str(dtype))}, which MLX cannot hold; it can "
            f"{', '.join(DTYPES)}"
        )
    if not _is_counts(shape) or max(shape, default=0) > _MOST_DIMENSION:
        raise refuse(
            f"must have a shape of whole numbers; got {shortened(repr(shape), 100)}"
        )
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(
            "must have two data_offsets, the first not above the second; got "
            f"{shortened(repr(offsets), 100)}"
        )
    start, stop = offsets
    if data + stop > size:
        raise ValueError(
            f"{file} is truncated: it has {size} bytes, its header says {data + stop} "
            f"(tensor {quoted(name)}). Download the file again."
        )
    needed = prod(shape) * DTYPES[dtype].size
    if stop - start != needed:
        raise refuse(
            f"must have {needed} bytes for {dtype} {list(shape)}; its data_offsets "
            f"give it {stop - start}"
        )
    return TensorInfo(name, file, dtype, tuple(shape), data + start, stop - start)


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_overlaps(tensors: list[TensorInfo]) -> None:
    before: TensorInfo | None = None
    for info in sorted(tensors, key=lambda info: (info.offset, info.num_bytes)):
        if not info.num_bytes:
            continue
        if before is not None and info.offset < before.offset + before.num_bytes:
            raise ValueError(
                f"{info.file}: tensors {quoted(before.name)} and {quoted(info.name)} "
                "share bytes. Download the file again."
            )
        before = info


def unique_tensors(files: Iterable[list[TensorInfo]]) -> dict[str, TensorInfo]:
    """The tensors of all files by name.

    Raises:
        ValueError: two files have a tensor of one name.
    """
    found: dict[str, TensorInfo] = {}
    for tensors in files:
        for info in tensors:
            if (other := found.setdefault(info.name, info)) is not info:
                raise ValueError(
                    f"{other.file} and {info.file.name} both have a tensor "
                    f"{quoted(info.name)}. Remove the file that is not of this model."
                )
    return found


def quoted(name: str) -> str:
    """A tensor's name in a message: on one line, and not longer than one."""
    return shortened(repr(name)[1:-1], 120)
