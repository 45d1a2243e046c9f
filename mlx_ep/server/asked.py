"""What every endpoint makes of its body, and the fields that several of them have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_ep.server.body import Body, shown
from mlx_ep.server.errors import ApiError, wrong
from mlx_ep.server.requests import Sampling
from mlx_ep.server.texts import PromptTokens, Texts

_ANY = float("inf")
_LARGEST_SEED = 2**64 - 1
MOST_CHOICES = 128
_MOST_STOPS = 64
# OpenAI's most; mlx_lm.server's is 11, and its -1 is none.
_MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Defaults:
    """What a request that says nothing gets; the flags of mlx_lm.server."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512


@dataclass(frozen=True)
class Names:
    """What the model is called: its own name first; requests may use any."""

    names: tuple[str, ...]

    def check(self, body: Body) -> str:
        """The name that the request uses, which its answer repeats.

        Raises:
            ApiError: 404: there is no such model here.
        """
        asked = body.string("model", "default_model")
        if asked not in (*self.names, "default_model"):
            raise ApiError(
                404,
                f"model must be one of {', '.join(self.names)} (or default_model), got "
                f"{shown(asked)}",
                body.path("model"),
                "model_not_found",
            )
        return asked


@dataclass(frozen=True)
class Asked:
    """A request that has been read and checked.

    Attributes:
        model: by which name.
        prompts: at least one; each is answered `count` times.
        max_tokens: of an answer; the context may end it before.
        stops: stop strings.
        grammar: in the grammar library's form.
        tools: functions in OpenAI's form, for the parser of calls.
        parallel: whether an answer may hold several calls.
    """

    model: str
    prompts: tuple[PromptTokens, ...]
    max_tokens: int
    sampling: Sampling
    count: int = 1
    stops: tuple[str, ...] = ()
    grammar: str | None = None
    tools: tuple[Mapping[str, Any], ...] = field(default=())
    parallel: bool = True
    stream: bool = False
    include_usage: bool = False


def read_sampling(body: Body, defaults: Defaults, vocabulary: int) -> Sampling:
    """The fields of mlx_lm.server, which are OpenAI's and more; not the logprobs.

    Raises:
        ApiError: 400.
    """
    seed = body.integer("seed", None, 0, _LARGEST_SEED)
    return Sampling(
        temperature=body.number("temperature", defaults.temperature, 0),
        top_p=body.number("top_p", defaults.top_p, 0, 1),
        top_k=body.integer("top_k", defaults.top_k),
        min_p=body.number("min_p", defaults.min_p, 0, 1),
        xtc_probability=body.number("xtc_probability", 0.0, 0, 1),
        xtc_threshold=body.number("xtc_threshold", 0.1, 0, 0.5),
        repetition_penalty=body.number("repetition_penalty", 0.0, 0),
        repetition_context_size=body.integer("repetition_context_size", 20),
        presence_penalty=body.number("presence_penalty", 0.0, -_ANY),
        presence_context_size=body.integer("presence_context_size", 20),
        frequency_penalty=body.number("frequency_penalty", 0.0, -_ANY),
        frequency_context_size=body.integer("frequency_context_size", 20),
        logit_bias=_logit_bias(body, vocabulary),
        seed=seed,
    )


def _logit_bias(body: Body, vocabulary: int) -> dict[int, float]:
    given = body.mapping("logit_bias") or {}
    values = Body(given, body.path("logit_bias"))
    for token in given:
        if not (token.isascii() and token.isdecimal() and int(token) < vocabulary):
            raise body.fail(
                "logit_bias",
                f"must map token ids below {vocabulary} to numbers, got {shown(token)}",
            )
    return {int(token): values.number(token, 0.0, -_ANY) for token in given}


def read_top_logprobs(body: Body) -> int:
    """How many; mlx_lm.server's -1 is none."""
    return max(body.integer("top_logprobs", 0, -1, _MOST_TOP_LOGPROBS), 0)


