"""When to ask the hub again, and after how long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from mlx_ep.loading.hub.errors import HubError, first_line

# Too early, too busy, or broken for now; all else is an answer.
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})

_CONNECTIONS = 8

Item = TypeVar("Item")
Returned = TypeVar("Returned")


class StatusError(Exception):
    """An answer with a status that may be another one a moment later."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(f"the server answered {status}")
        self.status, self.retry_after = status, retry_after


class Stopped(Exception):  # noqa: N818, not an error
    """Another connection of this rank has failed for good."""


@dataclass
class Retries:
    """The patience of one rank, shared by its connections.

    Attributes:
        attempts: how often in a row a connection may fail without getting a byte.
        first_wait: seconds after the first failure, twice as many after each further
            one up to `longest_wait`.
        longest_retry_after: a server that asks for a longer pause (seconds) is not
            waited for.
    """

    attempts: int = 8
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_retry_after: float = 600.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _not_before: float = 0.0

    def pause(self) -> None:
        """Return when requests may be made.

        Raises:
            Stopped: another connection of `for_each` failed.
        """
        while (delay := self._not_before - time.monotonic()) > 0:
            if self._stop.wait(delay):
                break
        if self._stop.is_set():
            raise Stopped

    def failed(self, error: Exception, failures: int) -> None:
        """Wait after a failure, or give up.

        Args:
            error: what the connection ended with.
            failures: the how many-th in a row it is, from 1 on.

        Raises:
            HubError: it is not to be tried again.
            Stopped: as `pause`.
        """
        cause = transient_cause(error)
        if cause is None:
            raise error
        delay = min(self.first_wait * 2 ** (failures - 1), self.longest_wait)
        asked = retry_after_seconds(cause)
        if failures >= self.attempts or (asked or 0.0) > self.longest_retry_after:
            wants = "" if asked is None else f" and asks for a pause of {asked:.0f} s"
            raise HubError(
                f"{first_line(cause)}{wants}; given up after {failures} attempts "
                "without a byte. Start again later: what was fetched is kept."
            ) from error
        if asked is not None:  # for all connections: they share one allowance
            self._not_before = max(self._not_before, time.monotonic() + asked)
        elif self._stop.wait(delay):
            raise Stopped
        self.pause()

    def run(self, function: Callable[[], Returned]) -> Returned:
        """What `function` returns, called again where it may help."""
        failures = 0
        while True:
            try:
                return function()
            except (HTTPError, OSError, StatusError) as error:
                failures += 1
                self.failed(error, failures)

    def for_each(
        self, function: Callable[[Item], Returned], items: Iterable[Item]
    ) -> list[Returned]:
        """What `function` returns for every item, several at once.

        Raises:
            Exception: the first that one of them raised, when all have ended.
        """
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                errors = [future.exception() for future in done]
            except BaseException:  # the user's interrupt
                self._end(futures)
                raise
            if any(errors):
                self._end(futures)
        # One that was stopped was stopped because of another.
        ended = [future for future in futures if not future.cancelled()]
        found = [error for f in ended if (error := f.exception()) is not None]
        for error in sorted(found, key=lambda error: isinstance(error, Stopped)):
            raise error
        return [future.result() for future in futures]

    def _end(self, futures: Iterable[Future[Returned]]) -> None:
        self._stop.set()
        for future in futures:
            future.cancel()


def transient_cause(error: BaseException) -> BaseException | None:
    """The error, or what caused it, that may be gone on the next attempt."""
    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        if isinstance(cause, StatusError):
            return cause
        response = getattr(cause, "response", None)
        if response is not None:
            return cause if response.status_code in RETRIED_STATUSES else None
        if isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            return cause
    return None


def retry_after_seconds(error: BaseException) -> float | None:
    """What the Retry-After header of an error's answer asks for: seconds or a date."""
    value = getattr(error, "retry_after", None)
    response = getattr(error, "response", None)
    if response is not None:
        value = response.headers.get("Retry-After")
    if not value:
        return None
    try:
        if value.strip().isdigit():
            return float(value)
        until = parsedate_to_datetime(value) - datetime.now(UTC)
    except (ValueError, TypeError):  # neither, or a date without a time zone
        return None
    return max(until.total_seconds(), 0.0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
