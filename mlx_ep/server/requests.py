"""What the HTTP side of the server and its engine say to each other.

The HTTP side knows text, chat templates, tools and JSON; the engine knows token ids.
A `Request` goes in by `Engine.submit`, `Token` events come out through its `deliver`,
the last one with a `finish_reason`. Only plain data: a request travels to other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

FinishReason = Literal["stop", "length", "cancelled", "error"]


class QueueFull(Exception):  # noqa: N818
    """As many requests wait as may; `retry_after` in seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopping(Exception):  # noqa: N818
    """The server drains or has failed; the message says why."""


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; the defaults are mlx_lm.server's.

    Attributes:
        temperature: 0 takes the most likely token.
        seed: a request with a seed draws the same tokens whoever runs beside it; None
            draws from the server's own stream.
        logit_bias: token id -> what is added to its logit.
        top_logprobs: how many of the most likely tokens an event names; 0 none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        tokens: the prompt's ids, at least one, within the model's context.
        max_tokens: how many to generate at most.
        stop: sequences of ids that end the answer, beside the model's own end tokens;
            the ids of a match are delivered, the HTTP side cuts the text.
        grammar: a Lark or JSON-schema grammar in the grammar library's own wire form;
            no token outside it is ever drawn. None: free text.
    """

    id: str
    tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[tuple[int, ...], ...] = ()
    grammar: str | None = None


@dataclass(frozen=True)
class Token:
    """One generated token of a request, or its end.

    Attributes:
        token: its id; None in an event that only ends the request.
        logprob: its natural log probability, where asked for.
        top_logprobs: (id, logprob) of the most likely ones, most likely first.
        cached: prompt tokens that came from the prefix cache; in the first event.
        finish_reason: set in the last event of a request only.
        message: why, with finish_reason "error".
    """

    request: str
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    cached: int = 0
    finish_reason: FinishReason | None = None
    message: str = ""


@dataclass(frozen=True)
class RankState:
    """What one rank holds: bytes of memory, of its KV pool, and active requests."""

    rank: int
    memory: int
    kv_used: int
    kv_limit: int
    active: int


@dataclass(frozen=True)
class EngineState:
    """A moment of the engine, for /health, /metrics and the page.

    Attributes:
        failed: why the engine cannot go on (names the rank), or "".
        steps: engine steps so far; tokens: (prompt, generated) so far.
        experts: load of each rank per layer, rows routed to it since the start or the
            last reset, [layers][ranks]; empty while nothing is recorded.
    """

    running: int
    waiting: int
    steps: int
    tokens: tuple[int, int]
    cache_hits: int
    cache_bytes: int
    cache_limit: int
    attention: str
    ranks: tuple[RankState, ...] = ()
    experts: tuple[tuple[float, ...], ...] = ()
    failed: str = ""
    draining: bool = False


@runtime_checkable
class Engine(Protocol):
    """What rank 0's HTTP thread may ask of the engine; every method is thread-safe."""

    context: int
    """Most tokens of a prompt and its answer together."""

    def submit(self, request: Request, deliver: Callable[[Token], None]) -> None:
        """Queue a request; `deliver` is called on the engine's thread, and quickly.

        Raises:
            QueueFull: as many wait as may.
            Stopping: the server drains or has failed.
        """

    def expect(self, count: int) -> None:
        """So many requests more (fewer, where negative) will soon be submitted.

        A request that enters waits for them for a moment: prompts in one pass take less
        time than one after another.
        """

    def cancel(self, request: str) -> None:
        """End a request within one step on every rank; unknown ids are ignored."""

    def state(self) -> EngineState:
        """A snapshot; never waits for a step."""

    def drain(self) -> None:
        """Take no more requests; those in flight go on."""

    def record(self, action: Literal["start", "stop", "dump"]) -> dict[str, object]:
        """Expert distribution: start or stop counting, or give the counts."""
