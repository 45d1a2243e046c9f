"""A commit of a hub repository as a model folder whose weight files have holes.

    HF_ASSETS_CACHE/mlx_ep/OWNER--NAME/ranges/
        blobs/ETAG...             weight files by their hash, see `sparse`
        commits/COMMIT/           the model folder
            mlx_ep_hub.json       what `HubFolder` is made from
            config.json ...       links into huggingface_hub's cache
            model-*.safetensors   links to ../../blobs/ETAG

What is not a weight file is huggingface_hub's business, and so is which commit a
revision is. The headers of the weight files are fetched when the folder is made, so
that `mlx_ep.loading.Checkpoint` opens it like any other.
"""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import closing
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm

from mlx_ep.comm import shortened
from mlx_ep.loading.hub.errors import HubError, offline_problem
from mlx_ep.loading.hub.ranges import Span
from mlx_ep.loading.hub.remote import RemoteFile
from mlx_ep.loading.hub.retries import Retries
from mlx_ep.loading.hub.sparse import SparseFile

WEIGHT_FILES = "model*.safetensors"
SMALL_FILES = [
    "*.json",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]

_RECORD = "mlx_ep_hub.json"
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHT_NAME = re.compile(r"model[\w.-]{0,200}\.safetensors")
_MOST_FILE_BYTES = 1 << 44  # 16 TiB; the hub's limit is 200 GB
# The user waits, and nothing has begun: a few seconds, not minutes.
_FIRST_ATTEMPTS = 4


@dataclass(frozen=True)
class WeightFile:
    """A weight file as the hub lists it.

    Attributes:
        size: in bytes.
        etag: its SHA-256, or the SHA-1 of its git blob.
    """

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class HubFolder:
    """A model folder with weight files that have holes.

    Attributes:
        path: the folder.
        files: all weight files.
    """

    path: Path
    repository: str
    commit: str
    files: tuple[WeightFile, ...]

    @classmethod
    def of(cls, path: Path) -> HubFolder | None:
        """What a folder of ours says of itself; None for an ordinary model folder.

        A record counts in the folders that `open_repository` makes, and nowhere else:
        it names files that are written to, and a model folder is not to be trusted.

        Raises:
            ValueError: it says something else than this version writes.
        """
        file = path / _RECORD
        root = _assets_root().resolve()
        folder = path.resolve()
        parts = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
        if len(parts) != 4 or parts[1:3] != ("ranges", "commits"):
            return None
        try:
            if not stat.S_ISREG(file.lstat().st_mode):
                raise ValueError("not a regular file")
            record = json.loads(file.read_text())
            return cls(folder, *_checked_record(record, parts[0], parts[3]))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(
                f"{file} is not what mlx_ep writes ({shortened(str(error), 200)}). "
                "Remove the folder; what was fetched is not in it."
            ) from error

    def blob(self, file: WeightFile) -> Path:
        return self.path.parent.parent / "blobs" / file.etag

    def has_holes(self, file: WeightFile) -> bool:
        """Whether a file is fetched by ranges, and not whole elsewhere."""
        return (self.path / file.name).resolve() == self.blob(file).resolve()

    def open_blob(self, file: WeightFile) -> SparseFile:
        return SparseFile(self.blob(file), file.size, file.etag)

    def remote(self, file: WeightFile, retries: Retries) -> RemoteFile:
        url = hf_hub_url(self.repository, file.name, revision=self.commit)
        return RemoteFile(url, file.size, file.etag, retries)


def _assets_root() -> Path:
    return Path(constants.HF_ASSETS_CACHE) / "mlx_ep"


def _checked_record(
    record: Any, namespace: str, commit: str
) -> tuple[str, str, tuple[WeightFile, ...]]:
    """Repository, commit and files of a record, each as it must be.

    Args:
        namespace: the name of the repository's folder.
        commit: that of the commit's folder.

    Raises:
        ValueError: one of them is not.
    """
    if not isinstance(record, dict) or set(record) != {"repository", "commit", "files"}:
        raise ValueError("it must hold repository, commit and files")
    repository = record["repository"]
    if not (isinstance(repository, str) and _REPOSITORY.fullmatch(repository)):
        raise ValueError("repository must be OWNER/NAME")
    if repository.replace("/", "--") != namespace:
        raise ValueError(f"repository must be that of the folder, {namespace}")
    if record["commit"] != commit or not _COMMIT.fullmatch(commit):
        raise ValueError("commit must be the hash that the folder is called by")
    files = record["files"]
    if not isinstance(files, list) or not files:
        raise ValueError("files must be a list")
    found = []
    for entry in files:
        if not isinstance(entry, dict) or set(entry) != {"name", "size", "etag"}:
            raise ValueError("a file must have name, size and etag")
        found.append(checked_file(entry["name"], entry["size"], entry["etag"]))
    if len({file.name for file in found}) < len(found):
        raise ValueError("no file may be named twice")
    return repository, commit, tuple(found)


def checked_file(name: Any, size: Any, etag: Any) -> WeightFile:
    """A weight file, whose name, size and hash become those of files on this disk.

    Raises:
        ValueError: one of them cannot be that of a weight file.
    """
    if not (isinstance(name, str) and _WEIGHT_NAME.fullmatch(name)):
        raise ValueError(
            f"a weight file must be called {WEIGHT_FILES}; got "
            f"{shortened(repr(name), 100)}"
        )
    if type(size) is not int or not 0 <= size <= _MOST_FILE_BYTES:
        raise ValueError(
            f"the size of {name} must be a number of bytes; got "
            f"{shortened(repr(size), 100)}"
        )
    if not (isinstance(etag, str) and _HASH.fullmatch(etag)):
        raise ValueError(
            f"the hash of {name} must be SHA-256 or that of a git blob; got "
            f"{shortened(repr(etag), 100)}"
        )
    return WeightFile(name, size, etag)


