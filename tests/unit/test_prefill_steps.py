"""Where the host waits while a prompt is read, and NaN that is found there."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_ep
from mlx_ep import data_parallel
from mlx_ep.api.machines import (
    layers_between,
    machine_facts,
    shares_rank_0_routing,
    unlike,
)
from mlx_ep.cli.generation import add_sampling_flags, rank_sampler
from mlx_ep.cli.parser import Parser
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.models import build_kernels
from mlx_ep.moe.group import MOST_DECODE_TOKENS
from tests.support import tiny

# Six layers, of which the first has no experts.
SIX = tiny.QWEN3_MOE | {"num_hidden_layers": 6}


def made(config=SIX, **settings):
    model = tiny.make_model(config)
    settings = EPConfig(warmup=False, **settings)
    return mlx_ep.parallelize(model, config=settings)


@pytest.fixture
def boundaries(monkeypatch):
    """The layers after which a prompt was evaluated, with the rows."""
    found = []
    evaluate = mx.eval

    def watched(*arrays):
        frame = sys._getframe(1)
        if frame.f_code.co_name == "_end":
            found.append((frame.f_locals["self"].step.layer, arrays[0].shape[0]))
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", watched)
    return found


def answer(model, num_tokens=150, chunk=100):
    prompt = mx.arange(num_tokens) % tiny.VOCABULARY
    steps = generate_step(prompt, model, max_tokens=8, prefill_step_size=chunk)
    return [int(token) for token, _ in steps]


def test_a_prompt_is_evaluated_by_chunks_and_groups_of_layers(boundaries):
    expected = answer(made())
    assert boundaries == []
    got = answer(made(eval_layers=2))
    # Two chunks (of the second, 49 tokens, as many as decode may have, nothing).
    assert boundaries == [(2, 100), (4, 100)]
    assert got == expected


def test_layers_count_anew_in_each_pass(boundaries):
    answer(made(eval_layers=2), num_tokens=250)
    assert boundaries == [(2, 100), (4, 100)] * 2
    boundaries.clear()
    answer(made(eval_layers=1), num_tokens=MOST_DECODE_TOKENS + 2)
    assert boundaries == [(layer, MOST_DECODE_TOKENS + 1) for layer in range(1, 6)]
    boundaries.clear()
    answer(made(eval_layers=1), num_tokens=MOST_DECODE_TOKENS + 1)
    assert boundaries == []


def test_kernels_are_built_without_a_collective(monkeypatch):
    model = made()
    counters, evaluated = model.expert_parallel.counters, []
    counters.reset()
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: (evaluated.append(a), evaluate(*a)))
    build_kernels(model, model.expert_parallel.blocks)
    assert [logits.shape[1] for (logits,) in evaluated] == [64, 1]
    assert (counters.collectives, counters.layer_calls) == (0, 0)
    model(mx.array([[1]]), cache=make_prompt_cache(model))
    assert counters.layer_calls == 5


@pytest.mark.parametrize(
    ("given", "backends", "layers"),
    [
        (None, ["cpu", "cpu"], 0),
        (None, ["cpu", "metal"], 8),  # on all ranks alike
        (None, ["metal"], 0),  # a rank alone waits for nobody
        (3, ["cpu", "cpu"], 3),
        (0, ["metal", "metal"], 0),
    ],
)
def test_when_a_prompt_is_evaluated(given, backends, layers):
    machines = [{"backend": backend} for backend in backends]
    assert layers_between(EPConfig(eval_layers=given), machines) == layers


# Fingerprints of steps ----------------------------------------------------------------


@pytest.mark.parametrize("is_sharded", [True, False])
def test_the_steps_of_a_batch_are_compared(is_sharded, monkeypatch, tmp_path):
    folder = str(tiny.save_checkpoint(tmp_path, tiny.QWEN3_MOE))
    config = EPConfig(warmup=False, strategy="gathered" if is_sharded else "replicated")
    model, tokenizer = mlx_ep.load(folder, config=config)
    steps = []
    monkeypatch.setattr(data_parallel, "note_step", lambda *n: steps.append(n))
    generate = "generate_sharded" if is_sharded else "generate_replicated"
    found = getattr(data_parallel, generate)(
        model,
        tokenizer,
        [[5, 6, 7], [8, 9]],
        GroupComm(mx.distributed.init()),
        max_tokens=4,
        sampler=make_sampler(0.0),
    )
    (first, second) = (answer.tokens for answer in found.answers)
    if is_sharded:  # what all ranks know: tokens, whether there is more, answers
        assert all(len(step) == 3 for step in steps[:3])
        assert {(0, *first), (1, *second)} <= set(steps)
    else:
        noted = [token for step in steps for token in step]
        assert len(noted) == 8 and sorted(noted) == sorted(first + second)


# What ranks may differ in -------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({}, {}),
        ({"MLX_ENABLE_TF32": "0"}, {"MLX_ENABLE_TF32": "0"}),
        ({"MLX_METAL_FAST_SYNCH": "1"}, {"MLX_METAL_FAST_SYNCH": "1"}),
        # The launcher's, and ours: a secret is nobody's business.
        ({"MLX_RANK": "1", "MLX_HOSTFILE": "x", "MLX_EP_SECRET": "s" * 16}, {}),
        ({"MLX_JACCL_COORDINATOR": "x", "MLX_IBV_DEVICES": "y"}, {}),
        ({"PATH": "x"}, {}),
    ],
)
def test_variables_that_count(environ, shown):
    facts = machine_facts(environ)
    assert {name: facts[name] for name in facts if name.startswith("MLX_")} == shown
    assert {"mlx", "machine", "chip", "backend"} <= set(facts)


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        ({}, ""),
        ({"chip": "M4"}, "chip: rank 0 M3, rank 1 M4"),
        ({"mlx": "2"}, "mlx: rank 0 1, rank 1 2"),
        ({"MLX_X": "1"}, "MLX_X: rank 0 not set, rank 1 1"),
        ({"MLX_X": "1", "mlx": "2"}, "mlx: rank 0 1, rank 1 2; MLX_X: rank 0 not set, "
         "rank 1 1"),
    ],
)  # fmt: skip
def test_ranks_that_may_round_differently_take_rank_0s_routing(other, differ):
    one = {"mlx": "1", "chip": "M3"}
    ranks = [one, one | other]
    assert unlike(ranks) == differ
    assert shares_rank_0_routing(EPConfig(), ranks) == bool(differ)
    assert shares_rank_0_routing(EPConfig(shared_routing="always"), ranks)
    assert not shares_rank_0_routing(EPConfig(shared_routing="never"), ranks)


# NaN ----------------------------------------------------------------------------------


def nan_in(model, layer, name):
    parameter = model.model.layers[layer]
    *path, last = name.split(".")
    for part in path:
        parameter = parameter[part]
    parameter[last] = parameter[last] * np.nan
    return model


@pytest.mark.parametrize("reduction", ["partial_sum", "per_slot"])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mlp.switch_mlp.down_proj.weight", "in what this rank's experts give"),
        ("self_attn.o_proj.weight", "in what comes to its experts"),
    ],
)
def test_nan_is_found_where_it_appears(name, what, reduction):
    config = {"reduction": reduction}
    tokens = mx.array([[1, 2, 3]])
    model = nan_in(made(check_nan=True, **config), 3, name)
    with pytest.raises(FloatingPointError, match=f"NaN on rank 0, layer 3: {what}"):
        model(tokens)
    # Without the flag nobody looks.
    mx.eval(nan_in(made(**config), 3, name)(tokens))
    # What is right stays as it is.
    checked, expected = (made(check_nan=c, **config)(tokens) for c in (True, False))
    assert mx.array_equal(checked, expected)


@pytest.mark.parametrize("is_asked", [True, False])
def test_nan_in_the_logits_is_found(is_asked):
    parser = Parser()
    add_sampling_flags(parser)
    args = parser.parse_args([])
    args.config = EPConfig(check_nan=is_asked)
    sample = rank_sampler(args, TokenizerWrapper(tiny.make_tokenizer()))
    assert sample(mx.array([[0.0, 2.0, 1.0]])).item() == 1
    broken = mx.array([[0.0, np.nan, 1.0]])
    if is_asked:
        with pytest.raises(FloatingPointError, match="NaN in the logits"):
            sample(broken)
    else:
        mx.eval(sample(broken))
