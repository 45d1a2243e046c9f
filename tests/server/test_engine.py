"""What an engine does beside giving the right tokens."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from llguidance import LLMatcher
from mlx_lm.utils import load_tokenizer

from mlx_ep.loading import find_model
from mlx_ep.server.engine import ServingEngine
from mlx_ep.server.requests import QueueFull, Request, Sampling, Stopping, Token
from tests.support import waiting
from tests.support.ranks import run_ranks
from tests.support.serving import (
    DATA,
    Script,
    alone,
    load_engine,
    play,
    prompts,
    with_client,
)

pytestmark = pytest.mark.requires("ranks")

PROMPT = (0, 2, 305, 3)
LONG = tuple(max(prompts(2, 300), key=len))
ENDLESS = Sampling(logit_bias={40: 100.0})  # always this token
GREEDY = Sampling(logprobs=True, top_logprobs=3)
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
GRAMMARS = {
    "lark": "start: /[0-9]{3}/",
    "json": LLMatcher.grammar_from_json_schema(
        json.dumps(SCHEMA), overrides={"whitespace_flexible": False}
    ),
}


@pytest.fixture(scope="module")
def expected() -> list[int]:
    folder = str(find_model("jargon-moe"))
    return alone(folder, [Request("x", PROMPT, 6)])["x"]


@pytest.fixture(
    scope="module",
    params=[(1, {}, False), (2, {}, True), (2, DATA, True)],
    ids=["1 rank", "2 ranks", "2 ranks, data"],
)
def seen(request: pytest.FixtureRequest, expected: list[int]) -> list[dict[str, Any]]:
    """What every rank saw of all scenes, played one after another on one engine."""
    num_ranks, config, look_ahead = request.param
    folder = str(find_model("jargon-moe"))
    stop = tuple(expected[2:4])
    return run_ranks(
        num_ranks, _play_all, folder, config, stop, look_ahead, timeout=200
    )


def _play_all(
    group: mx.distributed.Group,
    folder: str,
    config: dict[str, Any],
    stop: tuple[int, ...],
    look_ahead: bool,
) -> dict[str, Any]:
    options = {
        "look_ahead": look_ahead,
        "max_num_seqs": 4, "max_waiting": 2, "prefix_cache_memory": 2 * 10**6,
        "prefill_step": 32,
    }  # fmt: skip
    engine = load_engine(group, folder, config, options)
    history = _with_history(engine)
    found: dict[str, Any] = {"history": history}

    def client() -> None:
        found["_answers"] = _answers(engine, stop)
        found["grammars"] = len(engine._grammars._matchers)
        for scene in (_cancel, _long_prompt, _full, _wrong, _record):
            found[scene.__name__] = scene(engine)
        found["conversations"] = converse(engine, 5, 3)
        found["end"] = _drain(engine)

    with_client(engine, group, client)
    return found


def _with_history(engine: ServingEngine) -> list[set[str]]:
    """The requests that have a place on this rank, after every step."""
    history: list[set[str]] = []
    worker, step = engine._worker, engine._worker.step

    def record(decision: Any, begun: Any) -> None:
        step(decision, begun)
        history.append({s.request.id for s in worker.running.values()})

    worker.step = record  # type: ignore[method-assign]
    return history


@contextmanager
def _after_steps(engine: ServingEngine, look: Callable[[], None]) -> Iterator[None]:
    """Look, on the engine's thread, after every step: no step more or less between."""
    worker, step = engine._worker, engine._worker.step

    def stepped(decision: Any, begun: Any) -> None:
        step(decision, begun)
        look()

    worker.step = stepped  # type: ignore[method-assign]
    yield
    worker.step = step  # type: ignore[method-assign]


# Scenes, on rank 0. What is asked at a step is asked by who is told of that step ------


def _answers(engine: ServingEngine, stop: tuple[int, ...]) -> dict[str, list[Token]]:
    wild = Sampling(temperature=1.5, seed=4)
    requests = [
        Request("greedy", PROMPT, 6, GREEDY),
        Request("stopped", PROMPT, 6, Sampling(), ((999,), stop)),
        *(Request(name, PROMPT, 60, wild, grammar=g) for name, g in GRAMMARS.items()),
    ]
    return play(engine, Script(requests)).events


def _cancel(engine: ServingEngine) -> dict[str, Any]:
    """The step behind which a request is cancelled that runs, and one that is read."""
    asked: dict[str, int] = {}
    ended: dict[str, Token] = {}
    done = threading.Event()

    def deliver(event: Token) -> None:
        if event.request == "victim" and "victim" not in asked:
            asked["victim"] = engine._state.steps
            engine.cancel("victim")
        if event.finish_reason is not None:
            ended[event.request] = event
            if len(ended) == 2:
                done.set()

    def look() -> None:
        if "reader" not in asked and _has_place(engine, "reader"):
            asked["reader"] = engine._state.steps
            engine.cancel("reader")

    with _after_steps(engine, look):
        engine.submit(Request("victim", PROMPT, 500, ENDLESS), deliver)
        engine.submit(Request("reader", LONG * 2, 500, ENDLESS), deliver)
        assert done.wait(waiting.LONG)
    return {"asked": asked, "ended": ended}


