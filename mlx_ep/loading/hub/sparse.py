"""A file of which only some bytes are on disk, and the journal that says which.

    blobs/ETAG           as long as the whole file; never written bytes are holes
    blobs/ETAG.ranges    the journal, lines that end in the CRC32 of what is before:
                         "START STOP", these bytes are there; "verified", all are and
                         have the right hash; "discarded", all that was said is void
    blobs/ETAG.lock      what processes on one host lock ranges of

A line is appended after its bytes have been flushed to the disk, so that a crash can
lose bytes that are there but never claim bytes that are not. The check sum makes a line
that was cut short in a crash, even one that another line was then appended to, no line.
Nothing is ever taken out of a journal and a file is never replaced, so that processes
that have both open always agree with each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

from mlx_ep.loading.hub.errors import HubError
from mlx_ep.loading.hub.ranges import RangeSet, Span

_JOURNAL = ".ranges"
_LOCK = ".lock"
_HASH_BYTES = 8 << 20
_SECONDS_BETWEEN_TRIES = 0.02
SECONDS_OF_SILENCE = 5.0  # of waiting for another process
_SPAN = re.compile(r"(\d{1,18}) (\d{1,18})")
# A file of ours is never a link: what one points to would be written over.
_OPEN = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Journal:
    """What is on disk of a sparse file, as far as its journal says so.

    Attributes:
        is_verified: the whole file is there and has the hash that it must have.
    """

    def __init__(self, blob: Path) -> None:
        self.path = blob.with_name(blob.name + _JOURNAL)
        self._present = RangeSet()
        self.is_verified = False
        self._position = 0
        self._mutex = threading.Lock()

    @staticmethod
    def of(file: Path) -> Journal | None:
        """The journal of a file, also through links; None for an ordinary file."""
        journal = Journal(file.resolve())
        return journal if journal.path.exists() else None

    def missing(self, span: Span) -> list[Span]:
        """The parts of `span` that are not on disk, other processes' work included."""
        with self._mutex:
            self._read_news()
            return self._present.missing(span)

    def append(self, span: Span) -> None:
        """Say that `span` is on disk now; it must be."""
        self._append(f"{span.start} {span.stop}")

    def mark_verified(self) -> None:
        """Say that the whole file is there and has the right hash."""
        self._append("verified")

    def discard(self) -> None:
        """Say that nothing of the file is on disk, whatever was said before."""
        if self.path.exists():
            self._append("discarded")

    def _append(self, text: str) -> None:
        # One write on a descriptor that appends: lines of processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | _OPEN, 0o644)
        try:
            os.write(descriptor, f"{text} {crc32(text.encode()):08x}\n".encode())
        finally:
            os.close(descriptor)

    def _read_news(self) -> None:
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._position)
                news = stream.read()
        except FileNotFoundError:
            return
        whole = news[: news.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            text, _, check = line.rpartition(" ")
            if check != f"{crc32(text.encode()):08x}":
                continue
            if text in ("verified", "discarded"):
                self.is_verified = text == "verified"
                if not self.is_verified:
                    self._present = RangeSet()
            elif match := _SPAN.fullmatch(text):
                self._present.add(Span(int(match[1]), int(match[2])))


class SparseFile:
    """A sparse file that is being filled, maybe by several processes at once.

    A process must not have two of these for one file at a time: closing one would free
    the locks of the other (POSIX record locks belong to the process).

    Args:
        blob: where the bytes are; made if it does not exist.
        size: bytes of the whole file.
        etag: the hash of the whole file: SHA-256, or that of a git blob (SHA-1).
    """

    def __init__(self, blob: Path, size: int, etag: str) -> None:
        self.path, self.size, self.etag = blob, size, etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(blob)
        self._lock_file = os.open(
            blob.with_name(blob.name + _LOCK), os.O_RDWR | _OPEN, 0o644
        )
        # Behind the file's end: to make it and to check it whole.
        self._whole = Span(size, size + 1)
        self.lock(self._whole, wait=True)
        try:
            self._descriptor = self._open()
        finally:
            self.unlock(self._whole)

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | _OPEN, 0o644)
        if os.fstat(descriptor).st_size != self.size:
            # New, or not made to its end: what a journal says of it is not so.
            self.journal.discard()
            os.ftruncate(descriptor, self.size)
        return descriptor

    def close(self) -> None:
        os.close(self._descriptor)
        os.close(self._lock_file)

    def lock(self, span: Span, wait: bool = False) -> bool:
        """Keep other processes from fetching `span`; False if one does already.

        Args:
            wait: until none does. By asking again: the kernel takes two threads of two
                processes that wait for each other's files for a deadlock.
        """
        flags = fcntl.LOCK_EX | fcntl.LOCK_NB
        waiting = Waiting(self, span)
        while True:
            try:
                fcntl.lockf(self._lock_file, flags, span.num_bytes, span.start)
                return True
            except BlockingIOError:
                if not wait:
                    return False
                waiting.say()
                time.sleep(_SECONDS_BETWEEN_TRIES)

    def unlock(self, span: Span) -> None:
        fcntl.lockf(self._lock_file, fcntl.LOCK_UN, span.num_bytes, span.start)

    def holder(self, span: Span) -> int | None:
        """The process that has locked part of `span`; None: no other does."""
        wanted = _flock(fcntl.F_WRLCK, span.start, span.num_bytes)
        kind, pid = _flock_fields(fcntl.fcntl(self._lock_file, fcntl.F_GETLK, wanted))
        return None if kind == fcntl.F_UNLCK else pid

    def missing(self, spans: Sequence[Span]) -> list[Span]:
        """The parts of `spans` that are not on disk."""
        return [part for span in spans for part in self.journal.missing(span)]

    def read(self, span: Span) -> bytes:
        """Bytes that are on disk."""
        assert not self.missing([span])
        return os.pread(self._descriptor, span.num_bytes, span.start)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes that the journal does not know of until `commit`."""
        while data:
            count = os.pwrite(self._descriptor, data, offset)
            offset, data = offset + count, data[count:]

    def commit(self, span: Span) -> None:
        """Say that `span` has been written, once the disk has it."""
        if span.num_bytes:
            os.fsync(self._descriptor)
            self.journal.append(span)

    def verify(self) -> None:
        """Check the hash of a file that is complete; once, and never of a part.

        Raises:
            HubError: it is not what the hub says. The next start fetches it anew.
        """
        self.lock(self._whole, wait=True)
        try:
            if self.missing([Span(0, self.size)]) or self.journal.is_verified:
                return
            if (found := _hash(self._descriptor, self.size, self.etag)) == self.etag:
                self.journal.mark_verified()
                return
            self.journal.discard()
            raise HubError(
                f"All {self.size} bytes of a file were fetched, but their hash is "
                f"{found} and the hub says {self.etag}. They will not be used: start "
                "again to fetch them anew."
            )
        finally:
            self.unlock(self._whole)


class Waiting:
    """Says who is waited for, when that takes long: a stopped process keeps its locks.

    Args:
        file: part of which another process has locked.
        span: that part.
    """

    def __init__(self, file: SparseFile, span: Span) -> None:
        self._file, self._span = file, span
        self._since = time.monotonic()
        self._next = SECONDS_OF_SILENCE

    def say(self) -> None:
        """A line on stderr after a few seconds, then after twice as many each."""
        waited = time.monotonic() - self._since
        if waited < self._next:
            return
        self._next = 2 * waited
        holder = self._file.holder(self._span)
        who = "another process" if holder is None else f"process {holder}"
        print(
            f"waiting for {who}, which has been fetching {self._file.path} for "
            f"{waited:.0f} s. If it hangs, end it: what it fetched is kept.",
            file=sys.stderr,
            flush=True,
        )


# struct flock, of 64-bit Linux and of macOS.
_FLOCK = "qqihh" if sys.platform == "darwin" else "hhqqi4x"


def _flock(kind: int, start: int, count: int) -> bytes:
    if sys.platform == "darwin":
        return struct.pack(_FLOCK, start, count, 0, kind, os.SEEK_SET)
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, count, 0)


def _flock_fields(answer: bytes) -> tuple[int, int]:
    """Kind of lock, and the process that has it."""
    fields = struct.unpack(_FLOCK, answer)
    return (
        (fields[3], fields[2]) if sys.platform == "darwin" else (fields[0], fields[4])
    )


def _hash(descriptor: int, size: int, etag: str) -> str:
    """The hash of a file's bytes, of the kind that `etag` is."""
    if len(etag) == 64:
        digest = hashlib.sha256()
    else:  # what git calls a file that is not in its large file storage
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    for offset in range(0, size, _HASH_BYTES):
        digest.update(os.pread(descriptor, min(_HASH_BYTES, size - offset), offset))
    return digest.hexdigest()
