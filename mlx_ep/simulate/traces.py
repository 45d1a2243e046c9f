"""Requests from JSON lines: single ones, and sessions in which one follows another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ep.simulate.fields import Fields, is_number


@dataclass(frozen=True)
class TraceRequest:
    """One request as a trace has it.

    Attributes:
        input_tokens, output_tokens: how many.
        arrival: ns; of a session's later requests, how long after the end of the one
            before.
        input_ids, output_ids: the tokens, where the trace has them.
        session: what follows it is `next`.
        line: of the trace, from 1.
    """

    input_tokens: int
    output_tokens: int
    arrival: int
    input_ids: tuple[int, ...] | None = None
    output_ids: tuple[int, ...] | None = None
    session: str = ""
    line: int = 0


@dataclass(frozen=True)
class Trace:
    """What is asked, in the order of the file.

    Attributes:
        sessions: requests that follow one another; one request alone is a session of
            one.
    """

    sessions: Sequence[tuple[TraceRequest, ...]]

    @property
    def num_requests(self) -> int:
        return sum(map(len, self.sessions))

    def first(self, count: int) -> Trace:
        """The first so many requests; 0: all."""
        if not count:
            return self
        kept, left = [], count
        for session in self.sessions:
            if left <= 0:
                break
            kept.append(session[:left])
            left -= len(kept[-1])
        return Trace(kept)


def read_trace(
    file: Path, progress: Callable[[int], object] = lambda done: None
) -> Trace:
    """The requests of a file.

    Args:
        progress: is told how many lines are read.

    Raises:
        ValueError: the file cannot be read, has no requests, or which line is wrong.
    """
    sessions: list[tuple[TraceRequest, ...]] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    sessions.append(_session(f"{file}: line {number}", line, number))
                    progress(number)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}.") from error
    if not sessions:
        raise ValueError(f"{file}: must hold at least one request; it is empty.")
    return Trace(sessions)


def _session(where: str, line: str, number: int) -> tuple[TraceRequest, ...]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: must be JSON: {error.msg}.") from error
    fields = Fields(where, "", content)
    if not fields.has("sub_requests"):
        request = _request(fields, "arrival_time_ns", "", number)
        fields.close(("session_id",))
        return (request,)
    session = str(fields.value("session_id"))
    arrival = _time(fields, "arrival_time_ns")
    found: list[TraceRequest] = []
    pause = arrival
    for item in fields.objects("sub_requests"):
        found.append(_request(item, None, session, number, pause))
        pause = _time(item, "tool_duration_ns", 0)
        item.close()
    fields.close()
    return tuple(found)


def _request(
    fields: Fields,
    arrival_key: str | None,
    session: str,
    line: int,
    arrival: int = 0,
) -> TraceRequest:
    if arrival_key is not None:
        arrival = _time(fields, arrival_key)
    inputs = fields.integer("input_toks", least=1)
    outputs = fields.integer("output_toks", least=1)
    return TraceRequest(
        inputs,
        outputs,
        arrival,
        _ids(fields, "input_tok_ids", inputs),
        _ids(fields, "output_tok_ids", outputs),
        session,
        line,
    )


def _time(fields: Fields, key: str, *default: int) -> int:
    """Nanoseconds, whole ones."""
    found: Any = fields.value(key, *default)
    if not is_number(found) or found != found or found < 0 or found == float("inf"):
        raise fields.fail(key, f"must be nanoseconds from 0 on; got {found!r}.")
    return round(found)


def _ids(fields: Fields, key: str, count: int) -> tuple[int, ...] | None:
    found = fields.value(key, None)
    if found is None:
        return None
    if not isinstance(found, list) or not all(
        isinstance(token, int) and not isinstance(token, bool) for token in found
    ):
        raise fields.fail(key, "must be a list of whole numbers.")
    if len(found) != count:
        raise fields.fail(
            key,
            f"must hold as many ids as there are tokens, {count}; got {len(found)}.",
        )
    return tuple(found)
