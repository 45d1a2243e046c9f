"""Clients that people have, openai and anthropic: an engine that says texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.http_serving import Serving, serving

if TYPE_CHECKING:  # else by the tests that use them: 2 seconds in each worker
    import anthropic
    import openai

CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'
TEXT = f"<think>hm</think>Let me see.<tool_call>{CALL}</tool_call>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(TEXT) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none") as found:
        yield found


@pytest.fixture(scope="module")
def claude(server: Serving) -> Iterator[anthropic.Anthropic]:
    import anthropic

    with anthropic.Anthropic(base_url=server.address, api_key="none") as found:
        yield found


def test_openai_chat_with_tools(client: openai.OpenAI) -> None:
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    ]
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(
        model="gpt-4o", messages=messages, tools=tools, logprobs=True, top_logprobs=1
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Bern"}
    assert choice.logprobs.content[0].top_logprobs[0].logprob == -0.5
    with client.chat.completions.stream(
        model="gpt-4o", messages=messages, tools=tools
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "weather"
    assert final.choices[0].message.content == "Let me see."


def test_openai_errors(client: openai.OpenAI) -> None:
    import openai

    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError, match="top_p must be a number"):
        client.chat.completions.create(model="gpt-4o", messages=messages, top_p=7)
    with pytest.raises(openai.NotFoundError, match="must be one of jargon-moe"):
        client.chat.completions.create(model="no", messages=messages)


def test_openai_completions_and_models(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="gpt-4o", prompt="x", max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["jargon-moe", "gpt-4o"]


def test_openai_responses(client: openai.OpenAI) -> None:
    tools = [
        {
            "type": "function",
            "name": "weather",
            "parameters": PARAMETERS,
            "strict": True,
        }
    ]
    answer = client.responses.create(
        model="gpt-4o", input="hi", instructions="be short", tools=tools
    )
    assert answer.output_text == "Let me see."
    kinds = [item.type for item in answer.output]
    assert kinds == ["reasoning", "message", "function_call"]
    call = answer.output[2]
    again = client.responses.create(
        model="gpt-4o",
        input=[
            {"role": "user", "content": "hi"},
            *answer.output,
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": "rain",
            },
        ],
    )
    assert again.status == "completed"
    with client.responses.stream(model="gpt-4o", input="hi", tools=tools) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_response()
    assert events[0] == "response.created"
    assert events[-1] == "response.completed"
    assert final.output_text == "Let me see."
    assert final.output[2].arguments == call.arguments
    cut = client.responses.create(model="gpt-4o", input="hi", max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )


def test_anthropic(claude: anthropic.Anthropic) -> None:
    import anthropic

    tools = [{"name": "weather", "description": "w", "input_schema": PARAMETERS}]
    messages = [{"role": "user", "content": "hi"}]
    answer = claude.messages.create(
        model="gpt-4o", max_tokens=99, messages=messages, tools=tools, system="be short"
    )
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"]
    assert answer.stop_reason == "tool_use"
    assert answer.content[2].input == {"city": "Bern"}
    result = {
        "type": "tool_result",
        "tool_use_id": answer.content[2].id,
        "content": [{"type": "text", "text": "rain"}],
    }
    more = [
        *messages,
        {"role": "assistant", "content": [b.model_dump() for b in answer.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    claude.messages.create(model="gpt-4o", max_tokens=9, messages=more, tools=tools)
    with claude.messages.stream(
        model="gpt-4o", max_tokens=99, messages=messages, tools=tools
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "Let me see."
    assert final.content[2].input == {"city": "Bern"}
    assert final.usage.output_tokens == answer.usage.output_tokens
    stopped = claude.messages.create(
        model="gpt-4o", max_tokens=99, messages=messages, stop_sequences=["me"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "me")
    assert claude.messages.count_tokens(model="gpt-4o", messages=messages).input_tokens
    with pytest.raises(anthropic.BadRequestError, match="temperature must be"):
        claude.messages.create(
            model="gpt-4o",
            max_tokens=9,
            messages=messages,
            extra_body={"temperature": -1},
        )
