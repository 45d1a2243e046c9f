"""An endpoint that generates: what the APIs of OpenAI and Anthropic have in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

from mlx_ep.server.answers import Answers
from mlx_ep.server.asked import Asked
from mlx_ep.server.body import Body
from mlx_ep.server.errors import ApiError
from mlx_ep.server.requests import Token
from mlx_ep.server.service import Service


class Dialect(ABC):
    """One request in the words of one API; made anew for each.

    Attributes:
        prefix: of the answer's id.
    """

    prefix: ClassVar[str]

    def __init__(self, service: Service) -> None:
        self.service = service

    @abstractmethod
    def read(self, body: Body) -> Asked:
        """Read and check a body; beside the event loop.

        Raises:
            ApiError: 400 or 404.
        """

    @abstractmethod
    def whole(self, answers: Answers) -> dict[str, Any]:
        """The answer to a request without ``stream``, when all is there."""

    @abstractmethod
    def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The answer to a request with ``stream``, as server-sent events.

        Raises:
            ApiError: the engine has failed.
        """

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body of an error."""
        return error.openai

    def error_event(self, error: ApiError) -> bytes:
        """An error within a stream."""
        return event(error.openai)


def event(content: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {data}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def usage(answers: Answers) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answers.generated,
        "total_tokens": answers.prompt_tokens + answers.generated,
        "prompt_tokens_details": {"cached_tokens": answers.cached},
        "completion_tokens_details": {"reasoning_tokens": answers.thought},
    }


def logprob_entry(
    service: Service, token: Token, with_id: bool = True
) -> dict[str, Any]:
    """A token with its log probability and those of the likeliest, as OpenAI has it."""
    assert token.token is not None
    entry = _entry(service, token.token, token.logprob, with_id)
    entry["top_logprobs"] = [
        _entry(service, number, logprob, with_id)
        for number, logprob in token.top_logprobs
    ]
    return entry


def _entry(
    service: Service, token: int, logprob: float | None, with_id: bool
) -> dict[str, Any]:
    number = {"id": token} if with_id else {}
    return number | {
        "token": service.texts.token_text(token),
        "logprob": logprob,
        "bytes": list(service.texts.token_bytes(token)),
    }
