"""What the endpoints answer, and what they refuse."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import mlx_lm.server
import pytest

from mlx_ep.server.requests import Request
from tests.support.http_serving import Serving, end_token, ids, serving, tokenizer

CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bern", "Rom"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def _answer(request: Request) -> Sequence[int]:
    """What the prompt asks for: its last line behind a colon."""
    prompt = tokenizer().decode(list(request.tokens))
    texts = {
        "say calls": f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>",
        "say call": f"Let me see.<tool_call>{CALL}</tool_call>",
        "say broken": "<tool_call>{nonsense</tool_call>",
        "say thought": "<think>hm</think>Four.",
    }
    for asked, text in texts.items():
        if asked in prompt:
            return [*ids(text), end_token()]
    return [*ids("Hello there."), end_token()]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(_answer, context=600) as found:
        yield found


def _chunks(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_chat(server: Serving) -> None:
    answer = server.chat(max_tokens=50, model="gpt-4o", temperature=0.5, seed=4)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello there."}
    assert (choice["finish_reason"], answer["model"]) == ("stop", "gpt-4o")
    prompt = server.engine.requests[-1]
    assert answer["usage"]["prompt_tokens"] == len(prompt.tokens)
    assert answer["usage"]["completion_tokens"] == len(ids("Hello there.")) + 1
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert (prompt.sampling.temperature, prompt.sampling.seed) == (0.5, 4)


def test_defaults_are_those_of_mlx_lm_server(server: Serving) -> None:
    server.chat()
    request = server.engine.requests[-1]
    assert request.max_tokens == 512
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 1.0, 0)
    assert (sampling.min_p, sampling.xtc_threshold, sampling.seed) == (0.0, 0.1, None)
    assert sampling.repetition_context_size == 20


def test_streams_have_the_same_text(server: Serving) -> None:
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = _chunks(server.post(CHAT, **body))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == "Hello there."
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 7)
    assert "usage" not in _chunks(server.post(CHAT, messages=HI, stream=True))[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["there", "llo th", ["zzz", "."]])
def test_stop_strings_cut_the_text_and_end_the_request(
    server: Serving, stop: Any, stream: bool
) -> None:
    response = server.post(CHAT, messages=HI, stop=stop, stream=stream)
    first = stop if isinstance(stop, str) else stop[-1]
    expected = "Hello there."[: "Hello there.".index(first)]
    if stream:
        chunks = _chunks(response)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(d.get("content", "") for d in deltas) == expected
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        (choice,) = response.json()["choices"]
        assert choice["message"]["content"] == expected
        assert choice["finish_reason"] == "stop"
    server.engine.wait_until_idle()


def test_several_answers(server: Serving) -> None:
    answer = server.chat(n=3, seed=2**64 - 1, temperature=1)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    seeds = [r.sampling.seed for r in server.engine.requests[-3:]]
    assert seeds == [2**64 - 1, 0, 1]
    assert answer["usage"]["completion_tokens"] == 21
    chunks = _chunks(server.post(CHAT, messages=HI, n=2, stream=True))
    texts = ["", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["Hello there."] * 2


def test_logprobs(server: Serving) -> None:
    answer = server.chat(logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "Hello there."
    assert bytes(b for entry in content for b in entry["bytes"]) == b"Hello there."
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    chunks = _chunks(server.post(CHAT, messages=HI, top_logprobs=1, stream=True))
    found = [c["choices"][0]["logprobs"] for c in chunks]
    streamed = [entry["token"] for one in found if one for entry in one["content"]]
    assert "".join(streamed) == "Hello there."


def test_tool_calls(server: Serving) -> None:
    answer = server.chat("say call", tools=TOOLS)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Bern"}
    prompt = tokenizer().decode(list(server.engine.requests[-1].tokens))
    assert "tools:weather;" in prompt
    # The conversation goes on with the call and its result.
    more = [
        {"role": "user", "content": "hi"},
        choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "rain"},
    ]
    assert server.post(CHAT, messages=more, tools=TOOLS).status_code == 200
    prompt = tokenizer().decode(list(server.engine.requests[-1].tokens))
    assert "[weather]" in prompt and "tool:rain" in prompt


def test_tool_calls_in_a_stream(server: Serving) -> None:
    messages = [{"role": "user", "content": "say calls"}]
    body = {"messages": messages, "tools": TOOLS, "stream": True}
    chunks = _chunks(server.post(CHAT, **body))
    calls = [
        call
        for chunk in chunks
        for call in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert [call["index"] for call in calls] == [0, 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    one = server.chat("say calls", tools=TOOLS, parallel_tool_calls=False)
    assert len(one["choices"][0]["message"]["tool_calls"]) == 1
    server.engine.wait_until_idle()


def test_what_is_no_call_is_text(server: Serving) -> None:
    (choice,) = server.chat("say broken", tools=TOOLS)["choices"]
    assert choice["message"]["content"] == "<tool_call>{nonsense</tool_call>"
    assert choice["finish_reason"] == "stop"


def test_a_call_can_be_forced(server: Serving) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = server.chat(tools=TOOLS, tool_choice=choice)["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Bern", "Rom")
    prompt = server.chat(tools=TOOLS, tool_choice="none")["usage"]["prompt_tokens"]
    assert prompt == server.chat()["usage"]["prompt_tokens"]


def test_thoughts(server: Serving) -> None:
    answer = server.chat("say thought")
    message = answer["choices"][0]["message"]
    details = answer["usage"]["completion_tokens_details"]
    assert 1 <= details["reasoning_tokens"] <= 3
    assert (message["reasoning"], message["content"]) == ("hm", "Four.")
    opened = server.chat("hi", chat_template_kwargs={"opens": True})["choices"][0]
    assert opened["message"]["reasoning"] == "Hello there."


def test_json_schema(server: Serving) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 9}, "b": {"enum": ["x"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    found = server.chat(response_format=wanted)["choices"][0]
    content = json.loads(found["message"]["content"])
    assert content["b"] == "x" and isinstance(content["a"], int)
    assert server.chat(response_format={"type": "text"})
    server.chat(response_format={"type": "json_object"}, max_tokens=3)
    assert server.engine.requests[-1].grammar is not None


def test_completions(server: Serving) -> None:
    path = "/v1/completions"
    answer = server.post(path, prompt=["abc", "d"], n=2, logprobs=2).json()
    assert [c["text"] for c in answer["choices"]] == ["Hello there."] * 4
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["text_offset"][:3] == [0, 1, 4]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 6
    tokens = ids("abc")
    server.post(path, prompt=tokens)
    assert server.engine.requests[-1].tokens == tuple(tokens)
    chunks = _chunks(server.post(path, prompt="x", stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Hello there."


WRONG = [
    ({"messages": []}, "messages", "at least one"),
    ({"messages": [{"role": "king"}]}, "messages.0.role", "'system'"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "one of"),
    ({"messages": HI, "temprature": 1}, "temprature", "no field"),
    ({"messages": HI, "temperature": "hot"}, "temperature", '"hot"'),
    ({"messages": HI, "temperature": -1}, "temperature", "from 0 on"),
    ({"messages": HI, "temperature": True}, "temperature", "number"),
    ({"messages": HI, "top_p": 1.5}, "top_p", "from 0 to 1"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens", "from 1 on, got 0"),
    ({"messages": HI, "max_tokens": 1.5}, "max_tokens", "whole number"),
    ({"messages": HI, "n": 1000}, "n", "to 128"),
    ({"messages": HI, "seed": -1}, "seed", "from 0"),
    ({"messages": HI, "stop": [1]}, "stop", "string"),
    ({"messages": HI, "stop": ""}, "stop", "not empty"),
    ({"messages": HI, "stream": 1}, "stream", "true or false"),
    ({"messages": HI, "stream_options": {}}, "stream_options", "stream true"),
    ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"messages": HI, "logit_bias": {"5": "a"}}, "logit_bias.5", "number"),
    ({"messages": HI, "top_logprobs": 21}, "top_logprobs", "to 20"),
    ({"messages": HI, "xtc_threshold": 0.6}, "xtc_threshold", "to 0.5"),
    ({"messages": HI, "store": True}, "store", "not kept"),
    ({"messages": HI, "audio": {}}, "audio", "text only"),
    ({"messages": HI, "modalities": ["text", "audio"]}, "modalities", "text only"),
    ({"messages": HI, "adapters": "x"}, "adapters", "mlx_lm.fuse"),
    ({"messages": HI, "draft_model": "x"}, "draft_model", "does not draft"),
    ({"messages": HI, "reasoning_effort": "high"}, "reasoning_effort", "template"),
    ({"messages": HI, "tools": [{"type": "web"}]}, "tools.0.type", "'function'"),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice", "function of tools"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content.0.type",
        "text only",
    ),
    (
        {
            "messages": HI,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"type": "nope"}},
            },
        },
        "response_format.json_schema.schema",
        "Invalid type: nope",
    ),
    ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "599"),
]


@pytest.mark.parametrize(("body", "param", "said"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_bodies_are_400_and_name_the_field(
    server: Serving, body: dict[str, Any], param: str, said: str
) -> None:
    response = server.post(CHAT, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"] and said in error["message"], error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"{", b"[]", b"\xff", b'{"temperature": NaN}', b"[" * 100_000, b"",
        b'{"\\ud800": 1}', b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_400(server: Serving, raw: bytes) -> None:
    response = server.client.post(CHAT, content=raw)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_every_field_of_mlx_lm_server_is_known(server: Serving) -> None:
    source = inspect.getsource(mlx_lm.server.APIHandler)
    fields = set(re.findall(r'body\.get\(\s*"(\w+)"', source))
    assert len(fields) > 25
    for field in sorted(fields):
        found = server.post(CHAT, **{"messages": HI, field: {}})
        assert found.status_code in (200, 400), field
        assert "is no field" not in found.text


def test_other_models_and_paths_are_404(server: Serving) -> None:
    response = server.post(CHAT, messages=HI, model="other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "jargon-moe, gpt-4o" in response.json()["error"]["message"]
    assert server.client.get("/v1/nothing").json()["error"]["message"]
    assert server.client.get(CHAT).status_code == 405


def test_an_answer_ends_where_the_context_does(server: Serving) -> None:
    server.chat(max_tokens=10**6)
    request = server.engine.requests[-1]
    assert request.max_tokens + len(request.tokens) == 600


def test_messages_of_anthropic_are_checked_too(server: Serving) -> None:
    path = "/v1/messages"
    wrong = server.post(path, messages=HI)
    assert wrong.status_code == 400
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in wrong.json()["error"]["message"]
    image = [{"role": "user", "content": [{"type": "image"}]}]
    found = server.post(path, messages=image, max_tokens=5).json()["error"]["message"]
    assert "messages.0.content.0.type" in found
    count = server.post(f"{path}/count_tokens", messages=HI).json()
    assert count["input_tokens"] == server.chat()["usage"]["prompt_tokens"]


def test_responses_refuse_what_needs_a_memory(server: Serving) -> None:
    for field, value in {"previous_response_id": "r", "store": True}.items():
        found = server.post("/v1/responses", input="x", **{field: value})
        assert (found.status_code, found.json()["error"]["param"]) == (400, field)


def test_models_health_metrics_state(server: Serving) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["jargon-moe", "gpt-4o"]
    assert server.client.get("/v1/models/gpt-4o").json()["id"] == "gpt-4o"
    assert server.client.get("/v1/models/x").status_code == 404
    assert server.client.get("/health").json() == {"status": "ok"}
    server.chat()
    server.post("/v1/chat/completions", messages=HI, max_tokens="x")
    metrics = server.client.get("/metrics").text
    for line in (
        'mlx_ep_http_requests_total{endpoint="/v1/chat/completions",status="400"}',
        "mlx_ep_time_to_first_token_seconds_bucket",
        'mlx_ep_expert_rows{layer="1",rank="0"} ',
        'mlx_ep_rank_memory{rank="1"}',
        "mlx_ep_running_requests 0.0",
    ):
        assert line in metrics
    state = server.client.get("/v1/state").json()
    assert (state["context"], len(state["ranks"])) == (600, 2)
    for action in ("start", "stop", "dump"):
        found = server.client.post(f"/v1/expert_distribution/{action}").json()
        assert found == {"action": action}
    assert server.client.post("/v1/expert_distribution/x").status_code == 404
