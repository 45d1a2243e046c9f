"""Models on real ranks: parallelize() and load() against mlx-lm in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache

import mlx_ep
from mlx_ep.config import EPConfig
from tests.support import tiny
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.requires("ranks")

CONFIGS = {
    "qwen3_moe": tiny.QWEN3_MOE,
    "qwen2_moe": tiny.QWEN2_MOE,
    "deepseek_v3": tiny.DEEPSEEK_V3,
    "gpt_oss": tiny.GPT_OSS,
    "mixtral": tiny.MIXTRAL,
    "olmoe": tiny.OLMOE,
    "longcat": tiny.LONGCAT,
}
# 40 tokens at once take mlx-lm's sorted path, single ones its unsorted path.
PROMPT = np.random.default_rng(0).integers(2, 300, 40)
NUM_STEPS = 4


def _logits(model: Any) -> np.ndarray:
    cache = make_prompt_cache(model)
    tokens = mx.array(PROMPT)[None]
    steps = [tokens[:, : -NUM_STEPS or None]]
    steps += [tokens[:, i : i + 1] for i in range(len(PROMPT) - NUM_STEPS, len(PROMPT))]
    return np.array(mx.concatenate([model(step, cache=cache) for step in steps], 1)[0])


def _parallelize_all(
    group: mx.distributed.Group, names: list[str], reductions: list[str]
) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        for reduction in reductions:
            model = tiny.make_model(CONFIGS[name])
            ep = EPConfig(reduction=reduction)
            mlx_ep.parallelize(model, group, ep)
            state = model.expert_parallel
            is_routed = reduction == "partial_sum"
            logits = _logits(model)
            counters = state.counters
            results[f"{name} {reduction}"] = {
                "logits": logits,
                "computed": counters.pairs_computed,
                "routed": counters.pairs_routed,
                "layer_calls": counters.layer_calls,
                "collectives": counters.collectives,
                "bytes": counters.collective_bytes,
                "is_routed": is_routed,
                "slots": {site.form.site.num_experts for site in state.blocks},
            }
    return results


BOTH = ["partial_sum", "per_slot"]


@pytest.mark.parametrize(
    ("num_ranks", "transport", "names", "reductions"),
    [
        pytest.param(1, "ring", list(CONFIGS), BOTH, marks=pytest.mark.slow),
        (2, "ring", list(CONFIGS), BOTH),
        (2, "mpi", ["qwen3_moe"], BOTH),
        pytest.param(3, "mpi", list(CONFIGS), ["partial_sum"], marks=pytest.mark.slow),
        (4, "mpi", ["qwen3_moe", "deepseek_v3", "longcat"], ["partial_sum"]),
        (6, "mpi", ["mixtral"], BOTH),  # of 5 experts: one rank has none
    ],
    ids=["1", "2 ring", "2 mpi", "3", "4", "6"],
)
def test_logits_are_those_of_one_process(
    num_ranks: int, transport: str, names: list[str], reductions: list[str]
) -> None:
    ranks = run_ranks(
        num_ranks,
        _parallelize_all,
        names,
        reductions,
        transport=transport,
        timeout=240,
    )
    for case in ranks[0]:
        name, reduction = case.split()
        config = CONFIGS[name]
        expected = _logits(tiny.make_model(config))
        results = [rank[case] for rank in ranks]
        for result in results:
            np.testing.assert_array_equal(result["logits"], results[0]["logits"])
            if reduction == "per_slot":  # bit-identical to one process
                np.testing.assert_array_equal(result["logits"], expected)
            np.testing.assert_allclose(result["logits"], expected, atol=2e-5, rtol=0)
            calls = result["layer_calls"]
            assert result["collectives"] == calls  # one per MoE layer
            if result["is_routed"]:  # of [T, D] float32
                moe_layers = calls // (1 + NUM_STEPS)
                hidden = config["hidden_size"]
                assert result["bytes"] == moe_layers * len(PROMPT) * hidden * 4
        # Every pair is computed on exactly one rank (identity experts on none).
        computed = sum(result["computed"] for result in results)
        if name == "longcat":
            assert computed <= results[0]["routed"]
        else:
            assert computed == results[0]["routed"]
        if num_ranks > 1:
            assert max(r["computed"] for r in results) < results[0]["routed"]


def _generate(group: mx.distributed.Group, folder: str) -> list[int]:
    model, tokenizer = mlx_ep.load(folder, group)
    prompt = PROMPT.tolist()
    return [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=12)]


@pytest.mark.parametrize(
    ("layout", "quantization"),
    [
        ("stacked", None),
        ("per_expert", None),
        ("stacked", {"group_size": 32, "bits": 4, "mode": "affine"}),
        # Other packings: tests/models/test_quantization.py.
    ],
)
def test_loaded_checkpoint_generates_the_same_tokens(
    tmp_path: Path, layout: str, quantization: dict[str, Any] | None
) -> None:
    import mlx_lm

    folder = tiny.save_checkpoint(
        tmp_path, tiny.QWEN3_MOE, layout=layout, quantization=quantization, shards=2
    )
    model, tokenizer = mlx_lm.load(str(folder))
    expected = [
        r.token
        for r in stream_generate(model, tokenizer, PROMPT.tolist(), max_tokens=12)
    ]
    for tokens in run_ranks(2, _generate, str(folder)):
        assert tokens == expected


def _dummy_tokens(group: mx.distributed.Group, folder: str) -> tuple[list[int], int]:
    model, tokenizer = mlx_ep.load(folder, group, dummy_weights=True)
    steps = stream_generate(model, tokenizer, PROMPT.tolist(), max_tokens=8)
    held = model.expert_parallel.reports[group.rank()].held_bytes
    return [r.token for r in steps], held


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4])
def test_dummy_weights_are_one_model_on_any_number_of_ranks(
    tmp_path: Path, bits: int | None
) -> None:
    quantization = bits and {"group_size": 32, "bits": bits, "mode": "affine"}
    folder = tiny.save_checkpoint(tmp_path, tiny.QWEN3_MOE, quantization=quantization)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    one = run_ranks(1, _dummy_tokens, str(folder))
    two = run_ranks(2, _dummy_tokens, str(folder))
    assert two[0][0] == two[1][0] == one[0][0]
    assert len(set(one[0][0])) > 1
    assert two[0][1] < one[0][1]


def _disagreeing_routers(group: mx.distributed.Group, shared: str) -> np.ndarray:
    """Rank 1's router is another one, as if its chip rounded very differently."""
    model = tiny.make_model(tiny.QWEN3_MOE)
    mlx_ep.parallelize(model, group, EPConfig(shared_routing=shared))
    if group.rank() == 1:
        for layer in model.layers[1:]:
            layer.mlp.gate.weight = -layer.mlp.gate.weight
    return _logits(model)


def test_shared_routing_follows_rank_0() -> None:
    expected = _logits(tiny.make_model(tiny.QWEN3_MOE))
    for logits in run_ranks(2, _disagreeing_routers, "always"):
        np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=0)
    apart = run_ranks(2, _disagreeing_routers, "never")
    assert np.abs(apart[0] - expected).max() > 0.1
