"""Fetches what a rank needs of a hub checkpoint and does not have."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants

from mlx_ep.loading.checkpoint import Checkpoint
from mlx_ep.loading.hub.errors import explained, offline_problem
from mlx_ep.loading.hub.ranges import RangeSet, Span, bridge_gaps, pieces
from mlx_ep.loading.hub.remote import RemoteFile
from mlx_ep.loading.hub.repository import HubFolder, WeightFile
from mlx_ep.loading.hub.retries import Retries
from mlx_ep.loading.hub.sparse import Journal, SparseFile, Waiting
from mlx_ep.loading.progress import Advance, watch_phase
from mlx_ep.loading.rank_tensors import rank_tensors
from mlx_ep.metrics import format_bytes
from mlx_ep.placement import Placement, runs

_PIECE_BYTES = 32 << 20  # one request; several run at once
# What a crash can lose of each connection. Errors lose nothing.
_COMMIT_BYTES = 8 << 20
_SECONDS_BETWEEN_TRIES = 0.2

Spans = dict[Path, RangeSet]


class DiskNeed(NamedTuple):
    """What a rank will write, and where.

    Attributes:
        host: the rank's host.
        device: the disk of its cache, as the host numbers it.
        shared_bytes: dense tensors, which ranks with one cache fetch once.
        own_bytes: its experts.
        free_bytes: on that disk.
    """

    host: str
    device: int = 0
    shared_bytes: int = 0
    own_bytes: int = 0
    free_bytes: int = 0


def disk_problems(needs: Sequence[DiskNeed]) -> list[str]:
    """Per rank, why what it will fetch does not fit, or ""; ranks may share a disk.

    Args:
        needs: of every rank, in rank order.
    """
    problems = []
    for rank, need in enumerate(needs):
        sharing = [n for n in needs if (n.host, n.device) == (need.host, need.device)]
        num_bytes = sum(n.own_bytes for n in sharing)
        num_bytes += max(n.shared_bytes for n in sharing)
        if num_bytes <= need.free_bytes:
            problems.append("")
            continue
        problems.append(
            f"the disk of rank {rank} ({need.host}) is too full: "
            f"{format_bytes(num_bytes)} are to be fetched, "
            f"{format_bytes(need.free_bytes)} are free. Make room (hf cache rm), or "
            "set HF_HOME to a folder on a larger disk."
        )
    return problems


def wanted_spans(
    checkpoint: Checkpoint, placement: Placement, rank: int
) -> tuple[Spans, Spans]:
    """The bytes of each file that `rank` reads: of dense tensors, and of its experts.

    A rank that holds part of the width of its experts gets them whole: a part is
    thousands of short spans per tensor, or is packed together with others.
    """
    files = {info.file for info in checkpoint.tensors.values()}
    dense: Spans = {file: RangeSet() for file in files}
    expert: Spans = {file: RangeSet() for file in files}
    own = sorted(placement.rank_experts[rank])
    for info, kind, _, _, is_elsewhere in rank_tensors(checkpoint, placement, rank):
        if is_elsewhere:
            continue
        whole = Span(info.offset, info.offset + info.num_bytes)
        if kind == "dense":
            dense[info.file].add(whole)
        elif kind == "own":
            expert[info.file].add(whole)
        elif kind == "stack":
            row_bytes = info.num_bytes // info.shape[0]
            for first, count in runs(own):
                start = info.offset + first * row_bytes
                expert[info.file].add(Span(start, start + count * row_bytes))
    return dense, expert


@dataclass(frozen=True)
class HubFetch:
    """What a rank needs of the weight files of a hub folder.

    Attributes:
        wanted: per weight file, the spans, small gaps between them included.
        missing_shared_bytes: of dense tensors, not on this machine.
        missing_bytes: all that is not.
    """

    folder: HubFolder
    wanted: Mapping[WeightFile, RangeSet]
    missing_shared_bytes: int
    missing_bytes: int

    def disk_need(self, host: str) -> DiskNeed:
        """What this rank will write to which disk."""
        return DiskNeed(
            host,
            self.folder.path.stat().st_dev,
            self.missing_shared_bytes,
            self.missing_bytes - self.missing_shared_bytes,
            shutil.disk_usage(self.folder.path).free,
        )

    def run(self, rank: int, retries: Retries | None = None) -> None:
        """Fetch what is missing; ranks with one cache may do so at once.

        Args:
            rank: for what is printed.
            retries: the patience; default: `Retries`.

        Raises:
            HubError: it cannot be had; what was fetched is kept.
        """
        files = {f: s for f, s in self.wanted.items() if self._is_incomplete(f, s)}
        if not files:
            return
        retries = retries or Retries()
        total = sum(spans.num_bytes for spans in self.wanted.values())
        with (
            explained(self.folder.repository),
            watch_phase(
                "fetching",
                total,
                rank,
                "B",
                total - self.missing_bytes,
                f" of the {format_bytes(total)} it needs of {self.folder.repository}",
            ) as advance,
            ExitStack() as stack,
        ):
            jobs, blobs = [], []
            waited: dict[int, Waiting] = {}
            for file, spans in files.items():
                blob = stack.enter_context(closing(self.folder.open_blob(file)))
                remote = self.folder.remote(file, retries)
                blobs.append(blob)
                jobs += [
                    _Job(remote, blob, piece, advance)
                    for span in blob.missing(list(spans))
                    for piece in pieces(span, _PIECE_BYTES)
                ]
            while jobs:
                done = retries.for_each(_Job.run, jobs)
                jobs = [job for job, is_done in zip(jobs, done) if not is_done]
                if jobs:  # another process is at them
                    waited.setdefault(id(jobs[0]), jobs[0].waiting()).say()
                    time.sleep(_SECONDS_BETWEEN_TRIES)
            retries.for_each(SparseFile.verify, blobs)

    def _is_incomplete(self, file: WeightFile, spans: RangeSet) -> bool:
        """Whether bytes of a file are missing, or it is whole and was never checked."""
        journal = Journal(self.folder.blob(file))
        if any(journal.missing(span) for span in spans):
            return True
        return not journal.missing(Span(0, file.size)) and not journal.is_verified


@dataclass(frozen=True)
class _Job:
    """Part of a file that one connection fetches."""

    remote: RemoteFile
    blob: SparseFile
    piece: Span
    advance: Advance

    def run(self) -> bool:
        """Fetch it; False if another process does so now."""
        if not self.blob.lock(self.piece):
            return False
        try:
            missing = self.blob.missing([self.piece])
            there = self.piece.num_bytes - sum(span.num_bytes for span in missing)
            self.advance(there)
            for span in missing:
                self._fetch(span)
        finally:
            self.blob.unlock(self.piece)
        return True

    def waiting(self) -> Waiting:
        """For the process that fetches it now."""
        return Waiting(self.blob, self.piece)

    def _fetch(self, span: Span) -> None:
        committed = written = span.start

        def write(offset: int, data: bytes) -> None:
            nonlocal committed, written
            self.blob.write(offset, data)
            written = offset + len(data)
            self.advance(len(data))
            if written - committed >= _COMMIT_BYTES:
                self.blob.commit(Span(committed, written))
                committed = written

        try:
            self.remote.read(span, write)
        finally:
            self.blob.commit(Span(committed, written))


def hub_fetch(
    checkpoint: Checkpoint, placement: Placement, rank: int
) -> HubFetch | None:
    """What `rank` has to fetch of a checkpoint; None if its files are whole.

    Raises:
        ValueError: something is missing, and the hub may not be asked.
    """
    folder = HubFolder.of(checkpoint.path)
    if folder is None:
        return None
    dense, expert = wanted_spans(checkpoint, placement, rank)
    wanted: dict[str, RangeSet] = {}
    files: dict[str, WeightFile] = {}
    missing_dense = missing = 0
    for file in folder.files:
        path = folder.path / file.name
        if not folder.has_holes(file):
            continue
        # Two files of equal content are one blob.
        journal = Journal(folder.blob(files.setdefault(file.etag, file)))
        spans = wanted.setdefault(file.etag, RangeSet())
        for span in [*dense.get(path, ()), *expert.get(path, ())]:
            spans.add(span)
        missing_dense += _missing_bytes(journal, dense.get(path, RangeSet()))
    bridged = {files[etag]: bridge_gaps(spans) for etag, spans in wanted.items()}
    for file, spans in bridged.items():
        missing += _missing_bytes(Journal(folder.blob(file)), spans)
    if missing and constants.HF_HUB_OFFLINE:
        raise ValueError(
            offline_problem(
                f"{folder.repository}: {format_bytes(missing)} of the weights of rank "
                f"{rank} are"
            )
        )
    return HubFetch(folder, bridged, missing_dense, missing)


def _missing_bytes(journal: Journal, spans: RangeSet) -> int:
    missing = [part for span in spans for part in journal.missing(span)]
    return sum(part.num_bytes for part in missing)
