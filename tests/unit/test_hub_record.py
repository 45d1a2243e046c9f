"""A record of a hub folder counts where mlx_ep made it, and only as it makes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing

import pytest
from huggingface_hub import constants

from mlx_ep.loading.hub import sparse
from mlx_ep.loading.hub.ranges import Span
from mlx_ep.loading.hub.repository import HubFolder, _link_files
from mlx_ep.loading.hub.sparse import Journal, SparseFile

COMMIT, ETAG = "c" * 40, "e" * 64
FILE = {"name": "model.safetensors", "size": 100, "etag": ETAG}
RECORD = {"repository": "owner/name", "commit": COMMIT, "files": [FILE]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A commit's folder inside of our own assets."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    path = tmp_path / "assets/mlx_ep/owner--name/ranges/commits" / COMMIT
    path.mkdir(parents=True)
    return path


def write(folder, record):
    (folder / "mlx_ep_hub.json").write_text(json.dumps(record))


def test_record(folder):
    write(folder, RECORD)
    found = HubFolder.of(folder)
    assert found is not None
    assert [file.etag for file in found.files] == [ETAG]
    assert found.blob(found.files[0]) == folder.parent.parent / "blobs" / ETAG


def test_record_elsewhere_is_not_read(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for place in (tmp_path / "model", folder / "nested", folder.parent.parent):
        place.mkdir(exist_ok=True)
        write(place, RECORD | {"files": [FILE | {"etag": str(victim)}]})
        assert HubFolder.of(place) is None
    linked = tmp_path / "linked"  # a link to a folder that is not ours
    linked.symlink_to(tmp_path / "model")
    assert HubFolder.of(linked) is None


BAD_FILES = {
    "etag": ["/tmp/victim", "../../victim", "", "E" * 64, ETAG + "\n", None, 7, [ETAG]],
    "name": [
        "../model.safetensors",
        "/tmp/model.safetensors",
        "model/../x.safetensors",
        "model.safetensors/..",
        "other.bin",
        "model\0.safetensors",
        "model.safetensors\n",
        None,
        3,
    ],
    "size": [-1, 1 << 60, 1.5, True, "100", None, [1]],
}
BAD_RECORDS = {
    "repository": ["owner", "../../x", "owner/other", "/abs/path", None, 1, ["a/b"]],
    "commit": ["d" * 40, "../x", "", None, 1],
    "files": [None, {}, [], "x", [None], [[]], [{}], [FILE, FILE], [FILE | {"x": 1}]],
}
CASES = [
    *[(RECORD | {key: value}) for key in BAD_RECORDS for value in BAD_RECORDS[key]],
    *[
        RECORD | {"files": [FILE | {key: value}]}
        for key in BAD_FILES
        for value in BAD_FILES[key]
    ],
    *[{k: v for k, v in RECORD.items() if k != key} for key in RECORD],
    RECORD | {"more": 1},
    [],
    None,
]


@pytest.mark.parametrize("record", CASES, ids=lambda r: json.dumps(r)[:60])
def test_every_field_is_checked(folder, record):
    write(folder, record)
    with pytest.raises(ValueError, match="is not what mlx_ep writes") as error:
        HubFolder.of(folder)
    assert len(str(error.value)) < 800


def test_record_that_is_a_link(folder, tmp_path):
    write(tmp_path, RECORD)
    (folder / "mlx_ep_hub.json").symlink_to(tmp_path / "mlx_ep_hub.json")
    with pytest.raises(ValueError, match="regular file"):
        HubFolder.of(folder)


def test_a_snapshots_record_is_not_linked(folder, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    write(snapshot, RECORD)
    (snapshot / "config.json").write_text("{}")
    write(folder, RECORD)
    found = HubFolder.of(folder)
    (folder / "mlx_ep_hub.json").unlink()
    _link_files(snapshot, found)
    assert (folder / "config.json").is_symlink()
    assert not (folder / "mlx_ep_hub.json").exists()


def test_blobs_are_no_links(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("blob", "blob.lock", "blob.ranges"):
        link = tmp_path / name
        link.symlink_to(victim)
        with (
            pytest.raises(OSError, match="symbolic links"),
            closing(SparseFile(tmp_path / "blob", 4, ETAG)) as file,
        ):
            file.write(0, b"abcd")
            file.commit(Span(0, 4))
        link.unlink()
        for made in tmp_path.glob("blob*"):
            made.unlink()
    assert victim.read_text() == "precious"


def test_lines_that_no_journal_has(tmp_path):
    journal = Journal(tmp_path / "blob")
    journal.append(Span(0, 4))
    for text in ("x y", "1", "-5 3", "9" * 30 + " 1", "verified now", ""):
        journal._append(text)
    assert journal.missing(Span(0, 8)) == [Span(4, 8)]


HOLD = """
import sys, time
from pathlib import Path
from mlx_ep.loading.hub.sparse import SparseFile
from mlx_ep.loading.hub.ranges import Span
file = SparseFile(Path(sys.argv[1]), 100, "e" * 64)
assert file.lock(Span(0, 10))
print("locked", flush=True)
sys.stdin.read()
"""


def test_who_holds_a_lock_is_said(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(sparse.time, "monotonic", lambda: clock[0])
    blob = tmp_path / "blob"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(blob)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ,
    ) as process:
        process.stdout.readline()
        with closing(SparseFile(blob, 100, ETAG)) as file:
            assert file.holder(Span(0, 10)) == process.pid
            assert file.holder(Span(10, 20)) is None
            waiting = sparse.Waiting(file, Span(0, 10))
            waiting.say()
            assert capsys.readouterr().err == ""
            clock[0] = 1.1 * sparse.SECONDS_OF_SILENCE
            waiting.say()
        assert f"process {process.pid}" in capsys.readouterr().err
        process.stdin.close()
