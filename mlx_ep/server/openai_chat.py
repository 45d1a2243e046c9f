"""``/v1/chat/completions``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator
from typing import Any

from mlx_ep.server.answer_text import Piece
from mlx_ep.server.answers import Answers, AnswerSoFar, Call, Delta
from mlx_ep.server.asked import (
    MOST_CHOICES,
    Asked,
    fitting,
    read_effort,
    read_function,
    read_sampling,
    read_schema,
    read_stops,
    read_stream,
    read_tool_choice,
    read_top_logprobs,
)
from mlx_ep.server.body import Body, shown
from mlx_ep.server.conversation import TEXT_ONLY, read_messages
from mlx_ep.server.dialect import DONE, Dialect, event, logprob_entry, usage
from mlx_ep.server.requests import Token

# What OpenAI or mlx_lm.server has and this server has not.
REFUSED = {
    "audio": TEXT_ONLY,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "prediction": "predicted outputs are not used",
    "web_search_options": "the server has no search",
    "verbosity": "say it in a message",
    "adapters": "fuse the adapter into the model (mlx_lm.fuse)",
    "draft_model": "the server does not draft",
    "num_draft_tokens": "the server does not draft",
    "moderation": "the server does not moderate",
}
# What says who asks or how a provider is to bill it; no answer depends on it.
IGNORED = (
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options",
)  # fmt: skip


class ChatDialect(Dialect):
    prefix = "chatcmpl-"

    def read(self, body: Body) -> Asked:
        service = self.service
        model = service.names.check(body)
        body.ignore(*IGNORED)
        body.refuse(REFUSED)
        body.refuse({"store": "answers are not kept"}, False)
        body.refuse({"modalities": TEXT_ONLY}, ["text"])
        stream, include_usage = read_stream(body)
        top = read_top_logprobs(body)
        sampling = dataclasses.replace(
            read_sampling(body, service.defaults, service.texts.vocabulary),
            logprobs=body.boolean("logprobs") or top > 0,
            top_logprobs=top,
        )
        messages = read_messages(body)
        tools = [_tool(tool) for tool in body.objects("tools")]
        tools, must_call = read_tool_choice(body, tools, "function")
        grammar = read_format(self, body)
        if must_call:
            if grammar is not None:
                raise body.fail("response_format", "must be left out with tool_choice")
            grammar = service.texts.call_grammar(tools, body.path("tool_choice"))
        parallel = body.boolean("parallel_tool_calls", True)
        roles = body.mapping("role_mapping")
        arguments = template_arguments(self, body, grammar is not None)
        max_tokens = body.integer("max_tokens", service.defaults.max_tokens, 1)
        max_tokens = body.integer("max_completion_tokens", max_tokens, 1)
        count = body.integer("n", 1, 1, MOST_CHOICES)
        stops = read_stops(body, "stop")
        body.close()
        prompt = service.texts.chat(messages, tools, arguments, roles)
        return Asked(
            model=model,
            prompts=(prompt,),
            max_tokens=fitting(
                (prompt,), max_tokens, service.engine.context, "messages"
            ),
            sampling=sampling,
            count=count,
            stops=stops,
            grammar=grammar,
            tools=tuple(tools),
            parallel=parallel,
            stream=stream,
            include_usage=include_usage,
        )

    def whole(self, answers: Answers) -> dict[str, Any]:
        return {
            **self._head(answers, "chat.completion"),
            "choices": [self._choice(answer) for answer in answers.answers],
            "usage": usage(answers),
        }

    def _choice(self, answer: AnswerSoFar) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.content or None,
        }
        if answer.reasoning:
            message["reasoning"] = answer.reasoning
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = list(map(_call, answer.calls))
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(answer.tokens, answer.request.sampling.logprobs),
            "finish_reason": answer.finish,
        }

    def _logprobs(self, tokens: Any, are_wanted: bool) -> dict[str, Any] | None:
        if not are_wanted:
            return None
        found: list[Token] = list(tokens)
        return {"content": [logprob_entry(self.service, token) for token in found]}

    def _head(self, answers: Answers, kind: str) -> dict[str, Any]:
        return {
            "id": answers.identity,
            "object": kind,
            "created": answers.created,
            "model": answers.asked.model,
            "system_fingerprint": self.service.fingerprint,
        }

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        head = self._head(answers, "chat.completion.chunk")
        usual = {"usage": None} if answers.asked.include_usage else {}
        begun: set[int] = set()
        calls = dict.fromkeys(range(len(answers.answers)), 0)
        # Most chunks are a text and nothing else: they are made without a dictionary.
        start = json.dumps(head)[:-1] + ', "choices": [{"index": '
        middle = ', "delta": {"content": '
        end = '}, "finish_reason": null, "logprobs": null}]'
        end += ', "usage": null}\n\n' if usual else "}\n\n"
        async for deltas in answers.deltas():
            parts: list[bytes] = []
            for delta in deltas:
                if delta.index not in begun:
                    begun.add(delta.index)
                    first = {"role": "assistant", "content": ""}
                    parts.append(event({**head, **_chunk(delta.index, first), **usual}))
                if text := _only_text(delta):
                    said = f"data: {start}{delta.index}{middle}{json.dumps(text)}{end}"
                    parts.append(said.encode())
                    continue
                content = _content(delta, calls)
                if content is None:
                    continue
                logprobs = self._logprobs(delta.tokens, answers.asked.sampling.logprobs)
                chunk = _chunk(delta.index, content, delta.finish, logprobs)
                parts.append(event({**head, **chunk, **usual}))
            if parts:
                yield b"".join(parts)
        if usual:
            yield event({**head, "choices": [], "usage": usage(answers)})
        yield DONE


def _only_text(delta: Delta) -> str:
    """The text of a delta that is nothing else."""
    if delta.finish or delta.calls or delta.tokens:
        return ""
    if any(piece.kind != "text" for piece in delta.pieces):
        return ""
    return "".join(piece.text for piece in delta.pieces)


def _content(delta: Delta, calls: dict[int, int]) -> dict[str, Any] | None:
    """The delta's object; None where there is nothing to say."""
    content: dict[str, Any] = {}
    for kind, names in _NAMES.items():
        if text := joined(delta.pieces, kind):
            content |= dict.fromkeys(names, text)
    if delta.calls:
        first = calls[delta.index]
        content["tool_calls"] = [
            {"index": first + i, **_call(call)} for i, call in enumerate(delta.calls)
        ]
        calls[delta.index] += len(delta.calls)
    return content if content or delta.finish or delta.tokens else None


