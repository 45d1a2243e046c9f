"""A small hub on this machine, with what can go wrong, that counts what it sends.

Two ports, as there are two hosts behind a real hub: the hub itself, which knows
repositories and checks tokens, and a storage host (CDN), which serves large files to
whoever has a signed address. The routes are those that huggingface_hub and mlx_ep use:

    GET       hub   /api/models/OWNER/NAME[/revision/REVISION]
    GET       hub   /api/models/OWNER/NAME/tree/COMMIT
    HEAD GET  hub   /OWNER/NAME/resolve/REVISION/FILE     large files: 302 to the CDN
    HEAD GET  cdn   /OWNER/NAME/FILE?for=TOKEN&signature=N

A little over 400 lines, because both hosts count in one record.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import _cache_assets

_CHUNK = 16 << 10


@dataclass(frozen=True)
class Request:
    """A request as it came in.

    Attributes:
        port: ``hub`` or ``cdn``.
        byte_range: first and last byte of a Range header.
        token: of an Authorization header, on whichever port.
        signed_for: the token that a signed address of the CDN was made for.
    """

    port: str
    method: str
    path: str
    byte_range: tuple[int, int] | None
    token: str | None
    signed_for: str | None


@dataclass
class Faults:
    """What goes wrong, on the requests for ranges of large files.

    Attributes:
        only_for: the token whose holder has the trouble; None: everyone.
        min_bytes: of a range; shorter ones, such as headers, are served well.
        after_bytes: of all bodies together; until then all is well.
        answers: statuses and Retry-After headers of the next answers, instead of data.
        cuts: how many of the next answers are cut, each after `cut_after` bytes.
        ignores_ranges: the CDN sends the whole file with status 200.
        changes_etag: every answer of the CDN has another ETag.
        wrong_total: added to the file's size in Content-Range.
        seconds_per_chunk: how slow the CDN is, per 16 KiB.
    """

    only_for: str | None = None
    min_bytes: int = 0
    after_bytes: int = 0
    answers: list[tuple[int, str | None]] = field(default_factory=list)
    cuts: int = 0
    cut_after: int = 0
    ignores_ranges: bool = False
    changes_etag: bool = False
    wrong_total: int = 0
    seconds_per_chunk: float = 0.0

    def concern(self, request: Request, bytes_sent: int) -> bool:
        """Whether a request has trouble, when so many bytes were sent before."""
        first, last = request.byte_range or (0, self.min_bytes)
        return (
            request.port == "cdn"
            and bytes_sent >= self.after_bytes
            and self.only_for in (None, request.signed_for)
            and last + 1 - first >= self.min_bytes
        )


@dataclass
class Repository:
    """A repository with one commit, made of the files of a folder.

    Attributes:
        token: what a request must bring; None: anyone may read it.
        is_gated: files are for nobody, though everybody sees their list.
        large: the end of the names of files that are in large file storage.
    """

    folder: Path
    token: str | None = None
    is_gated: bool = False
    large: str = ".safetensors"
    commit: str = ""

    def __post_init__(self) -> None:
        digest = hashlib.sha1(usedforsecurity=False)
        for name in self.names():
            digest.update(f"{name} {self.etag(name)}\n".encode())
        self.commit = self.commit or digest.hexdigest()

    def names(self) -> list[str]:
        return sorted(file.name for file in self.folder.iterdir() if file.is_file())

    def is_large(self, name: str) -> bool:
        return name.endswith(self.large)

    def etag(self, name: str) -> str:
        """SHA-256 of a large file, the git blob's SHA-1 of another."""
        data = (self.folder / name).read_bytes()
        if self.is_large(name):
            return hashlib.sha256(data).hexdigest()
        prefix = f"blob {len(data)}\0".encode()
        return hashlib.sha1(prefix + data, usedforsecurity=False).hexdigest()


class HubServer:
    """Serves repositories until the end of a ``with`` block.

    Attributes:
        endpoint: for HF_ENDPOINT.
        requests: all that came in about repositories.
        other_requests: such as what huggingface_hub asks about the hub itself.
        sent: bytes of bodies, by (token, OWNER/NAME/FILE); for the CDN the token that
            its address was signed for. "" stands for none.
        faults: may be changed at any time.
        signature: signed addresses with another number than this have expired.
    """

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        self.repositories = dict(repositories)
        self.requests: list[Request] = []
        self.other_requests: list[Request] = []
        self.sent: Counter[tuple[str, str]] = Counter()
        self.faults = Faults()
        self.signature = 0
        self.lock = threading.Lock()
        self._servers = {port: _serve(self, port) for port in ("hub", "cdn")}

    def __enter__(self) -> HubServer:
        for server in self._servers.values():
            threading.Thread(
                target=server.serve_forever, args=(0.02,), daemon=True
            ).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return self.address("hub")

    def address(self, port: str) -> str:
        return f"http://127.0.0.1:{self._servers[port].server_address[1]}"

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.requests.clear()
            self.other_requests.clear()
            self.sent.clear()

    def bytes_of(self, token: str, suffix: str = ".safetensors") -> int:
        """Bytes sent to the holder of a token, of files whose names end so."""
        with self.lock:
            return sum(
                count
                for (holder, name), count in self.sent.items()
                if holder == token and name.endswith(suffix)
            )


def use_cache(folder: Path) -> None:
    """Let huggingface_hub and mlx_ep keep in `folder` what they fetch, from now on.

    As HF_HOME does it for a process that has not imported them yet.
    """
    constants.HF_HUB_CACHE = str(folder / "hub")
    constants.HF_ASSETS_CACHE = str(folder / "assets")
    _cache_assets.HF_ASSETS_CACHE = constants.HF_ASSETS_CACHE


