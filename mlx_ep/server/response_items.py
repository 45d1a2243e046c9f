"""The output items of ``/v1/responses``, with the events that build them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_ep.server.answers import Call
from mlx_ep.server.dialect import logprob_entry
from mlx_ep.server.requests import Token
from mlx_ep.server.service import Service

Event = tuple[str, dict[str, Any]]
# Kind of a piece -> names of its item's part and events.
_PARTS = {"text": "output_text", "reasoning": "reasoning_text"}


def text_logprobs(service: Service, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """In the form of this API, without ids."""
    return [logprob_entry(service, token, with_id=False) for token in tokens]


class Items:
    """Output items, one after the other; each method gives the events.

    Args:
        output: finished items are appended.
    """

    def __init__(self, output: list[dict[str, Any]]) -> None:
        self._output = output
        self._kind = ""
        self._item: dict[str, Any] = {}
        self._part: dict[str, Any] = {}

    def add(
        self, kind: str, text: str, logprobs: list[dict[str, Any]]
    ) -> Iterator[Event]:
        """A part of a text or a thought."""
        if kind != self._kind:
            yield from self.close()
            yield from self._open(kind)
        self._part["text"] += text
        content: dict[str, Any] = {**self._place, "delta": text}
        if kind == "text":
            self._part["logprobs"] += logprobs
            content["logprobs"] = logprobs
        yield f"response.{_PARTS[kind]}.delta", content

    def call(self, call: Call) -> Iterator[Event]:
        """A whole tool call."""
        yield from self.close()
        item = {
            "type": "function_call",
            "id": f"fc_{uuid.uuid4().hex}",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        index = len(self._output)
        place = {"item_id": item["id"], "output_index": index}
        yield "response.output_item.added", {"output_index": index, "item": item}
        name = "response.function_call_arguments"
        yield f"{name}.delta", {**place, "delta": call.arguments}
        done = {**place, "arguments": call.arguments, "name": call.name}
        yield f"{name}.done", done
        item = {**item, "arguments": call.arguments, "status": "completed"}
        self._output.append(item)
        yield "response.output_item.done", {"output_index": index, "item": item}

    def _open(self, kind: str) -> Iterator[Event]:
        self._kind = kind
        self._part = {"type": _PARTS[kind], "text": ""}
        if kind == "text":
            self._part |= {"annotations": [], "logprobs": []}
            self._item = {
                "type": "message",
                "id": f"msg_{uuid.uuid4().hex}",
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
        else:
            self._item = {
                "type": "reasoning",
                "id": f"rs_{uuid.uuid4().hex}",
                "status": "in_progress",
                "summary": [],
                "content": [],
            }
        index = len(self._output)
        item = dict(self._item)
        yield "response.output_item.added", {"output_index": index, "item": item}
        part = dict(self._part)
        if kind == "text":
            yield "response.content_part.added", {**self._place, "part": part}

    @property
    def _place(self) -> dict[str, Any]:
        return {
            "item_id": self._item["id"],
            "output_index": len(self._output),
            "content_index": 0,
        }

    def close(self) -> Iterator[Event]:
        """The end of the item that is open, if one is."""
        if not self._kind:
            return
        place, part = self._place, self._part
        done = {**place, "text": part["text"]}
        if self._kind == "text":
            done["logprobs"] = part["logprobs"]
        yield f"response.{_PARTS[self._kind]}.done", done
        if self._kind == "text":
            yield "response.content_part.done", {**place, "part": part}
        item = {**self._item, "status": "completed", "content": [part]}
        index = len(self._output)
        self._output.append(item)
        self._kind = ""
        yield "response.output_item.done", {"output_index": index, "item": item}
