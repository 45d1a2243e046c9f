"""`--overlap two` on ranks: the same tokens, no more memory, a rank without tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_ep
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.data_parallel import generate_replicated, generate_sharded
from mlx_ep.exchange import (
    STRATEGIES,
    InFlight,
    moe_combine_start,
    moe_dispatch_start,
)
from mlx_ep.loading import find_model
from mlx_ep.placement import Placement
from mlx_ep.types import Routing, TokenCounts
from tests.support import tiny
from tests.support.ranks import run_commands, run_ranks
from tests.support.waiting import LONG, until

pytestmark = pytest.mark.requires("ranks")

ALL = ("replicated", "gathered", "low_latency", "normal", "auto")
RNG = np.random.default_rng(2)
PROMPTS = [RNG.integers(20, 1000, size).tolist() for size in (5, 40, 17, 9, 33, 64, 21)]


def answers(group, overlap, strategy):
    """Of prompts that end one after another, in batches whose sizes change."""
    config = EPConfig(strategy=strategy, overlap=overlap, warmup=False)
    model, tokenizer = mlx_ep.load(str(find_model("jargon-moe")), group, config)
    generate = generate_replicated if strategy == "replicated" else generate_sharded
    result = generate(
        model,
        tokenizer,
        PROMPTS,
        GroupComm(group),
        max_tokens=[4 + 2 * index for index in range(len(PROMPTS))],
        sampler=lambda logprobs: mx.argmax(logprobs, axis=-1),
        completion_batch_size=5,
        prefill_batch_size=2,
        prefill_step_size=32,
    )
    if overlap == "two":
        assert model.expert_parallel.two_batch is not None
    return [(answer.prompt, answer.tokens) for answer in result.answers]


def tokens_of(group, strategies):
    for strategy in strategies:
        plain = answers(group, "none", strategy)
        assert sum(len(tokens) for _, tokens in plain) > 30
        assert answers(group, "two", strategy) == plain, strategy
    # MPI ends all ranks when the first one leaves, and a step more has begun.
    GroupComm(group).barrier()


@pytest.mark.parametrize(
    ("num_ranks", "strategies"),
    [
        (2, ("replicated", "low_latency")),
        pytest.param(2, ALL, marks=pytest.mark.slow),
        pytest.param(3, ALL, marks=pytest.mark.slow),
        pytest.param(4, ALL, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_the_same(num_ranks, strategies):
    transport = "ring" if num_ranks == 2 else "mpi"
    run_ranks(num_ranks, tokens_of, strategies, transport=transport)


def one_by_one(rank, path, start):
    """What rank 1 starts only when rank 0's own start has returned."""
    until(
        lambda: rank == 0 or path.exists(),
        lambda: f"{path.name}: rank 0 waits for rows",
        LONG / 2,
    )
    result = start()
    path.touch()
    return result


def starts(group, strategy, folder):
    """Dispatch and combine of rank 0 return while rank 1 has sent nothing."""
    comm, rank, folder = GroupComm(group), group.rank(), Path(folder)
    placement = Placement.contiguous(4, 2)
    x = mx.random.normal((6, 32), key=mx.random.key(rank))
    ids = mx.array(np.random.default_rng(rank).integers(0, 4, (6, 2)), mx.int32)
    routing = Routing(ids, mx.full((6, 2), 0.5))
    made = STRATEGIES.create(EPConfig(strategy=strategy))
    mx.eval(x, ids)
    with InFlight() as flight:

        def dispatch():
            both = {"tokens": TokenCounts((6, 6))}
            return moe_dispatch_start(x, routing, placement, comm, made, flight, **both)

        receive, handle = one_by_one(rank, folder / f"dispatch-{strategy}", dispatch)
        rows = receive()
        weights = (rows.slot_ids >= 0).astype(mx.float32) * rows.gates
        partial = rows.x * weights.sum(axis=1, keepdims=True)
        mx.eval(partial)

        def combine():
            return moe_combine_start(partial, handle, flight)

        total = one_by_one(rank, folder / f"combine-{strategy}", combine)()
        mx.eval(total)
    np.testing.assert_allclose(np.array(total), np.array(x), rtol=1e-5)


def all_starts(group, folder):
    for strategy in ("gathered", "low_latency"):
        starts(group, strategy, folder)


def test_dispatch_and_combine_return_before_rows_arrive(tmp_path):
    run_ranks(2, all_starts, str(tmp_path))


