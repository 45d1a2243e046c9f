"""An engine that says given texts: what the server's HTTP side is tested with.

Its tokens come from a thread of its own, a step at a time, one for each request, as the
real engine's do. It keeps what it was given and what was cancelled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llguidance import LLMatcher, LLTokenizer

from mlx_ep.server.requests import (
    EngineState,
    QueueFull,
    RankState,
    Request,
    Stopping,
    Token,
)
from tests.support.waiting import until

_CLOSING = (b"}", b"]", b'"', b":", b",")


@dataclass
class _Running:
    request: Request
    deliver: Callable[[Token], None]
    answer: Sequence[int]
    matcher: LLMatcher | None
    said: list[int] = field(default_factory=list)


class TextEngine:
    """See `mlx_ep.server.requests.Engine`.

    Args:
        answer_of: the ids that a request gets, its end token included or not.
        library: needed for requests with a grammar: of the tokens that it allows the
            first is drawn.
        places: requests at once; `queue` more may wait.
        step_seconds: between two tokens.
        held: it takes requests in, but says nothing until `go`.
    """

    def __init__(
        self,
        answer_of: Callable[[Request], Sequence[int]],
        ends: Sequence[int],
        library: LLTokenizer | None = None,
        *,
        context: int = 4096,
        places: int = 64,
        queue: int = 64,
        step_seconds: float = 0.0,
        held: bool = False,
    ) -> None:
        self.context = context
        self.step_seconds = step_seconds
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.expected: list[int] = []
        self.failed = ""
        self._answer_of, self._ends, self._library = answer_of, set(ends), library
        self._places, self._queue = places, queue
        self._lock = threading.Condition()
        self._running: dict[str, _Running] = {}
        self._waiting: list[_Running] = []
        self._steps = self._generated = self._prompted = 0
        self._is_draining = self._is_stopped = False
        self._is_held = held
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Token], None]) -> None:
        matcher = None
        if request.grammar is not None:
            assert self._library is not None
            matcher = LLMatcher(self._library, request.grammar)
            assert not matcher.is_error(), matcher.get_error()
        with self._lock:
            if self.failed or self._is_draining:
                raise Stopping(self.failed or "the server is ending")
            if len(self._waiting) >= self._queue:
                raise QueueFull(7)
            self.requests.append(request)
            answer = self._answer_of(request)
            self._waiting.append(_Running(request, deliver, answer, matcher))
            self._lock.notify()

    def expect(self, count: int) -> None:
        self.expected.append(count)

    def cancel(self, request: str) -> None:
        with self._lock:
            known = [w.request.id for w in self._waiting]
            if request in self._running or request in known:
                self.cancelled.append(request)
            self._running.pop(request, None)
            self._waiting = [w for w in self._waiting if w.request.id != request]
            self._lock.notify()

    def state(self) -> EngineState:
        with self._lock:
            active = len(self._running)
            ranks = tuple(
                RankState(rank, 2**30 + rank * 2**28, active * 2**20, 2**28, active)
                for rank in range(2)
            )
            return EngineState(
                running=active,
                waiting=len(self._waiting),
                steps=self._steps,
                tokens=(self._prompted, self._generated),
                cache_hits=0,
                cache_bytes=2**20,
                cache_limit=2**24,
                attention="replicated",
                ranks=ranks,
                experts=((3.0, 5.0), (6.0, 2.0), (4.0, 4.0)),
                failed=self.failed,
                draining=self._is_draining,
            )

    def drain(self) -> None:
        with self._lock:
            self._is_draining = True

    def record(self, action: Literal["start", "stop", "dump"]) -> dict[str, object]:
        return {"action": action}

    def fail(self, reason: str) -> None:
        """As when a rank dies: every open request ends with the reason."""
        with self._lock:
            self.failed = reason
            ended = [*self._running.values(), *self._waiting]
            self._running, self._waiting = {}, []
        for one in ended:
            event = Token(one.request.id, None, finish_reason="error", message=reason)
            one.deliver(event)

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            self._lock.notify()
        self._thread.join()

    def go(self) -> None:
        """Say what was held."""
        with self._lock:
            self._is_held = False
            self._lock.notify()

    def wait_until_idle(self) -> None:
        """Nothing runs or waits."""

        def is_idle() -> bool:
            state = self.state()
            return not (state.running or state.waiting)

        until(is_idle, self.state)

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._take_in()
                while not self._is_stopped and (self._is_held or not self._running):
                    self._lock.wait()
                    self._take_in()
                if self._is_stopped:
                    return
                self._steps += 1
                running = list(self._running.values())
                events = [(one, self._next(one)) for one in running]
                for one, event in events:
                    if event.finish_reason is not None:
                        del self._running[one.request.id]
            for one, event in events:
                one.deliver(event)
            time.sleep(self.step_seconds)

    def _take_in(self) -> None:
        while self._waiting and len(self._running) < self._places:
            one = self._waiting.pop(0)
            self._prompted += len(one.request.tokens)
            self._running[one.request.id] = one

    def _next(self, one: _Running) -> Token:
        request, count = one.request, len(one.said)
        token = self._allowed(one) if one.matcher else one.answer[count]
        one.said.append(token)
        self._generated += 1
        said = tuple(one.said)
        finish: Literal["stop", "length"] | None = None
        if token in self._ends or any(
            said[-len(stop) :] == stop for stop in request.stop
        ):
            finish = "stop"
        elif len(said) == request.max_tokens or (
            one.matcher is None and len(said) == len(one.answer)
        ):
            finish = "length"
        sampling = request.sampling
        top = ((token, -0.5), (5, -1.5))[: sampling.top_logprobs]
        return Token(
            request.id,
            token,
            logprob=-0.5 if sampling.logprobs else None,
            top_logprobs=top,
            cached=1 if len(said) == 1 else 0,
            finish_reason=finish,
        )

    def _allowed(self, one: _Running) -> int:
        """The last token that the grammar allows; the end where it may end."""
        assert one.matcher is not None and self._library is not None
        if one.matcher.is_accepting():
            return min(self._ends)
        bits = one.matcher.compute_bitmask()
        allowed = [
            token
            for token in range(self._library.vocab_size)
            if bits[token // 8] >> (token % 8) & 1
        ]
        # What closes something first, so that every text ends.
        closing = [t for t in allowed if self._library.decode_bytes([t]) in _CLOSING]
        token = (closing or allowed)[-1]
        assert one.matcher.consume_token(token)
        return token
