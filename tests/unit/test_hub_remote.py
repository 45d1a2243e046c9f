"""Reading byte ranges from a hub that redirects, refuses, cuts and changes."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_ep.loading.hub.errors import HubError, explained
from mlx_ep.loading.hub.ranges import Span
from mlx_ep.loading.hub.remote import RemoteFile
from mlx_ep.loading.hub.retries import (
    Retries,
    StatusError,
    Stopped,
    retry_after_seconds,
    transient_cause,
)
from tests.support.hub_server import HubServer, Repository

NAME = "model.safetensors"
DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    (tmp_path / NAME).write_bytes(DATA)
    (tmp_path / "small.bin").write_bytes(DATA)
    with HubServer({"me/model": Repository(tmp_path, token="hf_secret")}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def _remote(hub: HubServer, name: str = NAME, attempts: int = 3) -> RemoteFile:
    repository = hub.repositories["me/model"]
    return RemoteFile(
        f"{hub.endpoint}/me/model/resolve/{repository.commit}/{name}",
        len(DATA),
        repository.etag(name),
        Retries(attempts, first_wait=0.01),
    )


def _read(remote: RemoteFile, start: int, stop: int) -> bytes:
    """The bytes, in the order in which they must come."""
    found = bytearray()

    def write(offset: int, data: bytes) -> None:
        assert offset == start + len(found)
        found.extend(data)

    remote.read(Span(start, stop), write)
    return bytes(found)


@pytest.mark.parametrize("name", [NAME, "small.bin"])
def test_ranges_are_read(hub: HubServer, name: str) -> None:
    """From the storage host, and from the hub where it does not redirect."""
    remote = _remote(hub, name)
    for start, stop in ((0, 8), (8, 70_000), (len(DATA) - 1, len(DATA))):
        assert _read(remote, start, stop) == DATA[start:stop]
    port = "cdn" if name == NAME else "hub"
    assert [r.port for r in hub.requests] == ["hub", port, port, port]
    assert sum(hub.sent.values()) == 8 + 70_000 - 8 + 1


def test_the_token_goes_to_the_hub_alone(hub: HubServer) -> None:
    _read(_remote(hub), 0, 100)
    _read(_remote(hub, "small.bin"), 0, 100)
    assert {r.token for r in hub.requests if r.port == "hub"} == {"hf_secret"}
    assert [r.token for r in hub.requests if r.port == "cdn"] == [None]


def test_a_cut_answer_is_taken_up_where_it_ended(hub: HubServer) -> None:
    hub.faults.cuts, hub.faults.cut_after = 5, 40_000
    assert _read(_remote(hub), 1000, len(DATA)) == DATA[1000:]
    asked = [r.byte_range for r in hub.requests if r.byte_range]
    assert asked == [(1000 + 40_000 * i, len(DATA) - 1) for i in range(6)]
    assert sum(hub.sent.values()) == len(DATA) - 1000  # no byte twice


def test_a_server_that_only_cuts_is_given_up(hub: HubServer) -> None:
    hub.faults.cuts = 99
    with pytest.raises(HubError, match="given up after 3 attempts without a byte"):
        _read(_remote(hub), 0, 100)
    assert len([r for r in hub.requests if r.port == "cdn"]) == 3


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(hub: HubServer, status: int) -> None:
    hub.faults.answers = [(status, None)] * 2
    assert _read(_remote(hub), 0, 100) == DATA[:100]


def test_retry_after_is_waited_for(hub: HubServer) -> None:
    hub.faults.answers = [(429, "1")]
    start = time.monotonic()
    assert _read(_remote(hub), 0, 100) == DATA[:100]
    assert time.monotonic() - start >= 1


def test_a_pause_that_is_too_long_is_an_error(hub: HubServer) -> None:
    hub.faults.answers = [(429, "86400")]
    with pytest.raises(HubError, match="answered 429 and asks for a pause of 86400 s"):
        _read(_remote(hub), 0, 100)


def test_retry_after_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 80 < (retry_after_seconds(StatusError(429, date)) or 0) <= 90
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=90), usegmt=True)
    assert retry_after_seconds(StatusError(429, past)) == 0
    assert retry_after_seconds(StatusError(429, "soon")) is None
    assert retry_after_seconds(StatusError(429, None)) is None
    response = SimpleNamespace(headers={"Retry-After": "7"}, status_code=429)
    error = OSError()
    error.response = response  # type: ignore[attr-defined]
    assert retry_after_seconds(error) == 7


def test_an_expired_address_is_looked_up_again(hub: HubServer) -> None:
    remote = _remote(hub)
    _read(remote, 0, 8)
    hub.signature += 1
    assert _read(remote, 8, 100) == DATA[8:100]
    ports = [request.port for request in hub.requests]
    assert ports == ["hub", "cdn", "cdn", "hub", "cdn"]


def test_a_server_without_ranges_is_refused(hub: HubServer) -> None:
    hub.faults.ignores_ranges = True
    with pytest.raises(HubError, match=r"does not serve byte ranges.*--download full"):
        _read(_remote(hub), 0, 100)


def test_a_file_that_changed_is_noticed(hub: HubServer, tmp_path: Path) -> None:
    """By the hub's hash, by the storage's ETag, and by the size."""
    changed = _remote(hub)
    _read(changed, 0, 8)
    hub.faults.changes_etag = True
    with pytest.raises(HubError, match=r"changed on the server while.*its ETag was"):
        _read(changed, 8, 100)
    hub.faults.changes_etag = False
    hub.faults.wrong_total = 1
    with pytest.raises(HubError, match=r"asked for bytes 8-99 of 300000.*300001"):
        _read(_remote(hub), 8, 100)
    hub.faults.wrong_total = 0
    before = _remote(hub)
    (tmp_path / NAME).write_bytes(DATA[::-1])
    with pytest.raises(HubError, match=r"changed on the server: its listing said"):
        _read(before, 0, 8)


def test_errors_say_what_to_do(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    with (
        pytest.raises(HubError, match=r"me/model: there is no such repository at http"),
        explained("me/model"),
    ):
        _read(_remote(hub), 0, 8)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.repositories["me/model"].is_gated = True
    page = re.escape(f"Open {hub.endpoint}/me/model in a browser")
    with (
        pytest.raises(HubError, match=rf"gated. {page}.*hf auth login"),
        explained("me/model"),
    ):
        _read(_remote(hub), 0, 8)
    with pytest.raises(HubError, match="the disk is full"), explained("me/model"):
        raise OSError(28, "No space left on device")


def test_one_failure_ends_all_connections() -> None:
    retries = Retries(first_wait=3600.0, longest_wait=3600.0)
    started: list[int] = []

    def work(item: int) -> None:
        started.append(item)
        if item == 3:
            raise HubError("the reason")
        retries.failed(ConnectionError("cut"), 1)  # would wait for an hour

    with pytest.raises(HubError, match="the reason"):
        retries.for_each(work, range(1000))
    assert len(started) < 1000
    with pytest.raises(Stopped):
        retries.pause()


def test_what_is_not_transient_is_not_tried_again() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise FileNotFoundError("no")

    with pytest.raises(FileNotFoundError):
        Retries(first_wait=0.01).run(fail)
    assert len(calls) == 1
    wrapped = FileNotFoundError("not in the cache")
    wrapped.__cause__ = ConnectionError("refused")
    assert transient_cause(wrapped) is wrapped.__cause__
