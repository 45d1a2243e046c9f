"""Byte ranges, and sparse files with their journals: all without a network."""

from __future__ import annotations

import hashlib
import random
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import pytest

from mlx_ep.loading.hub.errors import HubError
from mlx_ep.loading.hub.ranges import RangeSet, Span, bridge_gaps, pieces
from mlx_ep.loading.hub.sparse import Journal, SparseFile
from tests.support.hub_server import locked_elsewhere


def _bytes_of(spans: RangeSet) -> set[int]:
    return {byte for span in spans for byte in range(*span)}


def test_range_sets_are_sets_of_bytes() -> None:
    draw = random.Random(0)
    for _ in range(500):
        ours, expected = RangeSet(), set[int]()
        for _ in range(draw.randint(0, 8)):
            start = draw.randint(0, 40)
            span = Span(start, start + draw.randint(0, 9))
            ours.add(span)
            expected |= set(range(*span))
            assert _bytes_of(ours) == expected
            assert ours.num_bytes == len(expected)
            assert all(a.stop < b.start for a, b in pairwise(ours))
            asked = Span(draw.randint(0, 20), draw.randint(20, 50))
            missing = _bytes_of(RangeSet(ours.missing(asked)))
            assert missing == set(range(*asked)) - expected


def test_small_gaps_are_bridged_within_the_budget() -> None:
    spans = RangeSet([Span(0, 500), Span(504, 700), Span(703, 1000), Span(1010, 1100)])
    # 1 % of 1083 bytes is 10: the gaps of 3 and 4, then 10 is more than what is left.
    assert list(bridge_gaps(spans)) == [Span(0, 1000), Span(1010, 1100)]
    assert list(bridge_gaps(spans, most_waste=1.0)) == [Span(0, 1100)]
    assert bridge_gaps(spans, most_waste=1.0, largest_gap=3).num_bytes == 1086
    assert bridge_gaps(spans, most_waste=0.0) == spans
    assert list(bridge_gaps(RangeSet())) == []


@pytest.mark.parametrize("size", [1, 3, 10, 99])
def test_pieces_cover_a_span(size: int) -> None:
    span = Span(5, 15)
    cut = pieces(span, size)
    assert [byte for piece in cut for byte in range(*piece)] == list(range(*span))
    assert all(0 < piece.num_bytes <= size for piece in cut)
    assert pieces(Span(5, 5), size) == []


def _blob(folder: Path, data: bytes) -> SparseFile:
    etag = hashlib.sha256(data).hexdigest()
    return SparseFile(folder / etag, len(data), etag)


def test_what_is_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    data = bytes(range(200))
    with closing(_blob(tmp_path, data)) as blob:
        assert blob.path.stat().st_size == 200
        blob.write(10, data[10:30])
        blob.write(50, data[50:60])
        blob.commit(Span(10, 30))  # the rest is lost in a crash now
    with closing(_blob(tmp_path, data)) as blob:
        assert blob.missing([Span(0, 40), Span(50, 60)]) == [
            Span(0, 10),
            Span(30, 40),
            Span(50, 60),
        ]
        assert blob.read(Span(10, 30)) == data[10:30]


def test_processes_see_each_others_work(tmp_path: Path) -> None:
    data = bytes(100)
    with (
        closing(_blob(tmp_path, data)) as ours,
        closing(_blob(tmp_path, data)) as other,
    ):
        other.commit(Span(0, 60))
        assert ours.missing([Span(0, 100)]) == [Span(60, 100)]
        ours.commit(Span(60, 100))
        assert other.missing([Span(0, 100)]) == []


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_line_cut_short_in_a_crash_is_no_line(tmp_path: Path, cut: int) -> None:
    """Also where the next line is appended to what is left of it."""
    journal = Journal(tmp_path / "blob")
    journal.append(Span(12, 34))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:cut])
    assert Journal(tmp_path / "blob").missing(Span(12, 34)) == [Span(12, 34)]
    journal.append(Span(5, 99))  # becomes part of that line
    journal.append(Span(200, 300))
    again = Journal(tmp_path / "blob")
    assert again.missing(Span(0, 400)) == [Span(0, 200), Span(300, 400)]


def test_a_line_with_another_check_sum_is_no_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "blob")
    journal.path.write_text(f"1 2 {crc32(b'1 3'):08x}\nnonsense\n\n1 2 3 4\n")
    assert journal.missing(Span(1, 2)) == [Span(1, 2)]


@pytest.mark.parametrize("is_large", [True, False])
def test_a_whole_file_is_checked_by_its_hash(tmp_path: Path, is_large: bool) -> None:
    data = b"weights" * 999
    etag = hashlib.sha256(data).hexdigest()
    if not is_large:
        etag = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    with closing(SparseFile(tmp_path / etag, len(data), etag)) as blob:
        blob.write(0, data[:-1] + b"?")
        blob.commit(Span(0, len(data) - 1))
        blob.verify()  # a part has no hash
        blob.commit(Span(len(data) - 1, len(data)))
        with pytest.raises(HubError, match=f"the hub says {etag}"):
            blob.verify()
        assert blob.missing([Span(0, len(data))]) == [Span(0, len(data))]
        blob.write(0, data)
        blob.commit(Span(0, len(data)))
        blob.verify()
        assert not Journal(blob.path).is_verified  # nothing read yet
    journal = Journal(tmp_path / etag)
    assert journal.missing(Span(0, len(data))) == [] and journal.is_verified


def test_a_journal_without_its_file_says_nothing(tmp_path: Path) -> None:
    with closing(_blob(tmp_path, bytes(100))) as blob:
        blob.commit(Span(0, 100))
    blob.path.unlink()
    with closing(_blob(tmp_path, bytes(100))) as blob:
        assert blob.missing([Span(0, 100)]) == [Span(0, 100)]


def test_a_range_is_fetched_by_one_process(tmp_path: Path) -> None:
    """And is free again when that process ends, however it ends."""
    with closing(_blob(tmp_path, bytes(100))) as blob:
        with locked_elsewhere(blob.path, Span(10, 20)):
            assert not blob.lock(Span(0, 11))
            assert not blob.lock(Span(19, 30))
            assert blob.lock(Span(0, 10))
            assert blob.lock(Span(20, 30))
        assert blob.lock(Span(10, 20))