def _has_place(engine: ServingEngine, name: str) -> bool:
    places = list(engine._scheduler.places.values())
    return any(active.request.id == name for active in places)


def _long_prompt(engine: ServingEngine) -> dict[str, list[int]]:
    """The steps in which each request had a token."""
    steps: dict[str, list[int]] = {"runs": [], "long": [], "short": []}
    long = Request("long", tuple(reversed(LONG)), 2, ENDLESS)
    done = threading.Semaphore(0)

    def deliver(event: Token) -> None:
        if not steps["runs"]:
            steps["asked"] = [engine._state.steps]
            engine.submit(long, deliver)
            engine.submit(Request("short", (0, 2, 306, 3), 2, ENDLESS), deliver)
        steps[event.request].append(engine._state.steps)
        if event.finish_reason is not None:
            done.release()

    engine.submit(Request("runs", PROMPT, 40, ENDLESS), deliver)
    for _ in range(3):
        assert done.acquire(timeout=waiting.LONG)
    return steps


def _full(engine: ServingEngine) -> int:
    """How many of 12 requests found no room to wait while one runs."""
    done, refused = threading.Semaphore(0), []

    def deliver(event: Token) -> None:
        if event.request == "runs" and not refused:
            refused.append(sum(map(is_refused, range(12))))
        if event.finish_reason is not None:
            done.release()

    def is_refused(number: int) -> bool:
        try:
            engine.submit(Request(f"f{number}", PROMPT, 50, ENDLESS), deliver)
        except QueueFull as error:
            assert 1 <= error.retry_after <= 60
            return True
        return False

    engine.submit(Request("runs", PROMPT, 50, ENDLESS), deliver)
    assert done.acquire(timeout=waiting.LONG)
    for _ in range(12 - refused[0]):
        assert done.acquire(timeout=waiting.LONG)
    return refused[0]


def _wrong(engine: ServingEngine) -> list[str]:
    texts = []
    for request in (
        Request("w", (), 5),
        Request("w", (10**6,), 5),
        Request("w", PROMPT, engine.context),
        Request("w", PROMPT, 5, Sampling(top_k=10**6)),
        Request("w", PROMPT, 5, Sampling(logit_bias={-1: 1.0})),
        Request("w", PROMPT, 5, grammar="start: nowhere"),
    ):
        with pytest.raises(ValueError) as error:
            engine.submit(request, lambda event: None)
        texts.append(str(error.value))
    return texts


def _record(engine: ServingEngine) -> list[dict[str, Any]]:
    dumps = [engine.record("start")]
    played = play(engine, Script([Request("recorded", PROMPT, 10)]))
    dumps.append(engine.record("stop") | {"drawn": len(played.tokens("recorded"))})
    play(engine, Script([Request("later", PROMPT, 10)]))
    dumps.append(engine.record("dump"))
    return dumps


def converse(engine: ServingEngine, count: int, turns: int) -> dict[str, float]:
    """Conversations whose every turn begins with what was said before."""
    rng = random.Random(3)
    said = {n: [0, *(rng.randrange(20, 1000) for _ in range(15))] for n in range(count)}
    reusable, before = 0, engine.state().cache_hits
    most = 0
    for turn in range(turns):
        requests = []
        for number, tokens in said.items():
            if turn:
                reusable += len(tokens) - 1  # the last one was not in the model
                tokens += [rng.randrange(20, 1000) for _ in range(8)]
            name = f"c{number}.{turn}"
            bias = Sampling(logit_bias={40 + number: 5.0})
            requests.append(Request(name, tuple(tokens), 12, bias))
        outcome = play(engine, Script(requests, at_once=4))
        most = max(most, outcome.state.cache_bytes)
        for number, tokens in said.items():
            tokens += outcome.tokens(f"c{number}.{turn}")
    hits = engine.state().cache_hits - before
    return {
        "share": hits / reusable, "bytes": most, "limit": engine.state().cache_limit,
    }  # fmt: skip


def _drain(engine: ServingEngine) -> str:
    engine.drain()
    with pytest.raises(Stopping) as error:
        engine.submit(Request("late", PROMPT, 1), lambda event: None)
    return str(error.value)


# What was seen ------------------------------------------------------------------------


