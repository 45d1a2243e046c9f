"""A request's answers while they are made: tokens in, parts of answers out."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from mlx_ep.server.answer_text import AnswerText, Piece
from mlx_ep.server.asked import Asked
from mlx_ep.server.errors import ApiError, unavailable
from mlx_ep.server.mail import Inbox
from mlx_ep.server.requests import QueueFull, Request, Stopping, Token
from mlx_ep.server.service import Service

# What mlx-lm's parsers of tool calls raise for a text that is none.
_NO_CALL = (ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError)


@dataclass(frozen=True)
class Call:
    """A tool call; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What came of one answer.

    Attributes:
        index: of the answer.
        pieces: "text" and "reasoning".
        tokens: with logprobs, where they were asked for.
        finish: "stop", "length" or "tool_calls", in the last one.
    """

    index: int
    pieces: tuple[Piece, ...] = ()
    calls: tuple[Call, ...] = ()
    tokens: tuple[Token, ...] = ()
    finish: str | None = None


@dataclass
class AnswerSoFar:
    """One answer as far as it is made.

    Attributes:
        generated: tokens, the end token included; thought: of thoughts.
        cached: prompt tokens that were known.
        last: when its last token came.
    """

    index: int
    request: Request
    text: AnswerText
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    generated: int = 0
    thought: int = 0
    cached: int = 0
    finish: str | None = None
    last: float = 0.0


class Answers:
    """All answers to one HTTP request.

    Use it as ``async with``: on the way out what is unfinished is cancelled, so that a
    client that goes away frees its places.
    """

    def __init__(self, service: Service, asked: Asked, identity: str) -> None:
        self._service, self.asked, self.identity = service, asked, identity
        self.created = int(time.time())
        self._inbox = Inbox()
        self._start = time.perf_counter()
        stops = service.texts.stop_tokens(asked.stops)
        self.answers = [
            self._answer(i, stops) for i in range(len(asked.prompts) * asked.count)
        ]
        self._by_id = {answer.request.id: answer for answer in self.answers}
        self._open: set[str] = set()
        self._is_closing = False

    def _answer(self, index: int, stops: tuple[tuple[int, ...], ...]) -> AnswerSoFar:
        asked, texts = self.asked, self._service.texts
        prompt = asked.prompts[index // asked.count]
        sampling = asked.sampling
        if sampling.seed is not None and index % asked.count:
            # Several answers with one seed would be one answer.
            seed = (sampling.seed + index % asked.count) % 2**64
            sampling = dataclasses.replace(sampling, seed=seed)
        request = Request(
            f"{self.identity}.{index}",
            prompt.tokens,
            asked.max_tokens,
            sampling,
            stops,
            asked.grammar,
        )
        initial = "normal" if asked.grammar else prompt.initial
        return AnswerSoFar(index, request, texts.answer(initial, asked.stops))

    async def __aenter__(self) -> Answers:
        """Raises: ApiError: 400, 429 or 503; nothing is left in the queue then."""
        try:
            if self.asked.grammar is None:
                self._submit()
            else:  # which the engine compiles on the thread that submits
                await self._service.read(self._submit)
        except QueueFull as error:
            self.close()
            raise ApiError(
                429, str(error), code="queue_full", retry_after=error.retry_after
            ) from error
        except Stopping as error:
            self.close()
            raise unavailable(str(error)) from error
        except ValueError as error:
            self.close()
            raise ApiError(400, str(error), code="invalid_value") from error
        return self

    def _submit(self) -> None:
        deliver = functools.partial(self._service.mail.send, self._inbox)
        for answer in self.answers:
            self._service.engine.submit(answer.request, deliver)
            self._open.add(answer.request.id)

    async def __aexit__(self, *_: object) -> None:
        """When everything has been sent, or the client has gone."""
        self.close()
        if self._is_closing:
            self._service.engine.expect(-1)

    def close(self) -> None:
        """Cancel what is unfinished."""
        for request in self._open:
            self._service.metrics.cancelled.inc()
            self._service.engine.cancel(request)
        self._open.clear()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What came since the last time, until all answers are finished.

        Raises:
            ApiError: the engine has failed, with its reason.
        """
        while self._open:
            batches: dict[str, list[Token]] = {}
            for token in await self._inbox.take():
                if token.request in self._open:
                    batches.setdefault(token.request, []).append(token)
            found = [self._read(self._by_id[name], t) for name, t in batches.items()]
            if found:
                yield found

    async def finished(self) -> list[AnswerSoFar]:
        """All answers, when they are complete."""
        async for _ in self.deltas():
            pass
        return self.answers

    def _read(self, answer: AnswerSoFar, tokens: Sequence[Token]) -> Delta:
        pieces: list[Piece] = []
        shown: list[Token] = []
        self._time(answer, len(tokens))
        for token in tokens:
            answer.cached = max(answer.cached, token.cached)
            if token.finish_reason in ("error", "cancelled"):
                self._open.discard(token.request)
                raise self._failure(token)
            if token.token is not None:
                answer.generated += 1
                pieces += answer.text.add(token.token)
                answer.thought += answer.text.is_thought
                if self._has_logprobs(token):
                    shown.append(token)
            finish = "stop" if answer.text.stopped else token.finish_reason
            if finish is not None:
                pieces += answer.text.end()
                self._finish(answer, finish, token.finish_reason is None)
                break
        return self._delta(answer, pieces, shown)

    def _has_logprobs(self, token: Token) -> bool:
        is_end = token.token in self._service.texts.tokenizer.eos_token_ids
        return self.asked.sampling.logprobs and not is_end

    def _finish(self, answer: AnswerSoFar, finish: str, is_ours: bool) -> None:
        answer.finish = finish
        self._open.discard(answer.request.id)
        if not self._open and not self._is_closing:
            # Whoever has an answer often asks again at once; of several answers that
            # end together, one would else hold up the last words of the others.
            self._is_closing = True
            self._service.engine.expect(1)
        if is_ours:  # the engine does not know yet
            self._service.engine.cancel(answer.request.id)

    def _delta(
        self, answer: AnswerSoFar, pieces: Iterable[Piece], shown: list[Token]
    ) -> Delta:
        kept: list[Piece] = []
        calls: list[Call] = []
        for piece in pieces:
            if piece.kind == "tool":
                found = self._calls(piece.text)
                if found is None:  # the client sees what the model wrote
                    tokenizer = self._service.texts.tokenizer
                    start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
                    piece = Piece("text", f"{start or ''}{piece.text}{end or ''}")
                else:
                    calls += found
                    continue
            kept.append(piece)
        if not self.asked.parallel and (calls or answer.calls):
            calls = calls[: 1 - len(answer.calls)]
            if answer.finish is None:
                self._finish(answer, "stop", True)
        answer.calls += calls
        answer.tokens += shown
        for piece in kept:
            if piece.kind == "text":
                answer.content += piece.text
            else:
                answer.reasoning += piece.text
        if answer.finish == "stop" and answer.calls:
            answer.finish = "tool_calls"
        return Delta(
            answer.index, tuple(kept), tuple(calls), tuple(shown), answer.finish
        )

    def _calls(self, text: str) -> list[Call] | None:
        """The calls that the model's parser finds; None where it finds none."""
        tokenizer = self._service.texts.tokenizer
        try:
            found = tokenizer.tool_parser(text, list(self.asked.tools))
            found = found if isinstance(found, list) else [found]
            return [
                Call(
                    str(call.get("id") or f"call_{uuid.uuid4().hex}"),
                    _name(call["name"]),
                    json.dumps(call.get("arguments", {}), ensure_ascii=False),
                )
                for call in found
            ]
        except _NO_CALL:
            return None

    def _failure(self, token: Token) -> ApiError:
        failed = self._service.engine.state().failed
        reason = failed or token.message or f"the request was {token.finish_reason}"
        if failed or token.finish_reason == "cancelled":
            return unavailable(reason)
        return ApiError(500, reason, code="generation_failed")

    def _time(self, answer: AnswerSoFar, count: int) -> None:
        now = time.perf_counter()
        metrics = self._service.metrics
        if answer.last:
            metrics.inter_token.observe((now - answer.last) / count)
        else:
            metrics.first_token.observe(now - self._start)
        answer.last = now

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.asked.prompts)

    @property
    def generated(self) -> int:
        return sum(answer.generated for answer in self.answers)

    @property
    def thought(self) -> int:
        """Of the generated tokens, those of thoughts."""
        return sum(answer.thought for answer in self.answers)

    @property
    def cached(self) -> int:
        """Prompt tokens that were known; of a prompt with several answers, once."""
        return sum(answer.cached for answer in self.answers[:: self.asked.count])


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a function's name is a text")
    return value