def open_repository(repository: str, revision: str | None) -> Path:
    """The model folder of a repository, with headers and without weights.

    It is huggingface_hub's own snapshot if that has all weight files.

    Args:
        repository: ``OWNER/NAME``.
        revision: a branch, tag or commit.

    Raises:
        HubError: a weight file is not in order, or the hub is offline for us.
        OSError, huggingface_hub.errors.HTTPError: what huggingface_hub raises.
    """
    retries = Retries(attempts=_FIRST_ATTEMPTS)
    snapshot = Path(
        retries.run(
            lambda: snapshot_download(
                repository,
                revision=revision,
                allow_patterns=SMALL_FILES,
                tqdm_class=_NoBar,
            )
        )
    )
    if has_all_weights(snapshot):
        return snapshot
    root = cached_assets_path("mlx_ep", namespace=repository, subfolder="ranges")
    path = root / "commits" / snapshot.name
    path.mkdir(parents=True, exist_ok=True)
    folder = HubFolder.of(path)
    if folder is None:
        files = retries.run(lambda: _list_files(repository, snapshot.name))
        folder = HubFolder(path, repository, snapshot.name, files)
    _link_files(snapshot, folder)
    _fetch_headers(folder, retries)
    _write_record(folder)
    return path


def has_all_weights(snapshot: Path) -> bool:
    """Whether a snapshot of huggingface_hub holds every weight file, each whole."""
    names = {file.name for file in snapshot.glob(WEIGHT_FILES)}
    index_file = snapshot / constants.SAFETENSORS_INDEX_FILE
    if index_file.exists():
        try:
            index = json.loads(index_file.read_text())
            return set(index["weight_map"].values()) <= names
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False  # `Checkpoint.open` says what is wrong with it
    numbered = [match for match in map(_NUMBERED.search, names) if match]
    if numbered:
        return len(numbered) == int(numbered[0][2])
    return bool(names)


def _list_files(repository: str, commit: str) -> tuple[WeightFile, ...]:
    if constants.HF_HUB_OFFLINE:
        raise HubError(offline_problem("The weights are"))
    entries = [
        entry
        for entry in HfApi().list_repo_tree(repository, revision=commit)
        if isinstance(entry, RepoFile)
        and fnmatch(entry.path, WEIGHT_FILES)
        and "/" not in entry.path
    ]
    try:
        files = tuple(
            checked_file(
                entry.path,
                entry.size,
                entry.lfs.sha256 if entry.lfs is not None else entry.blob_id,
            )
            for entry in entries
        )
    except ValueError as error:
        raise HubError(f"the hub's listing: {error}. Use --download full.") from error
    if not files:
        raise HubError(
            f"it has no {WEIGHT_FILES}. Use a repository with safetensors files, or "
            "--dummy-weights to run the architecture alone."
        )
    return files


def _link_files(snapshot: Path, folder: HubFolder) -> None:
    """Make the model folder out of links to what is elsewhere."""
    for file in snapshot.rglob("*"):
        # A record is ours to write: what a repository calls so is left out.
        is_other = fnmatch(file.name, WEIGHT_FILES) or file.name == _RECORD
        if not file.is_dir() and not is_other:
            _link(folder.path / file.relative_to(snapshot), file)
    for weights in folder.files:
        whole = snapshot / weights.name
        is_whole = whole.exists() and whole.stat().st_size == weights.size
        _link(
            folder.path / weights.name,
            whole if is_whole else Path("../../blobs") / weights.etag,
        )


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and Path(os.readlink(link)) == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    # Another process may do the same: a link appears whole or not at all.
    temporary = Path(mkdtemp(dir=link.parent)) / "link"
    temporary.symlink_to(target)
    temporary.replace(link)
    temporary.parent.rmdir()


def _write_record(folder: HubFolder) -> None:
    record = {
        "repository": folder.repository,
        "commit": folder.commit,
        "files": [asdict(file) for file in folder.files],
    }
    text = json.dumps(record, indent=1)
    file = folder.path / _RECORD
    if file.is_file() and not file.is_symlink() and file.read_text() == text:
        return
    temporary = Path(mkdtemp(dir=folder.path)) / _RECORD
    temporary.write_text(text)
    temporary.replace(file)
    temporary.parent.rmdir()


def _fetch_headers(folder: HubFolder, retries: Retries) -> None:
    """The length and the header of every weight file that has holes."""

    holed = {file.etag: file for file in folder.files if folder.has_holes(file)}
    retries.for_each(lambda file: _fetch_header(folder, file, retries), holed.values())


def _fetch_header(folder: HubFolder, file: WeightFile, retries: Retries) -> None:
    remote = folder.remote(file, retries)
    prefix = Span(0, min(8, file.size))
    with closing(folder.open_blob(file)) as sparse:
        # Ranks that start at once share a cache: one of them fetches it.
        sparse.lock(prefix, wait=True)

        def read(span: Span) -> None:
            missing = sparse.missing([span])
            if missing and constants.HF_HUB_OFFLINE:
                raise HubError(offline_problem(f"The header of {file.name} is"))
            for part in missing:
                remote.read(part, sparse.write)
                sparse.commit(part)

        read(prefix)
        length = int.from_bytes(sparse.read(prefix), "little")
        if 8 + length > file.size or length > constants.SAFETENSORS_MAX_HEADER_LENGTH:
            raise HubError(
                f"{file.name} is not a safetensors file: it has {file.size} bytes and "
                f"says that its header has {length}."
            )
        read(Span(8, 8 + length))


class _NoBar(tqdm):
    """No bar for small files: every rank would print one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"disable": True}))
