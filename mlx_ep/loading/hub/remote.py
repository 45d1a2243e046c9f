"""A weight file on the hub, read by byte ranges.

The hub answers a request for a large file with a redirect to a storage host, by an
address that is signed and expires. The redirect is looked up once per file and ranges
are asked of the storage host directly. The user's token goes to the hub alone.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import constants, get_hf_file_metadata
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from mlx_ep.loading.hub.errors import HubError
from mlx_ep.loading.hub.ranges import Span
from mlx_ep.loading.hub.retries import RETRIED_STATUSES, Retries, StatusError

_MOST_REDIRECTS = 10
_EXPIRED_STATUSES = frozenset({401, 403, 404, 410})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RemoteFile:
    """One file of one commit.

    Args:
        url: where the hub has it.
        size: its bytes, as the hub's listing says.
        etag: its hash, likewise.
        retries: shared by all files of a rank.
    """

    def __init__(self, url: str, size: int, etag: str, retries: Retries) -> None:
        self.url, self.size, self.etag = url, size, etag
        self._retries = retries
        self._mutex = threading.Lock()
        self._location: str | None = None
        self._storage_etag: str | None = None

    def read(self, span: Span, write: Callable[[int, bytes], None]) -> None:
        """Hand every byte of `span` to ``write(offset, data)``, in order, once.

        A connection that is cut is taken up where it ended.

        Raises:
            HubError: the file changed, the server cannot serve ranges, or it failed
                too often.
        """
        position, failures = span.start, 0

        def received(data: bytes) -> None:
            nonlocal position, failures
            if position + len(data) > span.stop:
                raise HubError(f"{self.url}: the server sent more bytes than asked.")
            write(position, data)
            position, failures = position + len(data), 0

        while position < span.stop:
            self._retries.pause()
            location = self._locate()
            try:
                self._request(location, Span(position, span.stop), received)
                if position < span.stop:
                    raise ConnectionError("the server ended the answer too early")
            except (HTTPError, ConnectionError, StatusError) as error:
                failures += 1
                if getattr(error, "status", None) in _EXPIRED_STATUSES:
                    self._forget(location)
                self._retries.failed(error, failures)

    def _locate(self) -> str:
        """The address that serves the bytes."""
        with self._mutex:
            if self._location is None:
                self._location = self._retries.run(self._look_up)
            return self._location

    def _look_up(self) -> str:
        found = get_hf_file_metadata(self.url)
        if (found.etag, found.size) != (self.etag, self.size):
            raise HubError(
                f"{self.url} changed on the server: its listing said {self.size} bytes "
                f"with hash {self.etag}, now it has {found.size} bytes with hash "
                f"{found.etag}. Start again."
            )
        return urljoin(self.url, found.location)

    def _forget(self, location: str) -> None:
        with self._mutex:
            if self._location == location:
                self._location = None

    def _request(
        self, location: str, span: Span, received: Callable[[bytes], None]
    ) -> None:
        for _ in range(_MOST_REDIRECTS):
            with get_session().stream(
                "GET",
                location,
                headers=_headers(location, span),
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                # Each redirect is looked at: whether the token may go there.
                follow_redirects=False,
            ) as response:
                if response.has_redirect_location:
                    location = urljoin(location, response.headers["Location"])
                    continue
                self._check(location, span, response)
                for data in response.iter_raw():
                    self._retries.pause()
                    received(data)
            return
        raise HubError(f"{self.url}: more than {_MOST_REDIRECTS} redirects.")

    def _check(self, location: str, span: Span, response: Any) -> None:
        """Whether an answer is the one that was asked for.

        Raises:
            StatusError: it may be, next time.
            HubError: it will not.
        """
        status = response.status_code
        was_redirected = location != self.url
        if status in RETRIED_STATUSES or (
            status in _EXPIRED_STATUSES and was_redirected
        ):
            raise StatusError(status, response.headers.get("Retry-After"))
        if status == 200:
            raise HubError(
                f"{_host(location)} does not serve byte ranges (it answered 200 "
                "instead of 206). Use --download full, which fetches whole files."
            )
        if status == 416:
            raise HubError(f"{self.url} is shorter than the {self.size} bytes it had.")
        if status != 206:
            hf_raise_for_status(response)
            raise HubError(f"{self.url}: the server answered {status}.")
        self._check_range(span, response)

    def _check_range(self, span: Span, response: Any) -> None:
        header = response.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(header)
        asked = (span.start, span.stop - 1, self.size)
        if found is None or tuple(map(int, found.groups())) != asked:
            raise HubError(
                f"{self.url}: asked for bytes {asked[0]}-{asked[1]} of {self.size}, "
                f"the server answered {header!r}. The file changed or the server is "
                "wrong: start again, or use --download full."
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(f"{self.url}: the server compressed a byte range.")
        etag = response.headers.get("ETag")
        with self._mutex:
            if etag is not None and self._storage_etag not in (None, etag):
                raise HubError(
                    f"{self.url} changed on the server while it was fetched: its ETag "
                    f"was {self._storage_etag}, now it is {etag}. Start again, or use "
                    "--download full."
                )
            self._storage_etag = self._storage_etag or etag


def _headers(location: str, span: Span) -> dict[str, str]:
    is_hub = _origin(location) == _origin(constants.ENDPOINT)
    # token=False: no token, not even the one that is stored on this machine.
    headers = build_hf_headers(token=None if is_hub else False, library_name="mlx_ep")
    return headers | {
        "Range": f"bytes={span.start}-{span.stop - 1}",
        "Accept-Encoding": "identity",
    }


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname or "", port


def _host(url: str) -> str:
    return urlsplit(url).netloc
