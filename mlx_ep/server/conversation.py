"""Conversations in OpenAI's form, as chat templates take them."""

from __future__ import annotations

import json
from typing import Any

from mlx_ep.server.body import Body, shown
from mlx_ep.server.errors import ApiError

_ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_ONLY = "this server reads and writes text only"


def read_messages(body: Body) -> list[dict[str, Any]]:
    """``messages``, their content as one text each.

    Raises:
        ApiError: 400.
    """
    messages = [_message(message) for message in body.objects("messages")]
    if not messages:
        raise body.fail("messages", "must be an array of at least one message")
    return messages


def _message(message: Body) -> dict[str, Any]:
    if not message.has("role"):
        raise message.fail("role", f"must be one of {', '.join(_ROLES)}")
    role = message.choice("role", _ROLES, "")
    found: dict[str, Any] = {"role": role, "content": read_content(message)}
    if name := message.string("name"):
        found["name"] = name
    if role == "assistant":
        # What an earlier answer of this server had; templates know it by either name.
        for field in ("reasoning", "reasoning_content"):
            if thought := message.string(field):
                found["reasoning_content"] = thought
        calls = [_call(call) for call in message.objects("tool_calls")]
        if calls:
            found["tool_calls"] = calls
        message.refuse({"function_call": "use tool_calls", "audio": TEXT_ONLY})
        message.ignore("refusal", "annotations")
    if role == "tool":
        found["tool_call_id"] = message.string("tool_call_id")
    message.close()
    return found


def read_content(message: Body, name: str = "content") -> str:
    """A text, or an array of parts that are texts.

    Raises:
        ApiError: 400; images and sounds by name.
    """
    content = message.value(name)
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise message.fail(
            name, f"must be a string or an array of text parts, got {shown(content)}"
        )
    return "".join(map(_part, message.objects(name)))


def _part(part: Body) -> str:
    kind = part.string("type")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        path = part.path("type")
        raise ApiError(
            400,
            f"{path} must be 'text': {TEXT_ONLY}; got {shown(kind)}",
            path,
            "unsupported_content",
        )
    part.ignore("annotations", "logprobs", "cache_control", "prompt_cache_breakpoint")
    text = part.string("refusal" if kind == "refusal" else "text")
    part.close()
    return text


def _call(call: Body) -> dict[str, Any]:
    function = call.object("function")
    if function is None:
        raise call.fail("function", "must be an object with name and arguments")
    call.choice("type", ("function",), "function")
    found = {
        "id": call.string("id"),
        "type": "function",
        "function": {
            "name": function.string("name"),
            "arguments": read_arguments(function),
        },
    }
    function.close()
    call.ignore("index")
    call.close()
    return found


def read_arguments(function: Body) -> dict[str, Any]:
    """A call's ``arguments``, which templates want as an object.

    Raises:
        ApiError: 400.
    """
    text = function.string("arguments") or "{}"
    try:
        arguments = json.loads(text)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise function.fail("arguments", f"must be a JSON object, got {shown(text)}")
    return arguments
