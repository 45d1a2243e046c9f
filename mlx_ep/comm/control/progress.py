"""Where a rank is, in a page of memory that it shares with its watch.

The rank writes, without a system call and without waiting; the watch reads. The page is
a file without a name that both have open.

    0    beat: monotonic seconds, by a thread that needs the interpreter's lock
    8    version: odd while the rest is being written
    16   since: monotonic seconds of the last change of phase or step
    24   step, layer: 4 bytes each, -1 is none
    32   count: 8 bytes, of the changes of phase or step
    40   phase: 24 bytes       64   stage: 64 bytes
    128  the last 64 fingerprints: number, value, their exclusive or; 8 bytes each
    1664 in a step: layer and stage, 4 bytes each, in one write; stage 0 is none
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import tempfile
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

MARKS, MARKS_KEPT = 128, 64
MARK_EVERY = 4  # fingerprints are shown; the first ones all are
_BEAT = struct.Struct("<d")
_VERSION = struct.Struct("<Q")
_REST = struct.Struct("<diiQ24s64s")
_MARK = struct.Struct("<QQQ")
_VISIT = struct.Struct("<ii")
VISIT = MARKS + MARKS_KEPT * _MARK.size
SIZE = VISIT + _VISIT.size

# Of a MoE layer. The last: it is left, and the host may be waiting for what was built.
LayerStage = Literal[
    "route", "assign", "dispatch", "experts", "combine", "evaluating up to here"
]
_STAGES = ("", *get_args(LayerStage))
_STAGE_NUMBERS = {stage: number for number, stage in enumerate(_STAGES)}


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        phase: starting, loading, warmup, prefill, decode, running, waiting, leaving.
        step: of the phase, None before the first.
        layer: of the model, None outside of one.
        stage: what of the layer or the step.
        since: monotonic seconds of the last change of phase or step.
        beat: monotonic seconds of the interpreter's last sign of life.
        count: of changes of phase or step; ranks that run one program count alike.
    """

    phase: str
    step: int | None
    layer: int | None
    stage: str
    since: float
    beat: float
    count: int


class ProgressPage:
    """The shared page; the rank makes it, the watch opens it by its file descriptor."""

    def __init__(self, file_descriptor: int | None = None) -> None:
        self._file: Any = None
        if file_descriptor is None:
            self._file = tempfile.TemporaryFile(prefix="mlx_ep-")  # noqa: SIM115
            self._file.truncate(SIZE)
            file_descriptor = self._file.fileno()
        self.file_descriptor = file_descriptor
        self._memory = mmap.mmap(file_descriptor, SIZE)
        self._version = self._count = 0
        self._phase, self._stage = b"", b""
        self._step = self._layer = -1
        self._since = 0.0
        self._marks, self._chain = 0, b""

    def beat(self) -> None:
        """A sign of life of the interpreter."""
        _BEAT.pack_into(self._memory, 0, time.monotonic())

    def at(
        self,
        phase: str | None = None,
        step: int | None = None,
        layer: int | None = None,
        stage: str = "",
    ) -> None:
        """Says where this rank is; a new phase or step starts its time anew.

        Args:
            phase: None is the same as before.
            step: None is the same as before, none in a new phase.
        """
        if phase is not None:
            self._phase, self._step = phase.encode()[:24], -1
        if step is not None:
            self._step = step
        if phase is not None or step is not None:
            self._since = time.monotonic()
            self._count += 1
            _VISIT.pack_into(self._memory, VISIT, -1, 0)
        self._layer = -1 if layer is None else layer
        self._stage = stage.encode()[:64]
        self._version += 2
        _VERSION.pack_into(self._memory, 8, self._version - 1)
        rest = (self._since, self._step, self._layer, self._count)
        _REST.pack_into(self._memory, 16, *rest, self._phase, self._stage)
        _VERSION.pack_into(self._memory, 8, self._version)

    def visit(self, layer: int, stage: LayerStage) -> None:
        """Says where in a layer of the step this rank is; `at` a new step ends it.

        Args:
            layer: -1 is one without a number.
        """
        _VISIT.pack_into(self._memory, VISIT, layer, _STAGE_NUMBERS[stage])

    def mark(self, *numbers: int) -> None:
        """Takes what this step computed into the fingerprint of all steps so far.

        Ranks that run one program have the same fingerprints under the same numbers.
        """
        text = self._chain + b"".join(it.to_bytes(8, "little") for it in numbers)
        self._chain = hashlib.blake2b(text, digest_size=8).digest()
        self._marks += 1
        if self._marks < MARK_EVERY or self._marks % MARK_EVERY == 0:
            shown = max(self._marks - MARK_EVERY, 0) // MARK_EVERY + MARK_EVERY
            slot = (self._marks if self._marks < MARK_EVERY else shown) % MARKS_KEPT
            value = int.from_bytes(self._chain, "little")
            words = (self._marks, value, self._marks ^ value)
            _MARK.pack_into(self._memory, MARKS + slot * _MARK.size, *words)

    def read_marks(self) -> dict[int, int]:
        """The last fingerprints that are shown, by number."""
        found = {}
        for slot in range(MARKS_KEPT):
            at = MARKS + slot * _MARK.size
            number, value, check = _MARK.unpack_from(self._memory, at)
            if number and number ^ value == check:  # else it is just being written
                found[number] = value
        return found

    def read(self) -> Place:
        """What the rank said last."""
        for _ in range(100):
            before = _VERSION.unpack_from(self._memory, 8)[0]
            rest = _REST.unpack_from(self._memory, 16)
            if before % 2 == 0 and before == _VERSION.unpack_from(self._memory, 8)[0]:
                break
        since, step, layer, count, phase, stage = rest
        words = stage.rstrip(b"\0").decode(errors="replace")
        visited, number = _VISIT.unpack_from(self._memory, VISIT)
        if number:
            layer, words = visited, _STAGES[number]
        return Place(
            phase=phase.rstrip(b"\0").decode(errors="replace"),
            step=None if step < 0 else step,
            layer=None if layer < 0 else layer,
            stage=words,
            since=since,
            beat=_BEAT.unpack_from(self._memory, 0)[0],
            count=count,
        )

    def close(self) -> None:
        self._memory.close()
        if self._file is not None:
            self._file.close()
