"""The server's HTTP side on a port, over an engine that says given texts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from transformers import AutoTokenizer

from mlx_ep.loading import find_model
from mlx_ep.server.app import make_app
from mlx_ep.server.asked import Defaults, Names
from mlx_ep.server.listener import Listener, PortLimits, open_port
from mlx_ep.server.requests import Request
from mlx_ep.server.service import Access, Service
from mlx_ep.server.texts import Texts
from tests.support.text_engine import TextEngine
from tests.support.waiting import LONG, until

# Says what it is given, so that a test can read a prompt: tools, thoughts, calls.
TEMPLATE = """\
{{- bos_token }}
{%- if tools %}tools:
{%- for tool in tools %}{{ tool.function.name }};{% endfor %}{% endif %}
{%- for message in messages %}<|user|>{{ message.role }}:{{ message.content }}
{%- for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}
{%- endfor %}<|assistant|>{% if enable_thinking and opens %}<think>{% endif %}"""


@functools.cache
def tokenizer() -> TokenizerWrapper:
    """jargon-moe's, with thoughts and tool calls as Qwen has them."""
    inner = AutoTokenizer.from_pretrained(find_model("jargon-moe"))
    inner.add_tokens(["<think>", "</think>"], special_tokens=True)
    inner.chat_template = TEMPLATE
    return TokenizerWrapper(
        inner,
        BPEStreamingDetokenizer,
        tool_call_start=json_tools.tool_call_start,
        tool_call_end=json_tools.tool_call_end,
        tool_parser=json_tools.parse_tool_call,
    )


@functools.cache
def library() -> LLTokenizer:
    return from_tokenizer(tokenizer()._tokenizer, eos_token=[end_token()])


def end_token() -> int:
    return min(tokenizer().eos_token_ids)


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


class Endless(Sequence[int]):
    """A text again and again: an answer that only its limit or its client ends."""

    def __init__(self, text: str) -> None:
        self._ids = ids(text)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return self._ids[index % len(self._ids)]


def saying(text: str) -> Callable[[Request], Sequence[int]]:
    """The same text to everybody, and its end."""
    said = [*ids(text), end_token()]
    return lambda request: said


@dataclass
class Serving:
    """A server that runs.

    Attributes:
        client: with its address.
    """

    engine: TextEngine
    address: str
    client: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def chat(self, text: str = "hi", **fields: Any) -> dict[str, Any]:
        """The answer of a chat that has to be one."""
        messages = [{"role": "user", "content": text}]
        response = self.post("/v1/chat/completions", **{"messages": messages, **fields})
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def serving(
    answer: str | Callable[[Request], Sequence[int]] = "Hello there.",
    *,
    access: Access | None = None,
    limits: PortLimits | None = None,
    names: Sequence[str] = ("jargon-moe", "gpt-4o"),
    headers: dict[str, str] | None = None,
    **engine_options: Any,
) -> Iterator[Serving]:
    """A server on a free port of 127.0.0.1.

    Args:
        answer: what the engine says.
        engine_options: of `TextEngine`.
    """
    answer_of = saying(answer) if isinstance(answer, str) else answer
    engine = TextEngine(answer_of, [end_token()], library(), **engine_options)
    access = access or Access()
    texts = Texts(tokenizer())

    def make_service() -> Service:
        return Service(engine, texts, Names(tuple(names)), Defaults(), access)

    port = open_port("127.0.0.1", 0)
    address = f"http://127.0.0.1:{port.getsockname()[1]}"
    listener = Listener(make_app(make_service, access), port, limits or PortLimits())
    listener.start()
    try:
        with httpx.Client(base_url=address, headers=headers, timeout=LONG) as client:
            yield Serving(engine, address, client)
    finally:
        listener.stop()
        engine.stop()
    until(lambda: not listener.is_alive)