def read_stops(body: Body, name: str) -> tuple[str, ...]:
    """A string or some.

    Raises:
        ApiError: 400.
    """
    found = body.value(name)
    if found is None:
        return ()
    stops = [found] if isinstance(found, str) else found
    are_strings = isinstance(stops, list) and all(
        isinstance(stop, str) and stop for stop in stops
    )
    if not are_strings or len(stops) > _MOST_STOPS:
        raise body.fail(
            name,
            f"must be a string that is not empty, or up to {_MOST_STOPS} of them, got "
            f"{shown(found)}",
        )
    return tuple(stops)


def read_stream(body: Body) -> tuple[bool, bool]:
    """``stream`` and ``stream_options.include_usage``."""
    stream = body.boolean("stream")
    options = body.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise body.fail("stream_options", "may be given with stream true only")
    include = options.boolean("include_usage")
    options.ignore("include_obfuscation")  # padding against eavesdroppers of sizes
    options.close()
    return stream, include


def fitting(
    prompts: Sequence[PromptTokens], max_tokens: int, context: int, param: str
) -> int:
    """The tokens an answer may have: `max_tokens`, or what the context leaves.

    Raises:
        ApiError: 400, with the numbers: a prompt leaves nothing.
    """
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest >= context:
        raise ApiError(
            400,
            f"{param} must have at most {context - 1} tokens, so that the context of "
            f"{context} tokens has room for an answer; got {longest}",
            param,
            "context_length_exceeded",
        )
    return min(max_tokens, context - longest)


def read_schema(body: Body, texts: Texts) -> str | None:
    """The grammar of OpenAI's ``json_schema`` object.

    Raises:
        ApiError: 400.
    """
    body.string("name")
    body.string("description")
    body.boolean("strict")  # always so here
    schema = body.mapping("schema")
    if schema is None:
        raise body.fail("schema", "must be a JSON schema")
    return texts.json_grammar(schema, body.path("schema"))


def read_function(tool: Body) -> dict[str, Any]:
    """A function's name, description and parameters, in OpenAI's form.

    Raises:
        ApiError: 400.
    """
    name = tool.string("name")
    if not name:
        raise tool.fail("name", "must be the function's name")
    function: dict[str, Any] = {"name": name}
    if description := tool.string("description"):
        function["description"] = description
    function["parameters"] = tool.mapping("parameters") or {
        "type": "object",
        "properties": {},
    }
    tool.boolean("strict")
    return {"type": "function", "function": function}


def read_tool_choice(
    body: Body, tools: list[dict[str, Any]], holder: str | None
) -> tuple[list[dict[str, Any]], bool]:
    """OpenAI's ``tool_choice``; see `choose_tools`.

    Args:
        holder: the object that has a function's name; None: the choice itself.

    Raises:
        ApiError: 400.
    """
    found, path = body.value("tool_choice"), body.path("tool_choice")
    if found is None or isinstance(found, str):
        choice = body.choice("tool_choice", ("none", "auto", "required"), "auto")
        return choose_tools(choice, None, tools, path)
    given = Body(found, path)
    given.choice("type", ("function",), "function")
    holding = given if holder is None else given.object(holder)
    name = holding.string("name") if holding else ""
    given.close()
    return choose_tools("function", name, tools, path)


def read_effort(body: Body, name: str, texts: Texts) -> dict[str, Any]:
    """What a chat template gets of an effort that is asked for.

    Raises:
        ApiError: 400: it does not read one.
    """
    effort = body.value(name)
    if effort is None:
        return {}
    if not texts.knows("reasoning_effort"):
        raise body.fail(
            name,
            "must be left out: this model's chat template does not read it; got "
            f"{shown(effort)}",
        )
    return {"reasoning_effort": effort}


def choose_tools(
    choice: str, name: str | None, tools: list[dict[str, Any]], param: str
) -> tuple[list[dict[str, Any]], bool]:
    """Which functions the model is told of, and whether it has to call one.

    Args:
        choice: "auto", "none", "required" or, with `name`, "function".

    Raises:
        ApiError: 400.
    """
    if choice == "none":
        return [], False
    if choice == "auto":
        return tools, False
    if choice == "function":
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    if not tools:
        raise wrong(param, "must name a function of tools; there is no such one")
    return tools, True
