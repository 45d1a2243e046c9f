"""Anthropic's ``/v1/messages``."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from mlx_ep.server.answers import Answers, AnswerSoFar, Call
from mlx_ep.server.asked import (
    Asked,
    choose_tools,
    fitting,
    read_function,
    read_sampling,
    read_stops,
)
from mlx_ep.server.body import Body, shown
from mlx_ep.server.conversation import TEXT_ONLY, read_content
from mlx_ep.server.dialect import Dialect, event
from mlx_ep.server.errors import ApiError
from mlx_ep.server.openai_chat import template_arguments
from mlx_ep.server.texts import PromptTokens

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_REFUSED = {
    "container": "the server runs no code",
    "mcp_servers": "the server calls no tools itself",
    "context_management": "send the messages that are to be read",
}


class MessagesDialect(Dialect):
    prefix = "msg_"

    def read(self, body: Body) -> Asked:
        service = self.service
        model = service.names.check(body)
        body.ignore("metadata", "service_tier", "cache_control", "inference_geo")
        body.refuse(_REFUSED)
        if not body.has("max_tokens"):
            raise body.fail("max_tokens", "must be given")
        max_tokens = body.integer("max_tokens", 1, 1)
        sampling = read_sampling(body, service.defaults, service.texts.vocabulary)
        stops = read_stops(body, "stop_sequences")
        stream = body.boolean("stream")
        grammar = self._format(body)
        prompt, tools, must_call, parallel = self.read_prompt(body, grammar is not None)
        body.close()
        if must_call:
            grammar = service.texts.call_grammar(tools, "tool_choice")
        return Asked(
            model=model,
            prompts=(prompt,),
            max_tokens=fitting(
                (prompt,), max_tokens, service.engine.context, "messages"
            ),
            sampling=sampling,
            stops=stops,
            grammar=grammar,
            tools=tuple(tools),
            parallel=parallel,
            stream=stream,
        )

    def _format(self, body: Body) -> str | None:
        """The grammar of ``output_config.format`` (or ``output_format``)."""
        config = body.object("output_config")
        wanted = config.object("format") if config else body.object("output_format")
        if config is not None:
            config.close()
        if wanted is None:
            return None
        wanted.choice("type", ("json_schema",), "json_schema")
        schema = wanted.mapping("schema")
        if schema is None:
            raise wanted.fail("schema", "must be a JSON schema")
        wanted.close()
        return self.service.texts.json_grammar(schema, wanted.path("schema"))

    def read_prompt(
        self, body: Body, is_constrained: bool = False
    ) -> tuple[PromptTokens, list[dict[str, Any]], bool, bool]:
        """Messages and tools: the prompt, tools, whether one has to be called, and
        whether several may be.
        """
        tools = [_tool(tool) for tool in body.objects("tools")]
        choice = body.object("tool_choice")
        must_call, parallel = False, True
        if choice is not None:
            kind = choice.choice("type", ("auto", "any", "tool", "none"), "auto")
            kind = {"any": "required", "tool": "function"}.get(kind, kind)
            tools, must_call = choose_tools(
                kind, choice.string("name"), tools, "tool_choice"
            )
            parallel = not choice.boolean("disable_parallel_tool_use")
            choice.close()
        arguments = template_arguments(self, body, is_constrained or must_call)
        arguments |= _thinking(body)
        messages = []
        if system := read_content(body, "system"):
            messages.append({"role": "system", "content": system})
        for message in body.objects("messages"):
            messages += _messages(message)
        if not body.array("messages"):
            raise body.fail("messages", "must be an array of at least one message")
        return (
            self.service.texts.chat(messages, tools, arguments),
            tools,
            must_call,
            parallel,
        )

    def error(self, error: ApiError) -> dict[str, Any]:
        return error.anthropic

    def error_event(self, error: ApiError) -> bytes:
        return event(error.anthropic, "error")

    def whole(self, answers: Answers) -> dict[str, Any]:
        (answer,) = answers.answers
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append(_thought(answer.reasoning))
        if answer.content:
            content.append({"type": "text", "text": answer.content})
        content += map(_tool_use, answer.calls)
        return self._head(answers) | {
            "content": content,
            **_stop(answer),
            "usage": self._usage(answers),
        }

    def _head(self, answers: Answers) -> dict[str, Any]:
        return {
            "id": answers.identity,
            "type": "message",
            "role": "assistant",
            "model": answers.asked.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": answers.prompt_tokens, "output_tokens": 0},
        }

    def _usage(self, answers: Answers) -> dict[str, int]:
        """Anthropic counts what came from a cache beside the rest."""
        return {
            "input_tokens": answers.prompt_tokens - answers.cached,
            "cache_read_input_tokens": answers.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": answers.generated,
        }

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        yield _event("message_start", message=self._head(answers))
        blocks = _Blocks()
        async for deltas in answers.deltas():
            parts: list[bytes] = []
            for delta in deltas:
                for piece in delta.pieces:
                    parts += blocks.text(piece.kind, piece.text)
                for call in delta.calls:
                    parts += blocks.call(call)
            if parts:
                yield b"".join(parts)
        (answer,) = answers.answers
        end = [
            *blocks.close(),
            _event("message_delta", delta=_stop(answer), usage=self._usage(answers)),
            _event("message_stop"),
        ]
        yield b"".join(end)


class _Blocks:
    """The events of content blocks, one block after the other."""

    def __init__(self) -> None:
        self._kind = ""
        self._index = -1

    def text(self, kind: str, text: str) -> list[bytes]:
        events = []
        if kind != self._kind:
            block = _thought("") if kind == "reasoning" else {"type": kind, "text": ""}
            events += self._open(kind, block)
        if kind == "reasoning":
            delta = {"type": "thinking_delta", "thinking": text}
        else:
            delta = {"type": "text_delta", "text": text}
        return [*events, self._delta(delta)]

    def call(self, call: Call) -> list[bytes]:
        block = {**_tool_use(call), "input": {}}
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        return [*self._open("tool", block), self._delta(delta), *self.close()]

    def _open(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        events = self.close()
        self._kind = kind
        self._index += 1
        start = _event("content_block_start", index=self._index, content_block=block)
        return [*events, start]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def close(self) -> list[bytes]:
        if not self._kind:
            return []
        self._kind = ""
        return [_event("content_block_stop", index=self._index)]


def _event(name: str, **content: Any) -> bytes:
    return event({"type": name, **content}, name)


def _stop(answer: AnswerSoFar) -> dict[str, Any]:
    if answer.text.stopped:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.text.stopped}
    return {"stop_reason": _REASONS[answer.finish or "stop"], "stop_sequence": None}


def _thought(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _tool_use(call: Call) -> dict[str, Any]:
    content = json.loads(call.arguments)
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": content}


def _thinking(body: Body) -> dict[str, bool]:
    """Of ``thinking`` a template knows only whether; a budget cannot be held."""
    thinking = body.object("thinking")
    if thinking is None:
        return {}
    kind = thinking.choice("type", ("enabled", "disabled", "adaptive"), "enabled")
    thinking.integer("budget_tokens", 1024, 1)
    thinking.ignore("display")
    thinking.close()
    return {"enable_thinking": kind != "disabled"}


def _tool(tool: Body) -> dict[str, Any]:
    kind = tool.string("type", "custom")
    if kind != "custom":
        raise tool.fail(
            "type",
            f"must be 'custom': the server runs no tools itself; got {shown(kind)}",
        )
    tool.ignore("cache_control", "eager_input_streaming")
    schema = tool.mapping("input_schema")
    if schema is None:
        raise tool.fail("input_schema", "must be a JSON schema")
    named = {k: v for k, v in tool.content.items() if k in ("name", "description")}
    tool.ignore("name", "description", "strict")
    tool.close()
    return read_function(Body({**named, "parameters": schema}, tool.where))


def _messages(message: Body) -> list[dict[str, Any]]:
    """Those of OpenAI that one of Anthropic's is: there, results of tools are some."""
    role = message.choice("role", ("user", "assistant", "system"), "user")
    content = message.value("content")
    message.close()
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    found: list[dict[str, Any]] = []
    texts, calls, thoughts = [], [], []
    for block in message.objects("content"):
        kind = block.string("type")
        block.ignore("cache_control", "citations", "signature", "caller")
        if kind == "text":
            texts.append(block.string("text"))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(block.string("thinking"))
        elif kind == "tool_use" and role == "assistant":
            function = {
                "name": block.string("name"),
                "arguments": block.mapping("input") or {},
            }
            calls.append(
                {"id": block.string("id"), "type": "function", "function": function}
            )
        elif kind == "tool_result" and role == "user":
            block.boolean("is_error")
            found.append(
                {
                    "role": "tool",
                    "tool_call_id": block.string("tool_use_id"),
                    "content": read_content(block),
                }
            )
        else:
            path = block.path("type")
            raise ApiError(
                400,
                f"{path} must be text, thinking, tool_use or tool_result: {TEXT_ONLY}; "
                f"got {shown(kind)} of {role}",
                path,
                "unsupported_content",
            )
        block.close()
    if texts or calls or thoughts or not found:
        one: dict[str, Any] = {"role": role, "content": "".join(texts)}
        if calls:
            one["tool_calls"] = calls
        if thoughts:
            one["reasoning_content"] = "".join(thoughts)
        found.append(one)
    return found
