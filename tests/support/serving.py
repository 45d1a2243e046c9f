"""An engine on every rank, and a client on rank 0 that asks as a script says."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_ep
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.server.build import build_engine
from mlx_ep.server.engine import ServingEngine
from mlx_ep.server.pools import EngineOptions
from mlx_ep.server.requests import Request, Sampling, Token
from mlx_ep.server.sharing import Sharing
from tests.support.waiting import LONG, until

TERMS = ["bug", "daemon", "deadlock", "worm", "zombie", "patch", "cookie"]
DATA = {"strategy": "auto"}
# Every rank has every expert, and answers its requests alone.
LOCAL = {"strategy": "local", "replica_memory": "all"}
# Likewise, but in passes that the ranks share.
SHARED = {"strategy": "auto", "replica_memory": "all"}
TENSOR = {"attention": "tensor"}


class EveryOther(Sharing):
    """Passes are shared by whether their tokens are even."""

    def shares(self, counts: Sequence[int]) -> bool:
        return sum(counts) % 2 == 0


@dataclass
class Script:
    """What the client does.

    Attributes:
        requests: one after another.
        at_once: requests that are open at most.
        cancel_after: by id: after so many tokens.
    """

    requests: list[Request]
    at_once: int = 16
    cancel_after: dict[str, int] = field(default_factory=dict)
    seed: int = 0


@dataclass
class Outcome:
    """What came of it on one rank; events on rank 0 only."""

    events: dict[str, list[Token]]
    state: Any
    running: int
    kv_bytes: int
    seconds: float

    def tokens(self, request: str) -> list[int]:
        found = [event.token for event in self.events[request]]
        return [token for token in found if token is not None]


def prompts(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    """Questions of the embedded model, some behind many tokens of other text."""
    rng = random.Random(seed)
    filler = [rng.randrange(20, 1000) for _ in range(longest)]
    made = []
    for index in range(count):
        length = 5 + (longest - 5) * index // max(count - 1, 1)
        rng.shuffle(filler)
        made.append([0, *filler[: length - 4], 2, 300 + index % len(TERMS), 3])
    rng.shuffle(made)
    return made


def mixed_requests(count: int, longest: int, most: int) -> list[Request]:
    """Greedy and seeded ones, with penalties and biases among them."""
    kinds = [
        Sampling(),
        Sampling(temperature=0.9, seed=3),
        Sampling(repetition_penalty=1.3, logit_bias={40: 1.5}),
        Sampling(temperature=1.2, top_p=0.9, min_p=0.01, top_k=40, seed=5),
        Sampling(),
        Sampling(temperature=0.8, xtc_probability=0.5, xtc_threshold=0.05, seed=9),
        Sampling(temperature=1.0, presence_penalty=0.4, frequency_penalty=0.2, seed=1),
    ]
    return [
        Request(f"r{i}", tuple(prompt), 4 + i * 5 % most, kinds[i % len(kinds)])
        for i, prompt in enumerate(prompts(count, longest))
    ]


def alone(folder: str, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Each answer of mlx-lm in one process, by itself, its end token included."""
    model, tokenizer = mlx_lm.load(folder)
    special = tokenizer.encode("\n") + sorted(tokenizer.eos_token_ids)
    answers = {}
    for request in requests:
        how = request.sampling
        if how.seed is not None:
            mx.random.seed(how.seed)
        sampler = make_sampler(
            how.temperature, how.top_p, how.min_p, top_k=how.top_k,
            xtc_probability=how.xtc_probability, xtc_threshold=how.xtc_threshold,
            xtc_special_tokens=special,
        )  # fmt: skip
        processors = make_logits_processors(
            how.logit_bias, how.repetition_penalty, how.repetition_context_size,
            how.presence_penalty, how.presence_context_size, how.frequency_penalty,
            how.frequency_context_size,
        )  # fmt: skip
        steps = generate_step(
            mx.array(request.tokens), model, max_tokens=request.max_tokens,
            sampler=sampler, logits_processors=processors,
        )  # fmt: skip
        answers[request.id] = tokens = []
        for token, _ in steps:
            tokens.append(token)
            if token in tokenizer.eos_token_ids:
                break
    return answers


def load_engine(
    group: mx.distributed.Group,
    folder: str,
    config: dict[str, Any],
    options: dict[str, Any],
) -> ServingEngine:
    """An engine with small pools, unless the options say otherwise."""
    model, tokenizer = mlx_ep.load(folder, group, EPConfig(**config))
    small = {"max_kv_memory": 10**8, "prefix_cache_memory": 0, "prefill_step": 32}
    return build_engine(
        model, tokenizer, GroupComm(group), EngineOptions(**(small | options))
    )


def serve(
    group: mx.distributed.Group,
    folder: str,
    config: dict[str, Any],
    options: dict[str, Any],
    scripts: list[Script],
) -> list[Outcome]:
    """Play scripts on one engine, one after another; every rank must call it."""
    engine = load_engine(group, folder, config, options)
    if config == SHARED:
        assert engine._worker.sharing.on_one and engine._worker.sharing.on_each
        engine._worker.sharing = EveryOther()
    played = with_client(engine, group, lambda: [play(engine, s) for s in scripts])
    if played is not None:
        return played
    worker = engine._worker
    return [Outcome({}, None, len(worker.running), worker.kv_bytes, 0.0)]


def with_client(
    engine: ServingEngine, group: mx.distributed.Group, client: Callable[[], Any]
) -> Any:
    """Run an engine while rank 0 runs a client beside it; what that gave, or None."""
    given: list[Any] = []

    def run() -> None:
        try:
            given.append(client())
        finally:
            engine.stop()

    thread = threading.Thread(target=run)
    if group.rank() == 0:
        thread.start()
    engine.run()
    if group.rank() != 0:
        return None
    thread.join()
    return given[0]


def play(engine: ServingEngine, script: Script, timeout: float = LONG) -> Outcome:
    """Ask as a script says; returns when every request has ended."""
    rng, start = random.Random(script.seed), time.monotonic()
    open_ones = threading.Semaphore(script.at_once)
    events: dict[str, list[Token]] = {r.id: [] for r in script.requests}
    left, all_done = set(events), threading.Event()

    def deliver(event: Token) -> None:
        events[event.request].append(event)
        if event.finish_reason is not None:
            left.discard(event.request)
            open_ones.release()
            if not left:
                all_done.set()
        elif len(events[event.request]) == script.cancel_after.get(event.request):
            engine.cancel(event.request)

    for request in script.requests:
        assert open_ones.acquire(timeout=timeout), "no request ended in time"
        engine.submit(request, deliver)
        if script.cancel_after.get(request.id) == 0:
            engine.cancel(request.id)
        time.sleep(rng.choice([0, 0, 0.002, 0.01]))
    assert all_done.wait(timeout), f"without an end: {sorted(left)}"
    worker = engine._worker
    until(lambda: not (engine.state().running or worker.running), engine.state, timeout)
    seconds = time.monotonic() - start
    return Outcome(
        events, engine.state(), len(worker.running), worker.kv_bytes, seconds
    )
