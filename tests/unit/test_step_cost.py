"""Steps and prompts of a whole model, against hand-computed cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_ep.cost.profile import overridden
from mlx_ep.cost.step import prefill_seconds, step_cost
from tests.support.round_numbers import MODEL, PROFILE


def test_decode_step_by_hand() -> None:
    step = step_cost(PROFILE, MODEL, "single", tokens=1, phase="decode", context=9)
    assert step.num_moe_layers * step.moe.seconds == pytest.approx(2 * 20e-6)
    # Projections, and 10 tokens of the cache.
    assert step.attention == pytest.approx(60e-6 + 4e-6)
    assert step.dense == pytest.approx(30e-6)
    assert step.head == pytest.approx(20e-6)
    assert step.seconds == pytest.approx(40e-6 + 64e-6 + 30e-6 + 20e-6)
    assert step.tokens_per_second == pytest.approx(1 / step.seconds)


def test_tensor_parallel_step_by_hand() -> None:
    step = step_cost(
        PROFILE, MODEL, "tp", tokens=1, phase="decode", context=9, num_ranks=2
    )
    # 20000 of 30000 weights are split, and so are the heads of the cache.
    assert step.attention == pytest.approx(40e-6 + 2e-6)
    assert step.dense == pytest.approx(15e-6)
    assert step.head == pytest.approx(20e-6)
    # An all_sum for each attention, for the dense layer and for each MoE layer.
    assert step.collectives == 3 + 1 + 2
    assert step.communication == pytest.approx(4 * (30e-6 + 200 / 6e9))
    latents = replace(MODEL, kv_is_split=False)
    whole = step_cost(
        PROFILE, latents, "tp", tokens=1, phase="decode", context=9, num_ranks=2
    )
    assert whole.attention == pytest.approx(40e-6 + 4e-6)


def test_collectives_of_a_step_by_arm() -> None:
    def collectives(arm, tokens=4):
        return step_cost(
            PROFILE, MODEL, arm, tokens=tokens, phase="decode", num_ranks=2
        ).collectives

    assert collectives("single") == 0
    assert collectives("ep-replicated") == 2
    assert collectives("ep-tensor") == 3 + 2
    # The token counts once, then two for each MoE layer.
    assert collectives("ep-gathered") == collectives("ep-all-to-all") == 1 + 2 * 2


def test_data_parallel_attention_takes_its_own_tokens() -> None:
    fast = overridden(PROFILE, {"memory_bandwidth": 1e15})
    own, all_tokens = (
        step_cost(fast, MODEL, arm, tokens=64, phase="decode", num_ranks=2)
        for arm in ("ep-gathered", "ep-replicated")
    )
    assert own.attention == pytest.approx(all_tokens.attention / 2)
    assert own.head == pytest.approx(all_tokens.head / 2)


def test_sequences_are_not_split() -> None:
    """With data-parallel attention one prompt keeps one rank busy."""
    fast = overridden(PROFILE, {"memory_bandwidth": 1e15})

    def step(arm, sequences):
        return step_cost(
            fast, MODEL, arm, tokens=64, phase="prefill", sequences=sequences,
            num_ranks=2,
        )  # fmt: skip

    whole = step("ep-replicated", 1).attention
    assert step("ep-gathered", 1).attention == whole
    halves = step("ep-gathered", 2).attention
    assert halves == pytest.approx(step("ep-replicated", 2).attention / 2)
    with pytest.raises(ValueError, match="equally many of each of 3"):
        step("tp", 3)


def test_parts_of_a_prompt_leave_out_the_end_of_the_last_layer() -> None:
    options = {"tokens": 64, "phase": "prefill", "num_ranks": 2}
    part, last = (
        step_cost(PROFILE, MODEL, "tp", logits=logits, **options)
        for logits in (0, None)
    )
    assert (part.num_moe_layers, last.num_moe_layers) == (1, 2)
    assert part.collectives == last.collectives - 2
    assert (part.head == 0) and last.head > 0
    eager = step_cost(PROFILE, MODEL, "ep-gathered", logits=0, **options)
    assert eager.num_moe_layers == 2


def test_windows_limit_cache_and_scores() -> None:
    model = replace(MODEL, window=10, window_kv_bytes=300, window_macs=100)
    assert model.cache_bytes(5) == 5 * 400
    assert model.cache_bytes(100) == 100 * 100 + 10 * 300
    assert model.scores_macs(100) == 100 * 100 + 10 * 100
    with pytest.raises(ValueError, match="window_macs must be between 0 and 200"):
        replace(MODEL, window_macs=201)


def test_prompt_is_the_sum_of_its_steps() -> None:
    steps = [
        step_cost(
            PROFILE, MODEL, "tp", tokens=t, phase="prefill", context=c, logits=h,
            num_ranks=2,
        ).seconds
        for t, c, h in ((40, 0, 0), (40, 40, 0), (20, 80, None))
    ]  # fmt: skip
    total = prefill_seconds(
        PROFILE, MODEL, "tp", prompt=100, step_tokens=40, num_ranks=2
    )
    assert total == pytest.approx(sum(steps))
