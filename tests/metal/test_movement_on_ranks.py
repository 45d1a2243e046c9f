"""Layers on real ranks whose rows the kernels move, and layers with wrong kernels.

The kernels run on the CPU of each rank, from the source and through the launches that a
GPU would get.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.support.cases import routing_cases
from tests.support.ranks import run_ranks
from tests.support.reference import moe_sum, swiglu_expert

pytestmark = [
    pytest.mark.requires("ranks"),
    pytest.mark.requires("host_metal"),
    pytest.mark.skipif(mx.metal.is_available(), reason="the GPU runs them there"),
]

# D: in 8 bits a value 9 words, as wide as the kernels need
D, F, E, K = 32, 16, 7, 3
CASES = ("uneven T", "no tokens on rank 0", "some without expert", "all to rank 0")
KERNELS = {
    "route_plan", "pack_rows", "unpack_sum", "quantize_rows", "dequantize_rows",
}  # fmt: skip


def execute_on_cpu():
    """In a rank's process: kernels execute on the CPU, and Metal seems to be there."""
    from mlx_ep.experts import table
    from mlx_ep.kernels import loader
    from mlx_ep.rows import mover
    from tests.support import host

    patch = pytest.MonkeyPatch()
    loader.forget_kernels()
    for module in (mover, table):
        patch.setattr(module, "uses_metal", lambda: True)
    return host.install(patch)


def strategies():
    from mlx_ep import EPConfig

    small = {"low_latency_tokens": 2, "round_tokens": 3}
    return {
        "normal": EPConfig(strategy="normal"),
        "normal in rounds": EPConfig(strategy="normal", **small),
        "low_latency": EPConfig(strategy="low_latency"),
        "all_to_all": EPConfig(strategy="all_to_all", **small),
        "auto": EPConfig(strategy="auto", **small),
        "normal, int8": EPConfig(strategy="normal", dispatch_dtype="int8"),
        "gathered, mxfp8": EPConfig(strategy="gathered", dispatch_dtype="mxfp8"),
    }


def group_of(comm, config, num_experts=E, option=None):
    """Its rows are moved by an option; None: by MLX's ops."""
    from mlx_ep import Placement
    from mlx_ep.exchange import STRATEGIES
    from mlx_ep.moe import ExpertGroup
    from mlx_ep.rows import Mover

    held = (tuple(range(r, num_experts, comm.size)) for r in range(comm.size))
    group = ExpertGroup.from_config(comm, Placement(tuple(held)), config)
    if option is None:
        return group
    mover = Mover(lambda job, tokens: option)
    return replace(group, strategy=STRATEGIES.create(config, mover))


