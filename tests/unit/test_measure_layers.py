"""What a layer takes beside its matrices, told apart; weights that take turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_ep.comm import init
from mlx_ep.cost.profile import Profile
from mlx_ep.cost.step import step_cost
from mlx_ep.measure import costs, experts, layers
from mlx_ep.measure.timer import Timer
from mlx_ep.types import Packing
from tests.support.round_numbers import MODEL, PROFILE

WIDTH = 256
CALL, ELEMENT, SCORE, MASKED_SCORE = 3e-4, 2e-8, 3e-8, 5e-8
SINGLE, PROMPT, UNSEEN = 9e-10, 5e-10, 4e-10


class Given(Timer):
    """A timer that knows what a layer takes."""

    def together(self, calls: Mapping[Any, Any]) -> dict[Any, float]:
        return {case: layers.LAYERS * self.given(case) for case in calls}

    def given(self, case: Any) -> float:
        rows = case.sequences * case.queries
        is_single = case.queries == 1
        mac, score = (SINGLE, SCORE) if is_single else (PROMPT, MASKED_SCORE)
        per_pair = 2 * WIDTH, WIDTH // case.head * score
        pairs = case.seen * (per_pair[0] * mac + per_pair[1])
        pairs += case.unseen * (per_pair[0] * UNSEEN + per_pair[1])
        return CALL + rows * WIDTH * ELEMENT + pairs


def test_parts_of_a_layer_are_told_apart() -> None:
    found = layers.layer_times(Given(init()), WIDTH, mx.float32)
    assert found == pytest.approx(
        {
            "attention_rate": 2 / PROMPT,
            "unseen_seconds": UNSEEN,
            "query_seconds": SINGLE,
            "score_seconds": SCORE,
            "prompt_score_seconds": MASKED_SCORE,
            "element_seconds": ELEMENT,
        }
    )


def test_a_case_leaves_its_caches_as_they_were(monkeypatch: Any) -> None:
    """Each call sees as many keys as the one before; bare layers have no matrices."""
    made = layers.bare_layers(64, 32, mx.float32)
    weights = [w for layer in made for w in _arrays(layer)]
    assert max(w.ndim for w in weights) == 1
    seen: list[int] = []
    own = layers.BatchKVCache.update_and_fetch

    def update(cache: Any, keys: mx.array, values: mx.array) -> Any:
        found = own(cache, keys, values)
        seen.append(found[0].shape[2])
        return found

    run = layers._step(made, layers._Case(32, 2, 3, 5), mx.float32)
    monkeypatch.setattr(layers.BatchKVCache, "update_and_fetch", update)
    run()
    run()
    assert seen == [8] * 2 * layers.LAYERS


def _arrays(layer: nn.Module) -> list[mx.array]:
    return [w for name, w in nn.utils.tree_flatten(layer.parameters())]


def test_weights_take_turns_until_no_cache_holds_them(monkeypatch: Any) -> None:
    monkeypatch.setattr(costs, "sizes", lambda: replace(costs.ON_CPU, cold=1000))
    assert len(costs.in_groups(300, object)) == 4
    assert len(costs.in_groups(2000, object)) == 1
    switches = [
        experts.random_switch(64, 64, Packing.plain("bfloat16"), mx.float32)
        for _ in range(3)
    ]
    places = {id(switch): place for place, switch in enumerate(switches)}
    used: list[int] = []

    def made(switch: nn.Module) -> Any:
        def compute(visits: Any) -> mx.array:
            used.append(places[id(switch)])
            return visits.x

        return compute

    run = experts._experts_call(made, switches, 1, 1, mx.float32)
    for _ in range(4):
        run()
    assert used == [0, 1, 2, 0]


def test_a_slow_phase_does_not_fall_on_one_amount() -> None:
    """The first time that 2 is measured something else runs; the fast half counts."""

    class Disturbed(Timer):
        def typical(self, call: Any) -> float:
            assert self.seconds == 0.5
            return float(next(given[call]))

    calls: list[Any] = [lambda: 1, lambda: 2]
    given = {calls[0]: iter([1.0, 1.0]), calls[1]: iter([9.0, 2.0])}
    timer = Disturbed(init(), seconds=1.0, longest=1e9, quantile=0.0)
    assert timer.series(list(zip((1.0, 2.0), calls))) == [(1.0, 1.0), (2.0, 2.0)]


def test_attention_counts_what_was_measured() -> None:
    """MODEL: 200 multiply-adds and 4 scores of a query and a key."""
    model = replace(MODEL, attention_scores=4)

    def attention(profile: Profile, phase: str, tokens: int, context: int) -> float:
        return step_cost(
            profile, model, "single", tokens=tokens, phase=phase, context=context
        ).attention

    slow = replace(PROFILE, attention_rate=2 / 1e-6)
    for phase, tokens, context, pairs in (
        ("decode", 2, 9, 20),
        ("prefill", 4, 6, 4 * 6 + 10),
    ):
        of_pairs = attention(slow, phase, tokens, context)
        free = replace(slow, attention_rate=1e15)
        of_pairs -= attention(free, phase, tokens, context)
        # Without what was measured all multiply-adds are alike, and only those seen.
        assert of_pairs == pytest.approx(pairs * 200e-6, rel=1e-2)
    single = replace(slow, query_seconds=3e-6, score_seconds=1e-4)
    more = attention(single, "decode", 2, 9) - attention(slow, "decode", 2, 9)
    assert more == pytest.approx(20 * (200 * 2e-6 + 4e-4))
    masked = replace(single, prompt_score_seconds=3e-4)
    more = attention(masked, "prefill", 4, 6) - attention(single, "prefill", 4, 6)
    assert more == pytest.approx(34 * 4 * 2e-4)
    assert attention(masked, "decode", 2, 9) == attention(single, "decode", 2, 9)
    prompts = replace(single, unseen_seconds=5e-6)
    more = attention(prompts, "prefill", 4, 6) - attention(slow, "prefill", 4, 6)
    unseen = 6 * (200 * 5e-6 + 4 * 1e-4)
    assert more == pytest.approx(34 * 4 * 1e-4 + unseen)
