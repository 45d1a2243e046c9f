"""Copies of experts on real ranks: the same sums and tokens, every pair served once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_exchange import (
    E,
    K,
    configs,
    expected_of,
    group_of,
    inputs_of,
    matrices,
    runner_of,
    tolerance,
)

from mlx_ep.placement import read_record
from tests.support.cases import routing_cases
from tests.support.ranks import run_commands, run_ranks
from tests.support.usage import assert_usage_errors

pytestmark = pytest.mark.requires("ranks")

EXPERTS = 16  # of the embedded model


def with_copies(num_ranks):
    """Each expert on its rank, every second one on the next rank too."""
    from mlx_ep import Placement

    held = [[e for e in range(E) if e % num_ranks == r] for r in range(num_ranks)]
    for expert in range(0, E, 2):
        held[(expert + 1) % num_ranks].append(expert)
    return Placement(tuple(map(tuple, held)))


def check_exchanges(comm):
    """Every strategy against the reference; a rank computes no pair of another."""
    from mlx_ep import EPConfig
    from mlx_ep.types import Routing

    placement, weights = with_copies(comm.size), matrices()
    assert placement.has_replicas
    runner = runner_of(placement, comm.rank, weights)
    cases = routing_cases(comm.size, E, K)
    for name, config in configs().items():
        group = group_of(comm, config, placement)
        for case in cases:
            x, routing, ids, gates = inputs_of(case, comm.rank, "float32")
            group.counters.reset()
            got = np.array(group.weighted_sum(x, routing, runner))
            expected = expected_of(x, ids, gates, weights)
            np.testing.assert_allclose(
                got, expected, rtol=0, atol=tolerance("float32", comm.size),
                err_msg=f"{name}, {case.name}",
            )  # fmt: skip
            pairs = mx.array([group.counters.pairs_computed], mx.int32)
            wanted = sum(int((of_rank >= 0).sum()) for of_rank in case.expert_ids)
            assert int(comm.all_reduce(pairs).item()) == wanted, (name, case.name)
    for reduction in ("partial_sum", "per_slot"):
        group = group_of(comm, EPConfig(reduction=reduction), placement)
        for case in cases:
            x, routing, ids, gates = inputs_of(case, 0, "float32")
            if reduction == "per_slot":
                outputs = group.slot_outputs(x, routing, runner)
                got = (outputs * mx.array(gates)[..., None]).sum(axis=1)
            else:
                got = group.weighted_sum(x, Routing(*routing), runner)
            np.testing.assert_allclose(
                np.array(got), expected_of(x, ids, gates, weights), rtol=0,
                atol=tolerance("float32", comm.size), err_msg=case.name,
            )  # fmt: skip


def exchanges_on_rank(group):
    from mlx_ep.comm import GroupComm

    check_exchanges(GroupComm(group))


@pytest.mark.parametrize(
    "num_ranks", [2, pytest.param(3, marks=pytest.mark.slow), 
                  pytest.param(4, marks=pytest.mark.slow)]
)  # fmt: skip
def test_every_strategy(num_ranks: int) -> None:
    run_ranks(num_ranks, exchanges_on_rank, timeout=240)


def layer_on_rank(group):
    """`MixtureOfExperts` with copies is the layer without."""
    from mlx_ep import EPConfig, Placement
    from mlx_ep.moe import MixtureOfExperts

    copies = Placement(((0, 1, 2, 4), (2, 3, 4, 0)))
    x = mx.array(np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32))
    for strategy in ("replicated", "gathered", "low_latency", "normal"):
        outputs = []
        for placement in (None, copies):
            mx.random.seed(4)
            layer = MixtureOfExperts(
                32, 16, 5, 2, group=group, placement=placement,
                config=EPConfig(strategy=strategy),
            )  # fmt: skip
            outputs.append(np.array(layer(x)))
        np.testing.assert_allclose(*outputs, atol=1e-5)
    with pytest.raises(ValueError, match="4 whole experts on 2 ranks; got 5 on 2"):
        MixtureOfExperts(32, 16, 4, 2, group=group, placement=copies)


def test_mixture_of_experts() -> None:
    run_ranks(2, layer_on_rank)


def answers_on_rank(group, num_prompts, max_tokens, runs):
    """Per run: greedy tokens, pairs computed here and routed, copies on all ranks."""
    import mlx_ep
    from mlx_ep import EPConfig
    from mlx_ep.loading import find_model

    results = []
    for options in runs:
        config = EPConfig(warmup=False, **options)
        model, tokenizer = mlx_ep.load(
            str(find_model("jargon-moe")), group, config=config
        )
        placement = model.expert_parallel.group.placement
        held = model.layers[0].mlp.switch_mlp.gate_proj.weight.shape[0]
        assert held == placement.num_slots(group.rank())
        answers = answers_of(model, tokenizer, num_prompts, max_tokens)
        counters = model.expert_parallel.counters
        pairs = counters.pairs_computed, counters.pairs_routed
        results.append((answers, *pairs, placement.slots.num_experts - EXPERTS))
    # mlx-lm has begun the step after the last token, which needs all ranks.
    model.expert_parallel.group.comm.barrier()
    return results


def answers_of(model, tokenizer, num_prompts, max_tokens):
    from mlx_lm.generate import generate_step

    from benchmarks.bench_tokens import PROMPTS

    answers = []
    for prompt in PROMPTS[:num_prompts]:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        steps = generate_step(mx.array(ids), model, max_tokens=max_tokens)
        answers.append([token for token, _ in steps])
    return answers


def check_tokens(num_ranks, num_prompts, max_tokens, *runs):
    """The copies of each run, on all ranks."""
    import mlx_lm

    from mlx_ep.loading import find_model

    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    expected = answers_of(model, tokenizer, num_prompts, max_tokens)
    ranks = run_ranks(
        num_ranks, answers_on_rank, num_prompts, max_tokens, list(runs), timeout=1500
    )
    for of_ranks in zip(*ranks, strict=True):
        answers, computed, routed, _ = zip(*of_ranks, strict=True)
        assert all(each == expected for each in answers)
        assert set(routed) == {sum(computed)}
    return [copies for *_, copies in ranks[0]]


# One expert of the embedded model is 3 * 128 * 64 float32 in each of 4 layers.
EXPERT_GB = 3 * 128 * 64 * 4 * 4 / 1e9


def memory_of(experts):
    return f"{experts * EXPERT_GB:.9f}GB"


def test_tokens_of_two_ranks() -> None:
    budget = {"replica_memory": memory_of(4.5)}
    as_it_pays = {"replica_memory": "auto", "memory_limit_gb": 1.0}
    copies = check_tokens(2, 1, 8, budget, as_it_pays)
    assert copies[0] == 8 and 8 <= copies[1] <= 16


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_tokens_of_more_ranks(num_ranks: int) -> None:
    runs = [{"replica_memory": memory_of(experts)} for experts in (4.5, 16)]
    copies = check_tokens(num_ranks, 20, 64, *runs)
    assert 0 < copies[0] < copies[1] == EXPERTS * (num_ranks - 1)


GENERATE = [sys.executable, "-m", "mlx_ep.generate", "--ranks", "2", "--no-warmup"]


def test_record_and_place_by_it(tmp_path: Path) -> None:
    """A record of one run places the next one; the text stays."""
    file = tmp_path / "r.npz"
    ask = [*GENERATE, "--prompt", "What is a hacker?", "--max-tokens", "8"]
    ask += ["--replica-memory", memory_of(4.5)]
    texts = []
    # 4.5 experts of four layers: 4 in each, or 18 slots divided among them.
    for copies, more in (
        ("8 copies on all ranks", ["--record", str(file)]),
        ("36 copies in all layers", ["--placement", str(file)]),
    ):
        ranks = run_commands(2, [*ask, *more])
        assert [rank.returncode for rank in ranks] == [0, 0], ranks
        report = ranks[0].stdout
        assert copies in report
        texts.append(report.split("==========")[1])
    assert texts[0] == texts[1]
    record = read_record(file, EXPERTS)
    # Every layer saw all tokens.
    per_layer = record.counts.sum(axis=1)
    assert record.top_k == 4 and len(set(per_layer.tolist())) == 1
    assert (
        per_layer[0] == 4 * json.loads((tmp_path / "r.json").read_text())["num_tokens"]
    )


def test_chat_records_too(tmp_path: Path) -> None:
    file = tmp_path / "r.npz"
    chat = [sys.executable, "-m", "mlx_ep.chat", "--ranks", "2", "--no-warmup"]
    chat += ["--max-tokens", "4", "--record", str(file)]
    ranks = run_commands(2, chat, stdin="What is a hacker?\n/quit\n")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    described = json.loads(file.with_suffix(".json").read_text())
    assert described["num_tokens"] > 4
    per_layer = read_record(file, EXPERTS).counts.sum(axis=1)
    assert set(per_layer.tolist()) == {4 * described["num_tokens"]}


def test_a_wrong_name_is_said_before_a_weight_is_read() -> None:
    options = ["--record", "record.json", "--prompt", "x"]
    assert_usage_errors(2, [(options, "--record must name an .npz file")])
