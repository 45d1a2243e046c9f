"""A checkpoint folder on disk: what it holds, and reading parts of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_config

from mlx_ep.comm import shortened
from mlx_ep.loading.foreign import foreign_code
from mlx_ep.loading.headers import (
    DTYPES,
    TensorInfo,
    quoted,
    read_header,
    unique_tensors,
)
from mlx_ep.loading.hub.ranges import Span
from mlx_ep.loading.hub.sparse import Journal
from mlx_ep.models import stack_shape
from mlx_ep.placement import runs

_READ_BYTES = 32 << 20  # one read call; several run at once
_NUM_READERS = 4
# Spans with gaps are read one by one from this length on; shorter ones together with
# the gaps, which a disk reads anyway.
_MIN_SPAN_BYTES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and model*.safetensors, checked but not read."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path, config: dict[str, Any] | None = None) -> Checkpoint:
        """Read the headers of a checkpoint and check that all its bytes are there.

        Args:
            config: of `read_config`, where it was read already.

        Raises:
            ValueError: config.json or a weight file is missing, unreadable or shorter
                than its header says.
        """
        config = read_config(path) if config is None else config
        files = sorted(path.glob("model*.safetensors"))
        _check_index(path, files)
        if not files:
            raise ValueError(
                f"{path} has a config.json but no model*.safetensors. Download the "
                "weights, or use --dummy-weights to run the architecture alone."
            )
        tensors = unique_tensors(map(read_header, files))
        infos = (
            replace(info, shape=stack_shape(config, info.name, info.shape))
            for info in tensors.values()
        )
        return cls(path, config, {info.name: info for info in infos})


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder, as mlx-lm reads it (generation_config.json too).

    Raises:
        ValueError: it is missing or not a JSON object.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} has no config.json: a model folder holds config.json, a tokenizer "
            "and model*.safetensors."
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        why = shortened(str(error), 200)
        raise ValueError(f"{file} is not valid JSON: {why}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object.")
    with foreign_code(f"{path / 'generation_config.json'} is not in order"):
        return load_config(path)


def _check_index(path: Path, files: Sequence[Path]) -> None:
    """Every weight file that model.safetensors.index.json names must be there."""
    index_file = path / "model.safetensors.index.json"
    if not index_file.exists():
        return
    try:
        weight_map = json.loads(index_file.read_text())["weight_map"]
        named = set(weight_map.values())
        if not all(isinstance(name, str) for name in named):
            raise TypeError("weight_map must give the name of a file for each tensor")
    except (
        ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError,
    ) as error:  # fmt: skip
        why = shortened(repr(error), 200)
        raise ValueError(f"{index_file} is not a valid index: {why}.") from None
    missing = sorted(named - {file.name for file in files})
    if missing:
        names = ", ".join(map(quoted, missing[:3])) + (" ..." if missing[3:] else "")
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(named)} weight files that its "
            f"index names: {names}. "
            "Download the model again."
        )


class TensorReader:
    """Reads byte ranges of a checkpoint straight into MLX buffers, and counts them.

    ``mx.load`` reads a tensor whole, whatever slice of it is used; here the rows that
    are asked for are all that is read and held.

    Attributes:
        bytes_read: bytes read so far.

    Args:
        advance: is told of bytes as they are read.
    """

    def __init__(self, advance: Callable[[int], object] | None = None) -> None:
        self.bytes_read = 0
        self.advance = advance or (lambda num_bytes: None)
        self._files: dict[Path, int] = {}
        self._journals: dict[Path, Journal | None] = {}
        self._pool = ThreadPoolExecutor(_NUM_READERS)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for file in self._files.values():
            os.close(file)

    def read(self, info: TensorInfo) -> mx.array:
        """A whole tensor."""
        return self._read(info, [(0, info.num_bytes)], info.shape)

    def read_rows(self, info: TensorInfo, rows: Sequence[int]) -> mx.array:
        """``tensor[rows]`` of a stacked tensor ``[E, ...]``, runs of rows at once."""
        row_bytes = info.num_bytes // info.shape[0]
        spans = [(row * row_bytes, count * row_bytes) for row, count in runs(rows)]
        return self._read(info, spans, (len(rows), *info.shape[1:]))

    def read_slice(
        self, info: TensorInfo, rows: Sequence[int] | None, axis: int, part: slice
    ) -> mx.array:
        """Part of one axis of a tensor, or of some rows of a stacked tensor.

        Where the part is contiguous in each matrix, or at least 4 KiB at a time, no
        other byte is read; else whole matrices are read, one at a time, and cut.

        Args:
            info: a tensor of one expert, or a stack ``[E, ...]``.
            rows: of the stack; None: the tensor is of one expert.
            axis: the axis that is cut, counted from the end.
            part: its start and stop.
        """
        stacked = rows is not None
        matrix = info.shape[1:] if stacked else info.shape
        size, inner = matrix[axis], prod(matrix[len(matrix) + axis + 1 :])
        itemsize = info.num_bytes // prod(info.shape)
        line, kept = (n * inner * itemsize for n in (size, part.stop - part.start))
        first = part.start * inner * itemsize
        lines = prod(matrix[: len(matrix) + axis])
        matrix_bytes = lines * line
        shape = list(matrix)
        shape[axis] = part.stop - part.start
        starts = [row * matrix_bytes for row in rows] if rows is not None else [0]
        if lines == 1 or kept >= _MIN_SPAN_BYTES:
            spans = [
                (start + index * line + first, kept)
                for start in starts
                for index in range(lines)
            ]
            full_shape = (len(starts), *shape) if stacked else tuple(shape)
            return self._read(info, spans, full_shape)
        cut = []
        for start in starts:
            whole = self._read(info, [(start, matrix_bytes)], (lines, line), mx.uint8)
            cut.append(mx.contiguous(whole[:, first : first + kept]))
            # sync: one matrix at a time, so that one at most is held whole.
            mx.eval(cut[-1])
        together = mx.stack(cut) if stacked else cut[0]
        mx.eval(together)  # sync: the parts are freed
        return together.view(DTYPES[info.dtype]).reshape(
            (len(starts), *shape) if stacked else shape
        )

    def check(
        self, info: TensorInfo, spans: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """A file that is fetched from the hub by ranges has holes: none may be read.

        Args:
            spans: what will be read (start within the tensor, count); None: all of it.
        """
        if info.file not in self._journals:
            self._journals[info.file] = Journal.of(info.file)
        journal = self._journals[info.file]
        if journal is None:
            return
        for start, count in [(0, info.num_bytes)] if spans is None else spans:
            first = info.offset + start
            if missing := journal.missing(Span(first, first + count)):
                raise RuntimeError(
                    f"{info.file}: bytes {missing[0].start} to {missing[0].stop} of "
                    f"tensor {info.name} were never fetched. Start again, or use "
                    "--download full."
                )

    def _read(
        self,
        info: TensorInfo,
        spans: Sequence[tuple[int, int]],
        shape: tuple[int, ...],
        dtype: mx.Dtype | None = None,
    ) -> mx.array:
        """The bytes of `spans` (start within the tensor, count), one after another.

        Args:
            dtype: of the result; None: the tensor's.
        """
        self.check(info, spans)
        total = sum(count for _, count in spans)
        array = mx.zeros((total,), mx.uint8)
        mx.eval(array)  # sync: the buffer must exist before the file is read into it
        staging = None if buffers_alias() else np.empty(total, np.uint8)
        target_of: Any = array if staging is None else staging
        buffer = memoryview(target_of)
        position, jobs = 0, []
        for start, count in spans:
            for part in range(0, count, _READ_BYTES):
                size = min(_READ_BYTES, count - part)
                target = buffer[position : position + size]
                jobs.append((info, info.offset + start + part, target))
                position += size
        self._descriptor(info.file)
        list(self._pool.map(self._fill, jobs))
        self.bytes_read += position
        self.advance(position)
        if staging is not None:
            array = mx.array(staging)
        return array.view(dtype or DTYPES[info.dtype]).reshape(shape)

    def _fill(self, job: tuple[TensorInfo, int, memoryview]) -> None:
        info, offset, target = job
        while target:
            count = os.preadv(self._descriptor(info.file), [target], offset)
            if count == 0:
                raise OSError(
                    f"{info.file} ended at byte {offset} while {info.name} was read: "
                    "the file changed after its header was checked."
                )
            offset += count
            target = target[count:]

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]


@cache
def buffers_alias() -> bool:
    """Whether writing into the memoryview of an MLX array changes the array.

    True on MLX's CPU backend, as tried here; where it is not (a GPU with memory of its
    own), reading goes through a NumPy buffer and holds one tensor twice for a moment.
    """
    array = mx.zeros((8,), mx.uint8)
    mx.eval(array)  # sync: once per process
    buffer: Any = array
    view = memoryview(buffer)
    if view.readonly:
        return False
    view[3] = 7
    return array.tolist() == [0, 0, 0, 7, 0, 0, 0, 0]  # sync: once per process
