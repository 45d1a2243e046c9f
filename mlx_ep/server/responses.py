"""OpenAI's ``/v1/responses``: one answer, nothing kept."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from mlx_ep.server.answers import Answers, AnswerSoFar
from mlx_ep.server.asked import (
    Asked,
    fitting,
    read_effort,
    read_function,
    read_sampling,
    read_schema,
    read_stops,
    read_tool_choice,
    read_top_logprobs,
)
from mlx_ep.server.body import Body, shown
from mlx_ep.server.conversation import read_arguments, read_content
from mlx_ep.server.dialect import Dialect, event
from mlx_ep.server.errors import ApiError
from mlx_ep.server.openai_chat import IGNORED, template_arguments
from mlx_ep.server.response_items import Items, text_logprobs

_REFUSED = {
    "previous_response_id": "answers are not kept; send the whole conversation",
    "conversation": "answers are not kept; send the whole conversation",
    "prompt": "there are no stored prompts",
    "max_tool_calls": "the server calls no tools itself",
    "context_management": "send the messages that are to be read",
}
_LOGPROBS = "message.output_text.logprobs"


class ResponsesDialect(Dialect):
    prefix = "resp_"
    _echo: dict[str, Any]

    def read(self, body: Body) -> Asked:
        service = self.service
        model = service.names.check(body)
        body.ignore(*IGNORED)
        body.refuse(_REFUSED)
        body.refuse({"store": "answers are not kept"}, False)
        body.refuse({"background": "an answer comes on its own connection"}, False)
        body.refuse({"truncation": "a prompt that is too long is an error"}, "disabled")
        options = body.object("stream_options")
        if options is not None:
            options.ignore("include_obfuscation")
            options.close()
        include = body.array("include")
        if include not in ([], [_LOGPROBS]):
            raise body.fail("include", f"must hold {_LOGPROBS} only")
        top = read_top_logprobs(body)
        sampling = dataclasses.replace(
            read_sampling(body, service.defaults, service.texts.vocabulary),
            logprobs=bool(include) or top > 0,
            top_logprobs=top,
        )
        tools = [_tool(tool) for tool in body.objects("tools")]
        tools, must_call = read_tool_choice(body, tools, None)
        grammar = self._format(body)
        if must_call:
            grammar = service.texts.call_grammar(tools, "tool_choice")
        parallel = body.boolean("parallel_tool_calls", True)
        arguments = template_arguments(self, body, grammar is not None)
        self._reasoning(body, arguments)
        max_tokens = body.integer("max_output_tokens", service.defaults.max_tokens, 1)
        stops = read_stops(body, "stop")
        stream = body.boolean("stream")
        messages = self._messages(body)
        self._echo = self._echoed(body, sampling.temperature, sampling.top_p, parallel)
        body.close()
        prompt = service.texts.chat(messages, tools, arguments)
        return Asked(
            model=model,
            prompts=(prompt,),
            max_tokens=fitting((prompt,), max_tokens, service.engine.context, "input"),
            sampling=sampling,
            stops=stops,
            grammar=grammar,
            tools=tuple(tools),
            parallel=parallel,
            stream=stream,
        )

    def _format(self, body: Body) -> str | None:
        text = body.object("text")
        if text is None:
            return None
        text.refuse({"verbosity": "say it in the input"}, "medium")
        wanted = text.object("format")
        text.close()
        if wanted is None:
            return None
        kind = wanted.choice("type", ("text", "json_object", "json_schema"), "text")
        grammar = None
        if kind == "json_object":
            grammar = self.service.texts.json_grammar(None, wanted.path("type"))
        elif kind == "json_schema":
            grammar = read_schema(wanted, self.service.texts)
        wanted.close()
        return grammar

    def _reasoning(self, body: Body, arguments: dict[str, Any]) -> None:
        reasoning = body.object("reasoning")
        if reasoning is None:
            return
        arguments |= read_effort(reasoning, "effort", self.service.texts)
        reasoning.refuse(
            dict.fromkeys(("summary", "generate_summary"), "thoughts come as they are")
        )
        reasoning.close()

    def _messages(self, body: Body) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if instructions := body.string("instructions"):
            messages.append({"role": "system", "content": instructions})
        given = body.value("input")
        if isinstance(given, str) and given:
            return [*messages, {"role": "user", "content": given}]
        if not isinstance(given, list) or not given:
            raise body.fail(
                "input", f"must be a text or an array of items, got {shown(given)}"
            )
        for item in body.objects("input"):
            _add_item(messages, item)
        return messages

    def _echoed(
        self, body: Body, temperature: float, top_p: float, parallel: bool
    ) -> dict[str, Any]:
        """What of a request its answer repeats."""
        given = body.content
        return {
            "instructions": given.get("instructions"),
            "metadata": given.get("metadata") or {},
            "tools": given.get("tools") or [],
            "tool_choice": given.get("tool_choice") or "auto",
            "text": given.get("text") or {"format": {"type": "text"}},
            "max_output_tokens": given.get("max_output_tokens"),
            "temperature": temperature,
            "top_p": top_p,
            "parallel_tool_calls": parallel,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def _response(
        self, answers: Answers, status: str, output: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return {
            "id": answers.identity,
            "object": "response",
            "created_at": answers.created,
            "status": status,
            "model": answers.asked.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **self._echo,
        }

    def whole(self, answers: Answers) -> dict[str, Any]:
        (answer,) = answers.answers
        output: list[dict[str, Any]] = []
        items = Items(output)
        if answer.reasoning:
            list(items.add("reasoning", answer.reasoning, []))
        if answer.content:
            entries = text_logprobs(self.service, answer.tokens)
            list(items.add("text", answer.content, entries))
        for call in answer.calls:
            list(items.call(call))
        list(items.close())
        return self._ended(answers, answer, output)

    def _ended(
        self, answers: Answers, answer: AnswerSoFar, output: list[dict[str, Any]]
    ) -> dict[str, Any]:
        is_cut = answer.finish == "length"
        status = "incomplete" if is_cut else "completed"
        details = {"reason": "max_output_tokens"} if is_cut else None
        return self._response(answers, status, output) | {
            "incomplete_details": details,
            "usage": {
                "input_tokens": answers.prompt_tokens,
                "input_tokens_details": {"cached_tokens": answers.cached},
                "output_tokens": answers.generated,
                "output_tokens_details": {"reasoning_tokens": answers.thought},
                "total_tokens": answers.prompt_tokens + answers.generated,
            },
        }

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        output: list[dict[str, Any]] = []
        items = Items(output)
        number = 0

        def numbered(name: str, content: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            return event({"type": name, "sequence_number": number - 1, **content}, name)

        begun = self._response(answers, "in_progress", [])
        yield numbered("response.created", {"response": begun})
        yield numbered("response.in_progress", {"response": begun})
        async for deltas in answers.deltas():
            parts: list[tuple[str, dict[str, Any]]] = []
            for delta in deltas:
                entries = text_logprobs(self.service, delta.tokens)
                for piece in delta.pieces:
                    said = entries if piece.kind == "text" else []
                    parts += items.add(piece.kind, piece.text, said)
                    entries = entries[len(said) :]
                for call in delta.calls:
                    parts += items.call(call)
            if parts:
                yield b"".join(numbered(*part) for part in parts)
        (answer,) = answers.answers
        closing = b"".join(numbered(*part) for part in items.close())
        ended = self._ended(answers, answer, output)
        name = f"response.{ended['status']}"
        yield closing + numbered(name, {"response": ended})

    def error_event(self, error: ApiError) -> bytes:
        content = {
            "type": "error",
            "sequence_number": 0,
            "code": error.code or error.kind,
            "message": error.message,
            "param": error.param,
        }
        return event(content, "error")


def _add_item(messages: list[dict[str, Any]], item: Body) -> None:
    """One of the input's items, as a message or a part of the last one."""
    kind = item.string("type", "message")
    item.ignore("id", "status", "phase")
    if kind == "message":
        roles = ("user", "assistant", "system", "developer")
        role = item.choice("role", roles, "user")
        messages.append({"role": role, "content": read_content(item)})
    elif kind == "function_call":
        call = {
            "id": item.string("call_id"),
            "type": "function",
            "function": {
                "name": item.string("name"),
                "arguments": read_arguments(item),
            },
        }
        item.ignore("namespace", "caller")
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append(
            {
                "role": "tool",
                "tool_call_id": item.string("call_id"),
                "content": read_content(item, "output"),
            }
        )
    elif kind == "reasoning":
        item.ignore("summary", "content", "encrypted_content")  # templates drop it
    else:
        raise item.fail(
            "type",
            "must be message, function_call, function_call_output or reasoning, got "
            f"{shown(kind)}",
        )
    item.close()


def _tool(tool: Body) -> dict[str, Any]:
    kind = tool.string("type")
    if kind != "function":
        raise tool.fail(
            "type",
            f"must be 'function': the server runs no tools itself; got {shown(kind)}",
        )
    found = read_function(tool)
    tool.close()
    return found