_LOCK = """
import fcntl, os, sys
path, count, start = sys.argv[1:]
file = os.open(path, os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX, int(count), int(start))
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked_elsewhere(blob: Path, span: tuple[int, int]) -> Iterator[None]:
    """Another process is fetching a range of a sparse file; at the end it is killed."""
    start, stop = span
    command = [sys.executable, "-c", _LOCK, f"{blob}.lock", str(stop - start)]
    with subprocess.Popen(
        [*command, str(start)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield
        process.kill()


def _serve(hub: HubServer, port: str) -> ThreadingHTTPServer:
    class Handler(_Handler):
        server_hub, server_port = hub, port

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer
    server_port: str

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        hub, parts = self.server_hub, urlsplit(self.path)
        query = parse_qs(parts.query)
        request = Request(
            self.server_port,
            self.command,
            unquote(parts.path),
            self._range(),
            (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None,
            query.get("for", [None])[0],
        )
        is_other = request.path.startswith("/api/agent-harnesses")
        with hub.lock:
            (hub.other_requests if is_other else hub.requests).append(request)
        if self.server_port == "cdn":
            self._cdn(request, int(query["signature"][0]))
        elif found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", request.path
        ):
            self._api(request, *found.groups())
        elif found := re.fullmatch(
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path
        ):
            self._resolve(request, *found.groups())
        else:
            self._answer(404)

    def _range(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        return (int(found[1]), int(found[2])) if found else None

    def _repository(self, name: str, revision: str, token: str | None) -> Any:
        """The repository, or None after an answer that says why not."""
        repository = self.server_hub.repositories.get(name)
        if repository is None or repository.token not in (None, token):
            self._answer(401, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in ("main", repository.commit):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository

    def _api(self, request: Request, name: str, what: str, revision: str) -> None:
        repository = self._repository(name, revision or "main", request.token)
        if repository is None:
            return
        if what != "tree":
            info = {"id": name, "sha": repository.commit, "siblings": []}
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(info))
            return
        entries = []
        for file in repository.names():
            size = (repository.folder / file).stat().st_size
            entry = {"type": "file", "path": file, "size": size, "oid": "0" * 40}
            if repository.is_large(file):
                oid = repository.etag(file)
                entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
            else:
                entry["oid"] = repository.etag(file)
            entries.append(entry)
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(entries))

    def _resolve(self, request: Request, name: str, revision: str, file: str) -> None:
        repository = self._repository(name, revision, request.token)
        if repository is None:
            return
        if repository.is_gated:
            self._answer(403, {"X-Error-Code": "GatedRepo"})
            return
        if file not in repository.names():
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": repository.commit}
        if not repository.is_large(file):
            self._send_file(request, name, file, headers)
            return
        hub, size = self.server_hub, (repository.folder / file).stat().st_size
        signed = f"for={quote(request.token or '')}&signature={hub.signature}"
        self._answer(
            302,
            headers
            | {
                "X-Linked-Size": str(size),
                "X-Linked-Etag": f'"{repository.etag(file)}"',
                "Location": f"{hub.address('cdn')}/{name}/{quote(file)}?{signed}",
            },
        )

    def _cdn(self, request: Request, signature: int) -> None:
        hub = self.server_hub
        if signature != hub.signature:
            self._answer(403)
            return
        with hub.lock:
            has_trouble = hub.faults.concern(request, hub.sent.total())
            has_answer = has_trouble and hub.faults.answers
            answer = hub.faults.answers.pop(0) if has_answer else None
        if answer is not None:
            status, retry_after = answer
            self._answer(status, {"Retry-After": retry_after} if retry_after else {})
            return
        name, _, file = request.path[1:].rpartition("/")
        self._send_file(request, name, file, {})

    def _send_file(
        self, request: Request, name: str, file: str, headers: Mapping[str, str]
    ) -> None:
        hub, repository = self.server_hub, self.server_hub.repositories[name]
        data = (repository.folder / file).read_bytes()
        # A storage host has ETags of its own.
        etag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        if not repository.is_large(file):
            etag = repository.etag(file)
        with hub.lock:
            has_trouble = hub.faults.concern(request, hub.sent.total())
        faults = hub.faults if has_trouble else Faults()
        if faults.changes_etag:
            etag = f"{len(hub.requests)}"
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **headers}
        status, body = 200, data
        if request.byte_range and not faults.ignores_ranges:
            first, last = request.byte_range
            total = len(data) + faults.wrong_total
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
            status, body = 206, data[first : last + 1]
        self._start(status, headers, len(body))
        if self.command == "HEAD":
            return
        end = len(body)
        with hub.lock:
            if faults.cuts > 0:
                faults.cuts -= 1
                end = min(end, faults.cut_after)
        self._send_body(request, f"{name}/{file}", body[:end])
        if end < len(body):
            self.close_connection = True

    def _send_body(self, request: Request, name: str, body: bytes) -> None:
        holder = request.signed_for or request.token or ""
        for start in range(0, len(body), _CHUNK):
            chunk = body[start : start + _CHUNK]
            with self.server_hub.lock:
                self.server_hub.sent[holder, name] += len(chunk)
            if request.port == "cdn":
                time.sleep(self.server_hub.faults.seconds_per_chunk)
            try:
                self.wfile.write(chunk)
            except OSError:  # the client went away
                self.close_connection = True
                return

    def _answer(
        self, status: int, headers: Mapping[str, str] = {}, body: str = ""
    ) -> None:
        self._start(status, headers, len(body))
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def _start(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