def test_log_probabilities(seen: list[dict[str, Any]], expected: list[int]) -> None:
    events = seen[0]["_answers"]["greedy"]
    assert [event.token for event in events] == expected
    for event in events:
        assert len(event.top_logprobs) == 3
        assert event.top_logprobs[0] == (event.token, event.logprob)
        values = [value for _, value in event.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert all(value <= 0 for value in values)


def test_stop_sequences(seen: list[dict[str, Any]], expected: list[int]) -> None:
    events = seen[0]["_answers"]["stopped"]
    assert [event.token for event in events] == expected[:4]
    assert events[-1].finish_reason == "stop"


def test_grammars(seen: list[dict[str, Any]]) -> None:
    tokenizer = load_tokenizer(find_model("jargon-moe"))
    texts = {}
    for name in GRAMMARS:
        events = seen[0]["_answers"][name]
        assert events[-1].finish_reason == "stop", events[-1]
        ids = [e.token for e in events if e.token not in tokenizer.eos_token_ids]
        texts[name] = tokenizer.decode(ids)
    assert len(texts["lark"].strip()) == 3 and int(texts["lark"]) >= 0
    found = json.loads(texts["json"])
    assert set(found) == {"ok", "n"} and found["n"] in (1, 22, 333)
    assert seen[0]["grammars"] == 0  # nor where another rank has drawn by it


def test_a_cancelled_request_is_gone_within_one_step(
    seen: list[dict[str, Any]],
) -> None:
    cancelled = seen[0]["_cancel"]
    for name, asked in cancelled["asked"].items():
        assert cancelled["ended"][name].finish_reason == "cancelled"
        for rank in seen:
            has_place = [i for i, names in enumerate(rank["history"]) if name in names]
            # It was asked during a step; the next one frees the place.
            assert has_place and has_place[-1] <= asked, name


def test_a_long_prompt_stalls_nobody(seen: list[dict[str, Any]]) -> None:
    steps = seen[0]["_long_prompt"]
    runs = steps["runs"]
    assert runs == list(range(runs[0], runs[0] + 40))  # one token every step
    (asked,) = steps["asked"]
    chunks = -(-(len(LONG) - 1) // 32)
    assert chunks > 8
    # Some steps more until it is asked for, and for the chunk of the short one.
    assert asked + chunks <= steps["long"][0] <= asked + chunks + 12
    assert steps["short"][0] <= steps["long"][0] - 5


def test_the_queue_is_full(seen: list[dict[str, Any]]) -> None:
    # Beside the one that runs, 2 wait, and 3 have a place, or 7 on 2 ranks with data.
    assert seen[0]["_full"] in (12 - 2 - 3, 12 - 2 - 7)


def test_wrong_requests_disturb_nobody(seen: list[dict[str, Any]]) -> None:
    words = ["at least one token", "must be 0 to", "fit the context of", "top_k",
             "logit_bias", "grammar cannot be followed"]  # fmt: skip
    for text, expected in zip(seen[0]["_wrong"], words, strict=True):
        assert expected in text


def test_recorded_experts(seen: list[dict[str, Any]]) -> None:
    started, stopped, dumped = seen[0]["_record"]
    assert started == {"recording": True}
    assert not stopped["recording"]
    drawn = stopped.pop("drawn")
    assert dumped == stopped
    # 3 tokens of the prompt, maybe from the cache, one for each that is drawn, and one
    # for nothing where the next pass had begun.
    assert drawn <= stopped["tokens"] <= drawn + 4
    for layer, ranks in zip(stopped["counts"], stopped["ranks"], strict=True):
        assert sum(layer) == pytest.approx(sum(ranks))
        assert len(ranks) == len(seen)


def test_conversations_find_their_prefix(seen: list[dict[str, Any]]) -> None:
    found = seen[0]["conversations"]
    assert found["share"] > 0.95
    assert 0 < found["bytes"] <= found["limit"]


def test_drained(seen: list[dict[str, Any]]) -> None:
    assert "ending" in seen[0]["end"]
    assert all(not rank["history"][-1] for rank in seen)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("num_ranks", "config"), [(1, {}), (2, {}), (2, DATA)])
def test_100_conversations_of_5_turns(num_ranks: int, config: dict[str, Any]) -> None:
    folder = str(find_model("jargon-moe"))
    found = run_ranks(num_ranks, _converse, folder, config, timeout=1700)[0]
    assert found["share"] > 0.95
    assert 0 < found["bytes"] <= found["limit"]


def _converse(
    group: mx.distributed.Group, folder: str, config: dict[str, Any]
) -> dict[str, float] | None:
    options = {"max_num_seqs": 8, "prefix_cache_memory": 4 * 10**7}
    engine = load_engine(group, folder, config, options)
    found: dict[str, float] | None = with_client(
        engine, group, lambda: converse(engine, 100, 5)
    )
    return found
