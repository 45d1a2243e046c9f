"""The engine: the loop that every rank runs, and what rank 0's HTTP thread asks of it.

One turn of the loop, on all ranks together:

    rank 0 decides -> one collective: its decision, and the tokens of the last turn
                   -> tokens are delivered, places become free
                   -> requests enter, one chunk of prompts is processed
                   -> every sequence whose prompt is done draws a token

All MLX work and all collectives are on the thread that calls `run`. Where nothing is to
be done, rank 0 waits for a request and the others for rank 0 (`Doorbell`).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx

from mlx_ep.comm import Comm, note_progress, on_end
from mlx_ep.server.checks import check_request
from mlx_ep.server.doorbell import Doorbell
from mlx_ep.server.experts import ExpertLoads
from mlx_ep.server.grammar import Grammars
from mlx_ep.server.messages import (
    STATUS,
    Details,
    Heard,
    StepExchange,
    decode_decision,
    decode_details,
    encode_decision,
    encode_details,
)
from mlx_ep.server.pools import EngineOptions, Pools, resident_bytes
from mlx_ep.server.requests import EngineState, RankState, Request, Stopping, Token
from mlx_ep.server.sampling import Drawn
from mlx_ep.server.scheduler import Decision, RequestScheduler
from mlx_ep.server.worker import Ended, Worker

Deliver = Callable[[Token], None]
RecordAction = Literal["start", "stop", "dump"]
# Steps between two looks at the experts' loads, while they are recorded.
LOADS_EVERY = 32
RECORD_LIMIT = 60.0  # s until an answer of the recorder is given up
_KIB = 1024


class ServingEngine:
    """See `mlx_ep.server.requests.Engine`; `build_engine` makes one on every rank.

    Attributes:
        attention: ``replicated``, ``tensor`` or ``data``.
        context: most tokens of a prompt and its answer together.
        pools: memory for KV caches.
        goodbye: called when the engine has failed and all have been told: the process
            may end when it returns, in less than 0.2 s.
    """

    def __init__(
        self,
        comm: Comm,
        worker: Worker,
        scheduler: RequestScheduler,
        *,
        pools: Pools,
        options: EngineOptions,
        attention: str,
        context: int,
        vocabulary: int,
        grammars: Grammars,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.attention, self.context, self.pools = attention, context, pools
        self._comm, self._worker, self._scheduler = comm, worker, scheduler
        self._vocabulary, self._grammars, self._notes = vocabulary, grammars, notes
        self._options = options
        self._exchange = StepExchange(comm, options.max_num_seqs)
        self._bell = Doorbell(comm)
        self._loads = ExpertLoads(worker.model, comm, attention == "data")
        # Signal handlers of the main thread ask too, whatever it is doing.
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._deliver: dict[str, Deliver] = {}
        self._cancelled: list[str] = []  # while they waited
        self._record: tuple[RecordAction, Future[dict[str, object]]] | None = None
        self._is_draining = self._is_stopping = False
        self._stop_reason = ""
        self.goodbye: Callable[[], object] | None = None
        self._state = EngineState(
            0, 0, 0, (0, 0), 0, 0, sum(p.limit for p in worker.prefixes), attention,
            self._ranks([]),
        )  # fmt: skip

    # What rank 0's HTTP thread calls --------------------------------------------------

    def submit(self, request: Request, deliver: Deliver) -> None:
        """See `Engine.submit`.

        Raises:
            ValueError: the request is wrong, or can never be served.
        """
        check_request(request, self._vocabulary, self.context)
        if problem := self._scheduler.problem(request):
            raise ValueError(problem)
        if request.grammar is not None:
            self._grammars.prepare(request.id, request.grammar)
        with self._wake:
            if self._state.failed or self._is_draining or self._is_stopping:
                reason = self._state.failed or "the server is ending"
                raise Stopping(reason)
            if request.id in self._deliver:
                raise ValueError(f"The id {request.id} must be new; it is in use.")
            self._scheduler.add(request)
            self._deliver[request.id] = deliver
            self._wake.notify()

    def cancel(self, request: str) -> None:
        """See `Engine.cancel`."""
        with self._wake:
            if request in self._deliver and self._scheduler.cancel(request):
                self._cancelled.append(request)
                self._wake.notify()

    def state(self) -> EngineState:
        """See `Engine.state`."""
        with self._lock:
            return replace(
                self._state,
                running=len(self._scheduler.places),
                waiting=self._scheduler.num_waiting,
                draining=self._is_draining,
            )

    def drain(self) -> None:
        """See `Engine.drain`; `run` returns when the last request has ended."""
        with self._wake:
            self._is_draining = True
            self._wake.notify()

    def stop(self, reason: str = "the server is ending") -> None:
        """End now: `run` returns on all ranks, open requests end with the reason."""
        with self._wake:
            self._is_stopping, self._stop_reason = True, reason
            self._wake.notify()

    def record(self, action: RecordAction) -> dict[str, object]:
        """See `Engine.record`.

        Raises:
            Stopping: the engine ended meanwhile.
        """
        answer: Future[dict[str, object]] = Future()
        with self._wake:
            while self._record is not None:
                self._wake.wait(RECORD_LIMIT)
            self._record = action, answer
            self._wake.notify()
        try:
            return answer.result(RECORD_LIMIT)
        except TimeoutError:
            raise Stopping("the engine does not answer") from None

    def describe(self) -> str:
        """The pools and what else was found at the start, for a person."""
        sizes = self._worker.sizes
        return "\n".join([*self._notes, self.pools.describe(sizes)])

    # The loop -------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the engine is stopped, or drained; every rank must call it.

        Where it raises, open requests have been told; among ranks their watch tells
        them, with the reason of the rank that failed first.
        """
        on_end(self._fail)
        mx.random.seed(random.randrange(2**32) if self._options.seed is None
                       else self._options.seed)  # fmt: skip
        try:
            while self._turn():
                pass
        except BaseException as error:
            if self._comm.size == 1:
                self._fail(f"rank 0 failed: {type(error).__name__}: {error}")
            raise
        finally:
            on_end(None)
            self._bell.close()
        if self._comm.rank == 0:
            self._end_all(self._stop_reason or "the server is ending")

    def _turn(self) -> bool:
        """One step of all ranks; False after the last."""
        worker, decision = self._worker, Decision()
        was_idle = not worker.running
        if self._comm.rank == 0:
            decision = self._decide()
            if was_idle:
                self._bell.ring()
        elif was_idle:
            note_progress("waiting")
            self._bell.wait()
        note_progress("batch", self._state.steps)
        heard = self._tell(decision)
        if self._comm.rank != 0:
            decision = decode_decision(heard[0].payload)
        begun = worker.begin(decision)
        before = dict(worker.running)
        ended = worker.hear(heard)
        if self._comm.rank == 0:
            self._deliver_all(heard, before, ended)
            self._deliver_cancelled(decision, before)
        worker.step(decision, begun)
        self._act(decision)
        self._note_step(decision, heard)
        return not decision.stop

    def _decide(self) -> Decision:
        """Rank 0: what the next step does, as soon as there is something to do."""
        with self._wake:
            while not (self._worker.running or self._has_news()):
                note_progress("waiting")
                self._wake.wait()
            for request in self._cancelled:
                self._end(request, "cancelled")
            self._cancelled.clear()
            if self._is_stopping or (
                self._is_draining and not self._scheduler.has_work
            ):
                return Decision(stop=True)
            decision = self._scheduler.decide()
            decision.record = self._record[0] if self._record else ""
            return decision

    def _has_news(self) -> bool:
        is_asked = self._is_stopping or self._is_draining or self._record is not None
        return is_asked or self._scheduler.has_work or bool(self._cancelled)

    def _tell(self, decision: Decision) -> list[Heard]:
        """The collective of the step."""
        worker = self._worker
        memory, kv_bytes = resident_bytes() // _KIB, worker.kv_bytes // _KIB
        status = [memory, kv_bytes, worker.num_active]
        payload = b""
        if self._comm.rank == 0:
            payload = encode_decision(decision) if self._comm.size > 1 else b""
        else:
            payload = encode_details(_details(worker.drawn))
        tokens = {
            place: (drawn.token, drawn.finish_reason)
            for place, drawn in worker.drawn.items()
        }
        return self._exchange(tokens, status, payload)

    def _act(self, decision: Decision) -> None:
        """What the decision says beside sequences."""
        if decision.record:
            answer = self._loads.act(decision.record)
            if self._comm.rank == 0:
                with self._wake:
                    assert self._record is not None
                    self._record[1].set_result(answer)
                    self._record = None
                    self._wake.notify_all()
        elif self._loads.is_running and self._state.steps % LOADS_EVERY == 0:
            self._loads.refresh()

    # Rank 0's answers -----------------------------------------------------------------

    def _deliver_all(
        self, heard: list[Heard], before: dict[int, Any], ended: list[Ended]
    ) -> None:
        details = {p: _detail(drawn) for p, drawn in self._worker.drawn.items()}
        for told in heard[1:]:
            details |= decode_details(told.payload)
        is_data = self.attention == "data"
        for told in heard if is_data else heard[:1]:
            for place, (token, reason) in told.tokens.items():
                sequence = before[place]
                logprob, top, message = details.get(place, (None, (), ""))
                is_first = len(sequence.tokens) == len(sequence.request.tokens) + 1
                event = Token(
                    sequence.request.id,
                    None if reason == "error" else token,
                    logprob,
                    top,
                    cached=sequence.cached if is_first else 0,
                    finish_reason=reason,
                    message=message,
                )
                self._send(event)
        with self._lock:
            for end in ended:
                self._scheduler.ended(end.place, before[end.place].request.id)

    def _deliver_cancelled(self, decision: Decision, before: dict[int, Any]) -> None:
        for place in decision.cancel:
            self._end(before[place].request.id, "cancelled")

    def _send(self, event: Token) -> None:
        deliver = self._deliver.get(event.request)
        if event.finish_reason is not None:
            with self._lock:
                self._deliver.pop(event.request, None)
        if deliver is not None:
            deliver(event)

    def _end(
        self, request: str, reason: Literal["cancelled", "error"], message: str = ""
    ) -> None:
        self._grammars.forget(request)
        self._send(Token(request, None, finish_reason=reason, message=message))

    def _end_all(self, reason: str) -> None:
        for request in list(self._deliver):
            self._end(request, "error", reason)
        with self._wake:
            self._is_stopping = True
            if self._record is not None:
                self._record[1].set_exception(Stopping(reason))
                self._record = None

    def _fail(self, reason: str) -> None:
        """The engine cannot go on; on whatever thread."""
        with self._lock:
            self._state = replace(self._state, failed=reason)
        self._end_all(reason)
        if self.goodbye is not None:
            self.goodbye()

    # The state ------------------------------------------------------------------------

    def _note_step(self, decision: Decision, heard: list[Heard]) -> None:
        prompts, generated = self._state.tokens
        cached = sum(e.hit.num_tokens for e in decision.enter if e.hit)
        prompts += sum(len(enter.request.tokens) for enter in decision.enter)
        told = heard if self.attention == "data" else heard[:1]
        generated += sum(len(rank.tokens) for rank in told)
        with self._lock:
            self._state = replace(
                self._state,
                steps=self._state.steps + 1,
                tokens=(prompts, generated),
                cache_hits=self._state.cache_hits + cached,
                cache_bytes=sum(p.num_bytes for p in self._worker.prefixes),
                ranks=self._ranks(heard),
                experts=self._loads.ranks,
            )

    def _ranks(self, heard: list[Heard]) -> tuple[RankState, ...]:
        told = [rank.status for rank in heard] or [[0] * STATUS] * self._comm.size
        return tuple(
            RankState(rank, status[0] * _KIB, status[1] * _KIB, limit, status[2])
            for rank, (status, limit) in enumerate(
                zip(told, self.pools.running, strict=True)
            )
        )


def _detail(drawn: Drawn) -> tuple[float | None, tuple[tuple[int, float], ...], str]:
    return drawn.logprob, drawn.top, drawn.message


def _details(drawn: dict[int, Drawn]) -> Details:
    """Of those tokens that there is more to say of."""
    return {
        place: _detail(token)
        for place, token in drawn.items()
        if token.logprob is not None or token.message
    }
