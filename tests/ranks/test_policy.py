"""Ranks that measured differently choose alike."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.requires("ranks")

D, F, E, K = 32, 16, 5, 2


def _layer(num_slots: int, seed: int):
    from mlx_lm.models.switch_layers import SwitchGLU

    from mlx_ep.tune import Layer

    mx.random.seed(seed)
    switch = SwitchGLU(D, F, max(num_slots, 1))
    if not num_slots:
        for name in ("gate_proj", "up_proj", "down_proj"):
            switch[name].weight = switch[name].weight[:0]
    mx.eval(switch.parameters())
    return Layer(switch, mx.float32, K)


def _measured(seconds: dict[str, float], wrong: str = ""):
    """Stands for the warm-up: an option takes so long, however many rows there are."""
    from mlx_ep.tune import Finding

    def measure(problem, options):
        return {
            option: Finding(left_out="it differs by 0.5")
            if option.runner == wrong
            else Finding((1, 4), (seconds[option.runner],) * 2)
            for option in options
        }

    return measure


CASES = (
    "real measurements",
    "different measurements",
    "wrong on rank 1",
    "a rank without experts",
)


def choices_of(group, folder):
    """By case: what this rank chooses for some T, and what it leaves out."""
    return {case: _choices(group, case, folder) for case in CASES}


def _choices(group, case, folder):
    import importlib
    import os
    import warnings

    from mlx_ep.comm import GroupComm
    from mlx_ep.experts import switch_runner
    from mlx_ep.tune import tune

    rank, comm = group.rank(), GroupComm(group)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{case}/{rank}"  # hosts of their own
    module = importlib.import_module("mlx_ep.tune.agree")
    if case != "real measurements":
        fast, slow = ("gather", "blas") if rank == 0 else ("blas", "gather")
        wrong = "gather" if rank == 1 and case == "wrong on rank 1" else ""
        module.measure = _measured({fast: 1e-3, slow: 2e-3}, wrong)
    slots = [E // 2 + (r < E % 2) for r in range(comm.size)]
    if case == "a rank without experts":
        slots = [E, 0]
    layers = [_layer(slots[rank], seed=rank) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = tune(layers, E, comm)
    choose = switch_runner(layers[1].switch).choose
    chosen = [str(choose(t)) for t in (0, 1, 7, 64, 1000)]
    shape = policy.experts[0]
    predicted = [shape.predicted(o, 16) for o in shape.possible]
    return chosen, {str(o): why for o, why in shape.left_out.items()}, predicted


def test_ranks_choose_alike(tmp_path: Path) -> None:
    first, second = run_ranks(2, choices_of, str(tmp_path))
    assert first == second
    for case, (chosen, left_out, predicted) in first.items():
        assert np.isfinite(predicted).all()
        if case == "wrong on rank 1":
            assert chosen == ["blas on cpu"] * 5
            assert left_out["gather on cpu"] == "rank 1: it differs by 0.5"
        elif case != "real measurements":
            assert chosen == ["gather on cpu"] * 5  # as rank 0 measured


def force_differently(group):
    import os

    from mlx_ep.comm import GroupComm
    from mlx_ep.tune import Wish, tune

    comm = GroupComm(group)
    os.environ["MLX_EP_BACKEND"] = "cpu" if group.rank() == 0 else "metal"
    texts = []
    with pytest.warns(UserWarning, match="differs between ranks"):
        tune([_layer(2, 0)], E, comm, Wish(warmup=False))
    os.environ["MLX_EP_BACKEND"] = ""
    for wish in (Wish(backend="metal"), Wish(runner="metal")):
        with pytest.raises(ValueError, match="Nothing can run") as error:
            tune([_layer(2, 0)], E, comm, wish)
        texts.append(str(error.value))
    return texts


def test_what_is_forced_is_refused_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0's environment counts; an error has one text on all ranks."""
    first, second = run_ranks(
        2, force_differently, env={"XDG_CACHE_HOME": str(tmp_path)}
    )
    assert first == second and len(first) == 2


def explain_a_model(group):
    """What a model that was made expert-parallel says, and how its strategy moves."""
    import mlx_ep
    from mlx_ep.config import EPConfig
    from mlx_ep.rows import OPS
    from tests.support import tiny

    model = tiny.make_model(tiny.QWEN3_MOE)
    mlx_ep.parallelize(model, group, EPConfig(strategy="auto"))
    state = model.expert_parallel
    (movement,) = state.policy.movement
    mover = state.group.strategy.mover
    assert mover.choose == movement.choose
    assert type(mover("rows", 5)) is type(OPS) and mover("rows", 5) is mover("ranks", 9)
    mx.eval(model(mx.array([[1, 2, 3]])))
    return state.policy.explain([1, 256])


def test_a_model_explains_movement_and_exchange(tmp_path: Path) -> None:
    first, second = run_ranks(2, explain_a_model, env={"XDG_CACHE_HOME": str(tmp_path)})
    for text in (first, second):
        for line in (
            "Movement of 64 float32, top 3, 2 ranks; an all-to-all's rows: plan, pack",
            "Movement of 64 float32, top 3, 2 ranks; sums of all ranks; by the default",
            "ops on cpu: not measured",
            "left out: metal on metal, because MLX does not compute on a GPU",
            "Exchange of 64 float32, top 3, 2 ranks; strategy auto, 2 ranks, ring",
            "T=1: low_latency, because no rank has more than 64 tokens (gathered",
            "T=256: normal, because there are more than 64 tokens, and not all need",
        ):
            assert line in text, text
