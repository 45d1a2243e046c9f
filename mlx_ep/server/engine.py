"""The engine: the loop that every rank runs, and what rank 0's HTTP thread asks of it.

One turn of the loop, on all ranks together:

    rank 0 decides -> one collective begins: its decision, and the tokens of the last
                      turn, which are still being drawn
                   -> the pass over these tokens begins (`EngineOptions.look_ahead`)
                   -> the collective is read: tokens are delivered, places become free
                   -> requests enter, one chunk of prompts is processed
                   -> every sequence of the pass draws a token

All MLX work and all collectives are on the thread that calls `run`. Where nothing is to
be done, rank 0 waits for a request and the others for rank 0 (`Doorbell`).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal

import mlx.core as mx

from mlx_ep.comm import Comm, note_progress, on_end
from mlx_ep.server.checks import check_request
from mlx_ep.server.cores import share_cores
from mlx_ep.server.doorbell import SLOW_GATHER, Doorbell
from mlx_ep.server.experts import ExpertLoads
from mlx_ep.server.grammar import Grammars
from mlx_ep.server.messages import (
    STATUS,
    Details,
    Heard,
    Sent,
    StepExchange,
    decode,
    encode,
)
from mlx_ep.server.newcomers import Newcomers
from mlx_ep.server.pools import EngineOptions, Pools, resident_bytes
from mlx_ep.server.requests import EngineState, RankState, Request, Stopping, Token
from mlx_ep.server.scheduler import Decision, RequestScheduler
from mlx_ep.server.worker import Ended, Running, Worker

Deliver = Callable[[Token], None]
RecordAction = Literal["start", "stop", "dump"]
# Steps between two looks at the experts' loads, while they are recorded.
LOADS_EVERY = 32
# Steps between two looks at a rank's memory, while the same sequences run.
LOOK_EVERY = 16
FAREWELL = 2.0  # s, for rank 0 to say why it ends: more than `listener.LINGER`
RECORD_LIMIT = 60.0  # s until an answer of the recorder is given up
_KIB = 1024


class ServingEngine:
    """See `mlx_ep.server.requests.Engine`; `build_engine` makes one on every rank.

    Attributes:
        attention: ``replicated``, ``tensor`` or ``data``.
        context: most tokens of a prompt and its answer together.
        pools: memory for KV caches.
        goodbye: called when the engine has failed; the process ends behind it.
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
        self._options, self._bell = options, Doorbell(comm)
        by_bell = worker.is_apart and self._bell.gather_seconds() < SLOW_GATHER
        self._exchange = StepExchange(
            comm, options.max_num_seqs, self._bell.gather if by_bell else None
        )
        self._cores = share_cores(comm, worker.is_apart)
        self._loads = ExpertLoads(worker.model, comm, attention == "data")
        # Signal handlers of the main thread ask too, whatever it is doing.
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._deliver: dict[str, Deliver] = {}
        self._cancelled: list[str] = []  # while they waited
        self._newcomers = Newcomers(self._wake)
        self._record: tuple[RecordAction, Future[dict[str, object]]] | None = None
        self._is_draining = self._is_stopping = False
        self._stop_reason, self._status = "", [0] * STATUS
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
            self._newcomers.note()

    def expect(self, count: int) -> None:
        """See `Engine.expect`."""
        with self._wake:
            self._newcomers.expect(count)

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
                self._wake.wait()
            if self._state.failed or self._is_stopping:
                raise Stopping(self._state.failed or "the server is ending")
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
        on_end(self._fail, FAREWELL if self.goodbye else None)
        mx.random.seed(random.randrange(2**32) if self._options.seed is None
                       else self._options.seed)  # fmt: skip
        self._cores.keep(True)
        try:
            while self._turn():
                pass
        except BaseException as error:
            if self._comm.size == 1:
                self._fail(f"rank 0 failed: {type(error).__name__}: {error}")
            raise  # among ranks `_fail` is still to be called, with the first reason
        finally:
            self._bell.close()
            self._cores.keep(False)
        on_end(None)  # not where it raised: a peer may be gone, the watch will say why
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
        sent = self._send(decision)
        if worker.looks_ahead:
            # Where ranks run sequences of their own, each has drawn for itself.
            drawn_by = self._comm.rank if self.attention == "data" else 0
            worker.look_ahead(lambda: self._exchange.words(sent, drawn_by))
        heard = self._exchange.receive(sent)
        told = [decode(rank.payload) for rank in heard]
        if self._comm.rank != 0:
            decision = told[0][0]
        begun = worker.begin(decision)
        before = dict(worker.running)
        details = worker.details() if self._comm.rank == 0 else {}
        for _, of_rank in told:
            details |= of_rank
        ended = worker.hear(heard, {p: d for p, d in details.items() if d[2]})
        if self._comm.rank == 0:
            self._deliver_all(heard, before, ended, details)
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
            self._newcomers.wait(lambda: self._scheduler.has_room)
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

    def _send(self, decision: Decision) -> Sent:
        """The collective of the step."""
        details = self._worker.problems()
        if self._comm.rank != 0 and self.attention == "data":
            details = self._worker.details() | details
        payload = encode(decision, details) if self._comm.size > 1 or details else b""
        return self._exchange.send(self._worker.drawn(), self._look(), payload)

    def _look(self) -> list[int]:
        """What this rank says of itself: looked at when sequences come or go."""
        active = self._worker.num_active
        if active != self._status[2] or self._state.steps % LOOK_EVERY == 0:
            memory, kv_bytes = resident_bytes(), self._worker.kv_bytes
            self._status = [memory // _KIB, kv_bytes // _KIB, active]
        return self._status

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
            self._worker.may_share = not self._loads.is_running
        elif self._loads.is_running and self._state.steps % LOADS_EVERY == 0:
            self._loads.refresh()

    # Rank 0's answers -----------------------------------------------------------------

    def _deliver_all(
        self,
        heard: list[Heard],
        before: dict[int, Running],
        ended: dict[int, Ended],
        details: Details,
    ) -> None:
        for told in heard if self.attention == "data" else heard[:1]:
            for place, token in told.tokens.items():
                sequence, end = before[place], ended.get(place)
                if end is not None and end.reason == "error":
                    continue
                logprob, top, _ = details.get(place, (None, (), ""))
                is_first = len(sequence.tokens) == len(sequence.request.tokens) + 1
                event = Token(
                    sequence.request.id,
                    token,
                    logprob,
                    top,
                    cached=sequence.cached if is_first else 0,
                    finish_reason=end.reason if end else None,
                )
                self._send_event(event)
        for place, end in ended.items():
            request = before[place].request.id
            if end.reason == "error":
                self._end(request, "error", end.message)
            with self._lock:
                self._scheduler.ended(place, request)

    def _deliver_cancelled(
        self, decision: Decision, before: dict[int, Running]
    ) -> None:
        for place in decision.cancel:
            self._end(before[place].request.id, "cancelled")

    def _send_event(self, event: Token) -> None:
        deliver = self._deliver.get(event.request)
        if event.finish_reason is not None:
            # Also where another rank has drawn by it.
            self._grammars.forget(event.request)
            with self._lock:
                self._deliver.pop(event.request, None)
        if deliver is not None:
            deliver(event)

    def _end(
        self, request: str, reason: Literal["cancelled", "error"], message: str = ""
    ) -> None:
        self._send_event(Token(request, None, finish_reason=reason, message=message))

    def _end_all(self, reason: str) -> None:
        with self._wake:
            self._is_stopping = True
            open_ones = list(self._deliver)
            if self._record is not None:
                self._record[1].set_exception(Stopping(reason))
                self._record = None
            self._wake.notify_all()
        for request in open_ones:
            self._end(request, "error", reason)

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