# mlx_lm.server says reasoning, most other servers and clients reasoning_content.
_NAMES = {"text": ("content",), "reasoning": ("reasoning", "reasoning_content")}


def joined(pieces: tuple[Piece, ...], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def _chunk(
    index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    choice = {
        "index": index,
        "delta": delta,
        "finish_reason": finish,
        "logprobs": logprobs,
    }
    return {"choices": [choice]}


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _tool(tool: Body) -> dict[str, Any]:
    kind = tool.string("type")
    if kind != "function":
        raise tool.fail("type", f"must be 'function', got {shown(kind)}")
    function = tool.object("function")
    if function is None:
        raise tool.fail("function", "must be an object with a name")
    found = read_function(function)
    function.close()
    tool.close()
    return found


def read_format(
    dialect: Dialect, body: Body, name: str = "response_format"
) -> str | None:
    """The grammar of OpenAI's ``response_format``."""
    wanted = body.object(name)
    if wanted is None:
        return None
    kind = wanted.choice("type", ("text", "json_object", "json_schema"), "text")
    texts = dialect.service.texts
    grammar = None
    if kind == "json_object":
        grammar = texts.json_grammar(None, wanted.path("type"))
    elif kind == "json_schema":
        schema = wanted.object("json_schema")
        if schema is None:
            raise wanted.fail("json_schema", "must be an object with a schema")
        grammar = read_schema(schema, texts)
        schema.close()
    wanted.close()
    return grammar


def template_arguments(
    dialect: Dialect, body: Body, is_constrained: bool
) -> dict[str, Any]:
    """What the chat template gets beside the messages.

    Raises:
        ApiError: 400: it does not know what is asked for.
    """
    arguments = dict(body.mapping("chat_template_kwargs") or {})
    for name in (
        "messages",
        "tools",
        "tokenize",
        "add_generation_prompt",
        "return_dict",
    ):
        if name in arguments:
            raise body.fail("chat_template_kwargs", f"must not hold {name}")
    arguments |= read_effort(body, "reasoning_effort", dialect.service.texts)
    if is_constrained:  # a grammar begins with the answer: there is no thought before
        arguments.setdefault("enable_thinking", False)
    return arguments