def weights_of(num_experts=E):
    random = np.random.default_rng(3)
    shapes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    return {
        name: random.normal(size=(num_experts, *shape), scale=shape[1] ** -0.5).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def switch_of(placement, rank, weights):
    """The rank's own experts as mlx-lm holds them."""
    from mlx_lm.models.switch_layers import SwitchGLU

    switch = SwitchGLU(D, F, 1)
    held = list(placement.rank_experts[rank])
    for name, weight in weights.items():
        switch[name].weight = mx.array(weight[held])
    return switch


def inputs_of(case, rank, dtype=mx.float32):
    from mlx_ep.types import Routing

    random = np.random.default_rng(40 + rank)
    x = random.normal(size=(case.tokens[rank], D)).astype(np.float32)
    routing = Routing(mx.array(case.expert_ids[rank]), mx.array(case.gates[rank]))
    return mx.array(x).astype(dtype), routing


def expected_of(x, case, rank, weights):
    names = ("gate_proj", "up_proj", "down_proj")
    count = len(weights["gate_proj"])
    experts = [swiglu_expert(*(weights[n][e] for n in names)) for e in range(count)]
    exact = np.array(x.astype(mx.float32))
    return moe_sum(exact, case.expert_ids[rank], case.gates[rank], experts)


def check_movements(group):
    """Bit for bit the sums that MLX's ops give, and by the kernels."""
    from mlx_ep.comm import GroupComm
    from mlx_ep.experts import switch_runner
    from mlx_ep.rows import Option

    launches = execute_on_cpu()
    comm, weights = GroupComm(group), weights_of()
    cases = {case.name: case for case in routing_cases(comm.size, E, K)}
    for name, config in strategies().items():
        layer = group_of(comm, config)
        runner = switch_runner(switch_of(layer.placement, comm.rank, weights))
        is_main = name == "normal"
        for case in (cases[name] for name in CASES[: 4 if is_main else 1]):
            both = (mx.float32, mx.bfloat16)
            for dtype in both[: 2 if is_main and case.name == CASES[0] else 1]:
                x, routing = inputs_of(case, comm.rank, dtype)
                sums = []
                for option in (Option("ops", "cpu"), Option("metal", "metal")):
                    layer = group_of(comm, config, option=option)
                    sums.append(np.array(layer.weighted_sum(x, routing, runner)))
                what = f"{name}, {case.name}, {dtype}"
                np.testing.assert_array_equal(*sums, err_msg=what)
                if dtype == mx.float32 and config.dispatch_dtype == "model":
                    expected = expected_of(x, case, comm.rank, weights)
                    np.testing.assert_allclose(
                        sums[1], expected, rtol=0, atol=1e-5, err_msg=what
                    )
    comm.barrier()
    return {
        kernel
        for kernel in KERNELS
        for launch in launches
        if f"ep_{kernel}" in launch.name
    }


@pytest.mark.parametrize(
    ("num_ranks", "transport"),
    [
        pytest.param(1, "ring", marks=pytest.mark.slow),
        (2, "ring"),
        pytest.param(3, "mpi", marks=[pytest.mark.requires("mpi"), pytest.mark.slow]),
    ],
)
def test_the_kernels_move_the_rows_of_a_layer(num_ranks, transport):
    for used in run_ranks(num_ranks, check_movements, transport=transport, timeout=200):
        # On one rank nothing leaves, and on each of several everything is used.
        assert used == (KERNELS if num_ranks > 1 else KERNELS - {"pack_rows"})


def check_all_kernels(group):
    """Experts, pair sums and movement by kernels; a rank may hold no expert."""
    from mlx_ep.comm import GroupComm
    from mlx_ep.experts import install_runner
    from mlx_ep.rows import Mover, Option

    execute_on_cpu()
    comm = GroupComm(group)
    kernel = Option("metal", "metal")
    few = comm.size - 1  # then one rank holds none
    for num_experts in (few, E):
        weights = weights_of(num_experts)
        top_k = min(2, num_experts)
        cases = routing_cases(comm.size, num_experts, top_k)
        cases = {case.name: case for case in cases}
        for strategy in ("normal", "low_latency")[: 2 if num_experts == few else 1]:
            layer = group_of(comm, strategies()[strategy], num_experts, kernel)
            switch = switch_of(layer.placement, comm.rank, weights)
            options = (kernel, Option("gather", "metal"))
            for option in options[: 2 if strategy == "normal" else 1]:
                mover = Mover(lambda job, tokens: kernel)
                runner = install_runner(switch, lambda rows, o=option: o, mover)
                layer.counters.reset()
                for name in ("uneven T", "tokens on rank 0 only"):
                    case = cases[name]
                    x, routing = inputs_of(case, comm.rank)
                    got = np.array(layer.weighted_sum(x, routing, runner))
                    np.testing.assert_allclose(
                        got,
                        expected_of(x, case, comm.rank, weights),
                        rtol=0,
                        atol=1e-5,
                        err_msg=f"{strategy}, {option}, {num_experts}, {name}",
                    )
                pairs = sum(
                    int(np.isin(ids, layer.placement.rank_experts[comm.rank]).sum())
                    for name in ("uneven T", "tokens on rank 0 only")
                    for ids in cases[name].expert_ids
                )
                assert layer.counters.pairs_computed == pairs
    comm.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "transport"),
    [(2, "ring"), pytest.param(3, "mpi", marks=pytest.mark.requires("mpi"))],
)
def test_a_whole_layer_by_kernels(num_ranks, transport):
    """Nothing hangs and pairs are counted, also where a rank has no experts."""
    run_ranks(num_ranks, check_all_kernels, transport=transport, timeout=200)


def logits_by_kernels(group):
    """A model with everything by kernels, beside the same one by MLX's ops."""
    import mlx_ep
    from mlx_ep.config import EPConfig
    from mlx_ep.exchange import STRATEGIES
    from mlx_ep.experts import install_runner
    from mlx_ep.rows import Mover, Option
    from tests.support import tiny

    tokens, kernel = mx.array([[5, 9, 200, 31, 7]]), Option("metal", "metal")
    for strategy in ("auto", "normal"):
        config = EPConfig(strategy=strategy, warmup=False, low_latency_tokens=8)
        model = mlx_ep.parallelize(tiny.make_model(tiny.QWEN3_MOE), group, config)
        expected, state = np.array(model(tokens)), model.expert_parallel
        pairs = state.counters.pairs_computed
        state.counters.reset()
        execute_on_cpu()
        mover = Mover(lambda job, tokens: kernel)
        moved = replace(state.group, strategy=STRATEGIES.create(config, mover))
        for block in state.blocks:
            block.group = moved
            install_runner(block.form.site.switch, lambda rows: kernel, mover)
        got = np.array(model(tokens))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
        assert state.counters.pairs_computed == pairs > 0


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_model_by_kernels(num_ranks):
    run_ranks(num_ranks, logits_by_kernels, timeout=200)


