"""Requests to an OpenAI endpoint, and when their tokens came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_ep.benchmark.wire import EndpointClient

_WORDS = """
memory cache daemon thread packet kernel socket buffer stack queue worker server client
token router expert layer batch model cluster
"""
WORDS = tuple(_WORDS.split())
# Fewer words than this say too little about how many tokens a word is.
PROBE_WORDS = 200


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        at: s from the start; None: as soon as there is room.
        follows: the number of the request that has to end first, `at` s before.
        token_ids: the prompt itself, where a trace has it and the server takes ids.
    """

    input_tokens: int
    output_tokens: int
    at: float | None = None
    follows: int | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass
class Reply:
    """What a client saw; times in s of one clock.

    Attributes:
        input_tokens, output_tokens: as the server counts them.
        chunks: when each part with text came.
        error: why there is no answer, or "".
    """

    number: int
    sent: float
    input_tokens: int = 0
    output_tokens: int = 0
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0
    error: str = ""

    @property
    def first(self) -> float:
        return self.chunks[0] if self.chunks else self.ended

    @property
    def last(self) -> float:
        return self.chunks[-1] if self.chunks else self.ended

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(self.output_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:])]

    def record(self) -> dict[str, Any]:
        """A line that `mlx_ep.simulate calibrate` and `validate` read."""
        return {
            "request_id": f"request-{self.number}",
            "input_toks": self.input_tokens,
            "output_toks": self.output_tokens,
            "queued_ts": self.sent,
            "first_token_ts": self.first,
            "last_token_ts": self.last,
        }


class Target:
    """A server under load; use it as ``async with``.

    Args:
        address: of the API, with its /v1.
        body: further fields of every request.
        connections: at once.
        seconds: for one answer.
    """

    def __init__(
        self,
        address: str,
        model: str,
        api_key: str | None = None,
        body: Mapping[str, Any] | None = None,
        connections: int = 64,
        seconds: float = 600.0,
        chat: bool = True,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._wire = EndpointClient(address, headers, connections, seconds)
        self._address, self._model = address.rstrip("/"), model
        self._body, self._chat = dict(body or {}), chat
        # Tokens of a prompt: of its template, and of each word.
        self._fixed, self._per_word = 0.0, 1.0

    async def __aenter__(self) -> Target:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._wire.close()

    async def measure_words(self, most: int = PROBE_WORDS) -> None:
        """Find how many tokens a word is, by two requests.

        Args:
            most: words of the longer one.

        Raises:
            ValueError: the server does not answer them.
        """
        counts = []
        for words in (1, most):
            reply = await self._ask(-1, _text(words, random.Random(0)), 1)
            if reply.error or not reply.input_tokens:
                problem = reply.error or "it does not say how many tokens a prompt has"
                raise ValueError(f"{self._address} must answer: {problem}.")
            counts.append(reply.input_tokens)
        self._per_word = (counts[1] - counts[0]) / (most - 1)
        self._fixed = counts[0] - self._per_word

    async def ask(self, number: int, asked: Ask, rng: random.Random) -> Reply:
        """One request of about as many tokens as asked for."""
        if asked.token_ids is not None:
            prompt: Any = list(asked.token_ids)
        else:
            words = round((asked.input_tokens - self._fixed) / self._per_word)
            prompt = _text(max(words, 1), rng)
        return await self._ask(number, prompt, asked.output_tokens)

    async def _ask(self, number: int, prompt: Any, most: int) -> Reply:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": most,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._body,
        }
        is_chat = self._chat and isinstance(prompt, str)
        if is_chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        text = json.dumps(body).encode()
        reply = Reply(number, time.perf_counter())
        try:
            answer = await self._wire.post(
                "/chat/completions" if is_chat else "/completions", text
            )
            if answer.status == 200:
                reply.ended = time.perf_counter()
                _read(answer.parts, reply)
            else:
                said = answer.body.decode(errors="replace")
                reply.error = f"HTTP {answer.status}: {said[:300]}"
        except OSError as error:
            reply.error = f"{type(error).__name__}: {error}"
        reply.ended = reply.ended or time.perf_counter()
        if not reply.error and not reply.output_tokens:
            reply.error = "the stream ended without its usage"
        return reply


def _read(parts: Iterable[tuple[float, bytes]], reply: Reply) -> None:
    """Take the times and counts from a stream of server-sent events."""
    held = b""
    for now, part in parts:
        held += part
        *events, held = held.split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: ") or event == b"data: [DONE]":
                continue
            content = json.loads(event[6:])
            if "error" in content:
                reply.error = str(content["error"])
                return
            if usage := content.get("usage"):
                reply.input_tokens = usage["prompt_tokens"]
                reply.output_tokens = usage["completion_tokens"]
            for choice in content["choices"]:
                delta = choice.get("delta") or choice
                if any(delta.get(k) for k in ("content", "text", "reasoning")):
                    reply.chunks.append(now)


def _text(words: int, rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def arrivals(asked: Sequence[Ask], rate: float, seed: int) -> list[Ask]:
    """The requests at Poisson times: gaps are exponential, 1 / `rate` s on average."""
    rng, now, found = random.Random(seed), 0.0, []
    for one in asked:
        found.append(Ask(one.input_tokens, one.output_tokens, now))
        now += rng.expovariate(rate)
    return found


async def run_load(
    target: Target,
    asked: Sequence[Ask],
    concurrency: int | None,
    seed: int = 0,
    on_reply: Callable[[Reply], object] = lambda reply: None,
) -> list[Reply]:
    """Ask everything; returns when all have ended, in the order of `asked`.

    Args:
        concurrency: requests that are open at most; None: no bound.
        on_reply: called with each reply when it is complete.
    """
    room = asyncio.Semaphore(concurrency or len(asked))
    ended = [asyncio.Event() for _ in asked]
    start = time.perf_counter()

    async def one(number: int) -> Reply:
        request = asked[number]
        if request.follows is not None:
            await ended[request.follows].wait()
            await asyncio.sleep(request.at or 0.0)
        elif request.at is not None:
            await asyncio.sleep(start + request.at - time.perf_counter())
        async with room:
            rng = random.Random(f"{seed}/{number}")
            reply = await target.ask(number, request, rng)
        ended[number].set()
        on_reply(reply)
        return reply

    work: list[Awaitable[Reply]] = [one(number) for number in range(len(asked))]
    return list(await asyncio.gather(*work))