def uneven(group, strategy):
    """Ranks with 1 and 5 sequences, with prompts of 20 and 40, and with nothing."""
    logits = {}
    rank = group.rank()
    for overlap in ("none", "two"):
        model = tiny.make_model(tiny.DEEPSEEK_V3)
        config = EPConfig(strategy=strategy, overlap=overlap, warmup=False)
        mlx_ep.parallelize(model, group, config)
        parallel, found = model.expert_parallel, []
        rows = 1 + 4 * rank
        tokens = mx.array(np.random.default_rng(rank).integers(2, 300, (rows, 42)))
        singles = [make_prompt_cache(model) for _ in range(rows)]
        batch = [layer[0].merge(list(layer)) for layer in zip(*singles, strict=True)]
        length = 20 + 20 * rank

        def step(part, model=model, batch=batch, group=parallel.group, to=found):
            with group.agreed(part.size):
                y = model(part, cache=batch)
                mx.eval(y)
                to.append(np.array(y))

        step(tokens[:, :length])
        step(tokens[:, 40:41])
        for _ in range(2):  # rank 0 is done
            if rank == 0:
                with parallel.group.agreed(0):
                    parallel.serve()
            else:
                step(tokens[:, 41:])
        logits[overlap] = found
    for plain, cut in zip(*logits.values(), strict=True):
        np.testing.assert_allclose(cut, plain, rtol=0, atol=2e-4, err_msg=strategy)


def unevens(group, strategies):
    for strategy in strategies:
        uneven(group, strategy)


def test_ranks_with_other_numbers_of_tokens_agree():
    run_ranks(2, unevens, ("gathered", "normal"))


def peaks(group, settings):
    """The most memory of a prompt and of decode steps, by the way that they run."""
    wide = tiny.QWEN2_MOE | {"hidden_size": 256, "moe_intermediate_size": 128}
    found = {}
    for overlap in ("none", "two"):
        model = tiny.make_model(wide)
        config = EPConfig(overlap=overlap, runner="gather", warmup=False, **settings)
        mlx_ep.parallelize(model, group, config)
        mx.eval(model.parameters())
        prompt = mx.random.randint(2, 300, (1, 512), key=mx.random.key(0))
        cache = make_prompt_cache(model)
        mx.clear_cache()
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        model(prompt, cache=cache)
        mx.eval([c.state for c in cache])
        prefill = mx.get_peak_memory() - base
        batch = [c.merge([c] * 8) for c in cache]
        del cache
        mx.eval([c.state for c in batch])
        for step in range(4):
            if step == 1:  # the batch has been cut
                mx.clear_cache()
                mx.reset_peak_memory()
                base = mx.get_active_memory()
            mx.eval(model(mx.arange(8)[:, None], cache=batch))
        found[overlap] = (prefill, mx.get_peak_memory() - base)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "replicated"},
        pytest.param({"strategy": "gathered"}, marks=pytest.mark.slow),
        pytest.param(
            {"strategy": "all_to_all", "mode": "normal"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"strategy": "all_to_all", "mode": "auto"}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_peak_memory_is_no_higher(settings):
    for found in run_ranks(2, peaks, settings, checks_shapes=False):
        prefill, decode = zip(found["none"], found["two"], strict=True)
        assert prefill[1] <= prefill[0], found
        assert decode[1] <= decode[0], found


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["replicated", "tensor", "data"])
def test_commands_give_the_same_answers(tmp_path, attention):
    model = str(tiny.save_checkpoint(tmp_path / "model", tiny.QWEN3_MOE))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"word {'and ' * n}word" for n in (1, 20, 5, 9)))
    texts = []
    for overlap in ("none", "two", "auto"):
        argv = [sys.executable, "-m", "mlx_ep.generate", "--model", model]
        argv += ["--prompts-file", str(prompts), "--max-tokens", "8"]
        argv += ["--attention", attention, "--overlap", overlap, "--verbose", "F"]
        outcomes = run_commands(2, argv)
        assert [one.returncode for one in outcomes] == [0, 0], outcomes
        texts.append(sorted(outcomes[0].stdout.splitlines()))
    assert len(texts[0]) == 4 and texts[0] == texts[1] == texts[2]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", "mxfp8"])
def test_halves_of_rounded_rows_give_the_same_answers(tmp_path, form):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"What is a {w}?" for w in ("bug", "worm", "patch")))
    texts = []
    for overlap in ("none", "two"):
        argv = [sys.executable, "-m", "mlx_ep.generate", "--max-tokens", "12"]
        argv += ["--prompts-file", str(prompts), "--attention", "data"]
        argv += ["--dispatch-dtype", form, "--overlap", overlap, "--verbose", "F"]
        outcomes = run_commands(2, argv)
        assert [one.returncode for one in outcomes] == [0, 0], outcomes
        texts.append(sorted(outcomes[0].stdout.splitlines()))
    assert len(texts[0]) == 3 and texts[0] == texts[1]