# ---------------------------------------------------------------- wrong kernels

# By file: what it says, and what it is made to say. Values are wrong, memory is not.
WRONG = {
    "": [],
    "experts": [
        ("weights.h", "weights[b][i] * values[i]", "weights[b][i] * values[0]")
    ],
    "route_plan": [
        ("route_plan.metal", "row_tokens[row] = token;", "row_tokens[row] = token / 2;")
    ],
    "pack_rows": [("pack_rows.metal", "= values[i];", "= values[0];")],
    "unpack_sum": [("unpack_sum.metal", "+= gate * values[i]", "= gate * values[i]")],
}
LEFT_OUT = {
    "": set(),
    "experts": {"experts"},
    "route_plan": {"rows"},
    "pack_rows": {"rows"},
    "unpack_sum": {"rows", "ranks", "pairs"},
}


def run_with_wrong_kernels(group, folder):
    """What each kind of wrong kernel does to a layer; found at its warm-up."""
    import os

    from mlx_ep.comm import GroupComm

    comm = GroupComm(group)
    execute_on_cpu()
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{comm.rank}"
    return {what: _with_wrong(comm, what) for what in WRONG}


def _with_wrong(comm, what):
    from mlx_ep.exchange import STRATEGIES
    from mlx_ep.experts import switch_runner
    from mlx_ep.kernels import loader
    from mlx_ep.tune import Layer, Wish, check, experts, tune
    from mlx_ep.tune import movement as movements

    original, weights = loader.source, weights_of()

    def mutated(file):
        text = original(file)
        for which, old, new in WRONG[what]:
            if which == file:
                assert old in text, "the kernel has changed: adapt this test"
                text = text.replace(old, new)
        return text

    # Enough to see what is wrong; how fast it would be on a GPU does not show here.
    movements.TOKENS, experts.ROWS_PER_SLOT = (5,), (1, 4)
    check.TIMED_SECONDS = 0.0
    loader.source = mutated
    loader.forget_kernels()
    try:
        config = strategies()["normal in rounds"]
        layer = group_of(comm, config)
        switch = switch_of(layer.placement, comm.rank, weights)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            policy = tune(
                [Layer(switch, mx.float32, K)],
                E,
                comm,
                Wish(backend="metal"),
                moves_rows=True,
                placement=layer.placement,
            )
        if policy.mover is not None:
            strategy = STRATEGIES.create(config, policy.mover)
            layer = replace(layer, strategy=strategy)
        (shape,), (movement,) = policy.experts, policy.movement
        left_out = {
            job: {str(o): why for o, why in found.left_out.items()}
            for job, found in {"experts": shape, **movement.jobs}.items()
        }
        case = next(c for c in routing_cases(comm.size, E, K) if c.name == "uneven T")
        x, routing = inputs_of(case, comm.rank)
        got = np.array(layer.weighted_sum(x, routing, switch_runner(switch)))
        error = np.abs(got - expected_of(x, case, comm.rank, weights)).max(initial=0)
        said = [str(w.message) for w in caught if "left out" in str(w.message)]
        chosen = [str(movement.choose(j, t)) for j in movement.jobs for t in (1, 99)]
        return left_out, float(error), said, policy.explain([1]), chosen
    finally:
        loader.source = original
        loader.forget_kernels()


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_layer_with_a_wrong_kernel_is_right(num_ranks, tmp_path):
    results = run_ranks(num_ranks, run_with_wrong_kernels, str(tmp_path), timeout=200)
    no_exchange = {"rows", "ranks"} if num_ranks == 1 else set()
    for what in WRONG:
        expected = set(LEFT_OUT[what]) - no_exchange
        for rank, result in enumerate(results):
            left_out, error, said, text, chosen = result[what]
            assert chosen == results[0][what][-1]  # each has measured for itself
            assert error < 1e-5, (what, rank, error)
            whys = {
                job: found["metal on metal"]
                for job, found in left_out.items()
                if "metal on metal" in found
            }
            assert set(whys) == expected, (what, left_out)
            assert all("differs from the reference by" in w for w in whys.values())
            # Rank 0 says it once, with the numbers; all ranks can explain it.
            assert len(said) == (len(expected) if rank == 0 else 0)
            assert all("is left out, because" in line for line in said)
            assert text.count("left out: metal on metal, because") == len(expected)
