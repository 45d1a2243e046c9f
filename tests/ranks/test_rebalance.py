"""Slots move between ranks: the same weights, the same tokens, little memory."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.support.placements import random_placement
from tests.support.ranks import run_commands, run_ranks
from tests.support.usage import assert_usage_errors

pytestmark = pytest.mark.requires("ranks")

EXPERTS = 12
# Trailing shape and dtype of each parameter of an expert; the last has no bytes.
PARAMETERS = [((3, 2), "float32"), ((5,), "uint32"), ((2,), "bfloat16"), ((0,), "int8")]


def parameters_of(experts):
    """The same numbers for an expert wherever it is."""
    made = []
    for number, (shape, dtype) in enumerate(PARAMETERS):
        rows = [
            np.arange(math.prod(shape)).reshape(shape) + 7 * expert + 1000 * number
            for expert in experts
        ]
        array = np.array(rows).reshape(len(experts), *shape).astype(np.int32)
        made.append(mx.array(array).astype(getattr(mx, dtype)))
    return made


def moves_on_rank(group, count, seed):
    from mlx_ep.comm import GroupComm
    from mlx_ep.moe import move_slots
    from mlx_ep.placement import Moves

    comm = GroupComm(group)
    random = np.random.default_rng(seed)  # alike on all ranks
    placement = random_placement(random, EXPERTS, comm.size)
    held, travelled = parameters_of(placement.rank_experts[comm.rank]), 0
    for number in range(count):
        new = random_placement(random, EXPERTS, comm.size)
        moves = Moves.between(placement, new)
        size = int(random.choice([1, 50, 10**6]))
        # What was moved before is moved on: an error would stay.
        held = [move_slots(p, moves, comm, round_bytes=size) for p in held]
        for got, wanted in zip(held, parameters_of(new.rank_experts[comm.rank])):
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            assert mx.array_equal(got, wanted).item(), (number, placement, new)
        placement, travelled = new, travelled + len(moves.transfers)
    return travelled


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_weights_after_moves(num_ranks: int) -> None:
    travelled = run_ranks(num_ranks, moves_on_rank, 30, num_ranks)
    assert travelled[0] > 30


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("num_ranks", "count"), [(2, 2000), (3, 1500), (4, 1500)])
def test_weights_after_many_moves(num_ranks: int, count: int) -> None:
    """5,000 in all."""
    travelled = run_ranks(num_ranks, moves_on_rank, count, 5, timeout=1000,
                          transport="mpi", checks_shapes=False)  # fmt: skip
    assert travelled[0] > 5 * count


def memory_on_rank(group):
    """Peak of moving a layer, beside what is held before, over the layer's bytes."""
    from mlx_ep.comm import GroupComm
    from mlx_ep.moe import move_slots
    from mlx_ep.placement import Moves, Placement

    comm = GroupComm(group)
    old = Placement.contiguous(16, 2)
    new = Placement(tuple(reversed(old.rank_experts)))
    moves = Moves.between(old, new)
    held = [mx.full((8, 1 << 20), float(i), mx.float32) for i in range(3)]
    mx.eval(held)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for number in range(3):
        held[number] = move_slots(held[number], moves, comm)
    return (mx.get_peak_memory() - before) / sum(p.nbytes for p in held)


def test_one_layers_worth_of_memory() -> None:
    """Everything moves: one parameter of three twice, and a round's buffers."""
    assert max(run_ranks(2, memory_on_rank)) < 1.0


def everything_moves(model, seed):
    """Another random placement for a layer before every pass, and what was moved."""
    state = model.expert_parallel
    random = np.random.default_rng(seed)
    moved = []

    def before():
        layer = int(random.integers(len(state.blocks)))
        placement = random_placement(random, 16, state.group.comm.size)
        if not all(placement.rank_experts):  # mlx-lm's switch has an expert at least
            placement = state.placement_of(layer)
        moved.append(state.place(layer, placement))

    state.blocks[0].before = before
    return moved


def answers_of(model, tokenizer, prompts, max_tokens):
    from mlx_lm.generate import generate_step

    answers = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        steps = generate_step(mx.array(ids), model, max_tokens=max_tokens)
        answers.append([token for token, _ in steps])
    return answers


