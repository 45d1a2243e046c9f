"""``/v1/completions``: a text goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from mlx_ep.server.answers import Answers
from mlx_ep.server.asked import (
    MOST_CHOICES,
    Asked,
    fitting,
    read_sampling,
    read_stops,
    read_stream,
    read_top_logprobs,
)
from mlx_ep.server.body import Body, shown
from mlx_ep.server.dialect import DONE, Dialect, event, logprob_entry, usage
from mlx_ep.server.openai_chat import IGNORED, REFUSED, read_format
from mlx_ep.server.requests import Token
from mlx_ep.server.texts import PromptTokens

_MOST_PROMPTS = 128
# OpenAI's ``logprobs`` is a number of tokens here.
_MOST_LOGPROBS = 5


class CompletionDialect(Dialect):
    prefix = "cmpl-"
    # OpenAI's form of logprobs, instead of mlx_lm.server's.
    _is_number = False

    def read(self, body: Body) -> Asked:
        service = self.service
        model = service.names.check(body)
        body.ignore(*IGNORED)
        body.refuse(REFUSED)
        body.refuse({"suffix": "text goes on at its end only"}, "")
        body.refuse({"echo": "put the prompt before the text"}, False)
        stream, include_usage = read_stream(body)
        logprobs, top = self._read_logprobs(body)
        sampling = dataclasses.replace(
            read_sampling(body, service.defaults, service.texts.vocabulary),
            logprobs=logprobs,
            top_logprobs=top,
        )
        count = body.integer("n", 1, 1, MOST_CHOICES)
        body.refuse({"best_of": "every answer is returned; use n"}, count)
        max_tokens = body.integer("max_tokens", service.defaults.max_tokens, 1)
        max_tokens = body.integer("max_completion_tokens", max_tokens, 1)
        stops = read_stops(body, "stop")
        grammar = read_format(self, body)
        prompts = self._prompts(body)
        body.close()
        return Asked(
            model=model,
            prompts=prompts,
            max_tokens=fitting(prompts, max_tokens, service.engine.context, "prompt"),
            sampling=sampling,
            count=count,
            stops=stops,
            grammar=grammar,
            stream=stream,
            include_usage=include_usage,
        )

    def _read_logprobs(self, body: Body) -> tuple[bool, int]:
        found = body.value("logprobs")
        top = read_top_logprobs(body)
        if found is None or isinstance(found, bool):
            return bool(found) or top > 0, top
        self._is_number = True
        return True, body.integer("logprobs", 0, 0, _MOST_LOGPROBS)

    def _prompts(self, body: Body) -> tuple[PromptTokens, ...]:
        """A text, some, token ids, or some lists of token ids."""
        given = body.value("prompt")
        if isinstance(given, str):
            return (self.service.texts.text(given),)
        if isinstance(given, list) and len(given) > 0:
            if all(isinstance(item, int) for item in given):
                return (self._ids(body, given),)
            if len(given) <= _MOST_PROMPTS and all(
                isinstance(item, (str, list)) for item in given
            ):
                return tuple(
                    self.service.texts.text(item)
                    if isinstance(item, str)
                    else self._ids(body, item)
                    for item in given
                )
        raise body.fail(
            "prompt",
            f"must be a text, up to {_MOST_PROMPTS} of them, or token ids, got "
            f"{shown(given)}",
        )

    def _ids(self, body: Body, ids: Sequence[Any]) -> PromptTokens:
        most = self.service.texts.vocabulary
        for token in ids:
            is_whole = isinstance(token, int) and not isinstance(token, bool)
            if not is_whole or not 0 <= token < most:
                raise body.fail(
                    "prompt", f"must have token ids below {most}, got {shown(token)}"
                )
        if not ids:
            raise body.fail("prompt", "must not be empty")
        return PromptTokens(tuple(ids))

    def whole(self, answers: Answers) -> dict[str, Any]:
        choices = [
            self._choice(
                answer.index,
                answer.content,
                answer.finish,
                answer.tokens,
                answer.request.sampling.logprobs,
            )
            for answer in answers.answers
        ]
        return {
            **self._head(answers),
            "choices": choices,
            "usage": usage(answers),
        }

    def _head(self, answers: Answers) -> dict[str, Any]:
        return {
            "id": answers.identity,
            "object": "text_completion",
            "created": answers.created,
            "model": answers.asked.model,
            "system_fingerprint": self.service.fingerprint,
        }

    def _choice(
        self,
        index: int,
        text: str,
        finish: str | None,
        tokens: Sequence[Token],
        are_wanted: bool,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if are_wanted else None
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if not self._is_number:
            return {"content": [logprob_entry(self.service, t) for t in tokens]}
        text_of = self.service.texts.token_text
        texts = [text_of(t.token) for t in tokens if t.token is not None]
        offsets = [sum(map(len, texts[:index])) for index in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [
                {text_of(number): logprob for number, logprob in t.top_logprobs}
                for t in tokens
            ],
            "text_offset": offsets,
        }

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        head = self._head(answers)
        usual = {"usage": None} if answers.asked.include_usage else {}
        are_wanted = answers.asked.sampling.logprobs
        async for deltas in answers.deltas():
            parts = []
            for delta in deltas:
                text = "".join(piece.text for piece in delta.pieces)
                if text or delta.finish or delta.tokens:
                    choice = self._choice(
                        delta.index, text, delta.finish, delta.tokens, are_wanted
                    )
                    parts.append(event({**head, "choices": [choice], **usual}))
            if parts:
                yield b"".join(parts)
        if usual:
            yield event({**head, "choices": [], "usage": usage(answers)})
        yield DONE