def tokens_on_rank(group, prompts, max_tokens, options):
    import mlx_ep
    from mlx_ep import EPConfig
    from mlx_ep.loading import find_model

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("mlx_ep").addHandler(handler)
    logging.getLogger("mlx_ep").setLevel(logging.INFO)
    results = []
    for option in options:
        config = EPConfig(warmup=False, **option)
        model, tokenizer = mlx_ep.load(
            str(find_model("jargon-moe")), group, config=config
        )
        moved = [] if option else everything_moves(model, len(prompts))
        lines.clear()
        answers = answers_of(model, tokenizer, prompts, max_tokens)
        counters = model.expert_parallel.counters
        pairs = counters.pairs_computed, counters.pairs_routed
        results.append((answers, *pairs, list(lines), len(moved), sum(moved)))
    return results


def check_tokens(num_ranks, prompts, max_tokens, *options):
    """Tokens of one process, every pair once; the lines and moves of rank 0."""
    import mlx_lm

    from mlx_ep.loading import find_model

    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    expected = answers_of(model, tokenizer, prompts, max_tokens)
    ranks = run_ranks(
        num_ranks, tokens_on_rank, prompts, max_tokens, list(options), timeout=500
    )
    for of_ranks in zip(*ranks, strict=True):
        answers, computed, routed, _, passes, num_bytes = zip(*of_ranks, strict=True)
        assert all(each == expected for each in answers)
        assert set(routed) == {sum(computed)}
        assert len(set(passes)) == len(set(num_bytes)) == 1
    return [result[3:] for result in ranks[0]]


def test_tokens_while_slots_move() -> None:
    """Random placements before every pass; then by the load of the last passes."""
    rule = {"rebalance_every": 3}
    memory = f"{3.5 * 3 * 128 * 64 * 4 * 4 / 1e9:.9f}"
    by_balance = {"rebalance_below": 1.0, "replica_memory": memory}
    forced, every, below = check_tokens(
        2, ["What is a hacker?"], 40, {}, rule, by_balance
    )
    _, passes, num_bytes = forced
    assert passes >= 40 and num_bytes > 0
    for lines, *_ in (every, below):
        assert any("[Rebalance] start: forward_pass_id=" in line for line in lines)
        done = [line for line in lines if "[Rebalance] done" in line]
        assert done and all("bytes=" in line and "seconds=" in line for line in done)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_tokens_while_slots_move_on_more_ranks(num_ranks: int) -> None:
    from benchmarks.bench_tokens import PROMPTS

    check_tokens(num_ranks, PROMPTS[:4], 32, {}, {"rebalance_every": 2})


GENERATE = [sys.executable, "-m", "mlx_ep.generate", "--ranks", "2", "--no-warmup"]


def test_every_layer_has_its_copies(tmp_path: Path) -> None:
    """A record with one hot layer: it gets more copies, and the text stays."""
    from mlx_ep.placement import RecordedRouting, write_record

    both = np.zeros((4, 16, 16), np.int64)
    for layer in range(4):
        np.fill_diagonal(both[layer], 10)
    both[2, 0, 1] = both[2, 1, 0] = both[2, 0, 0] = both[2, 1, 1] = 400
    write_record(file := tmp_path / "r.npz", RecordedRouting(both, 4))
    expert = 3 * 128 * 64 * 4 * 4 / 1e9  # in four layers
    ask = [*GENERATE, "--prompt", "What is a hacker?", "--max-tokens", "8"]
    copies = ["--placement", str(file), "--replica-memory", f"{2.5 * expert:.9f}"]
    texts = []
    for more in ([], copies, [*copies, "--rebalance-every", "2"]):
        ranks = run_commands(2, [*ask, *more])
        assert [rank.returncode for rank in ranks] == [0, 0], ranks
        texts.append(ranks[0].stdout.split("==========")[1])
        if more:
            assert " of a layer" in ranks[0].stdout
    assert texts[0] == texts[1] == texts[2]


def test_wrong_usage_is_said_before_a_weight_is_read(tmp_path: Path) -> None:
    (file := tmp_path / "p.json").write_text(
        json.dumps({"format": "mlx_ep placement", "version": 1, "experts": 16,
                    "ranks": [["0-7"], ["8-15"]],
                    "layers": [[["0-7"], ["8-15"]]] * 3})
    )  # fmt: skip
    assert_usage_errors(
        2,
        [
            (["--placement", str(file)], "the model's 4 MoE layers; it has 3"),
            (["--rebalance-every", "5", "--ep", "1"], "Whole experts are rebalanced"),
        ],
    )
