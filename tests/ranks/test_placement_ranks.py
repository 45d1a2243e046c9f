"""Uneven placements and experts whose width is shared, on real ranks."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import mlx_ep
from mlx_ep.config import EPConfig
from mlx_ep.loading import expert_sizes, held_bytes
from tests.support import tiny
from tests.support.architectures import ARCHITECTURES
from tests.support.ranks import run_commands, run_ranks

pytestmark = pytest.mark.requires("ranks")

AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
CONFIGS = {
    "qwen3_moe": {**tiny.QWEN3_MOE, "moe_intermediate_size": 96},
    "gpt_oss": {**tiny.GPT_OSS, "intermediate_size": 96},  # biases
    "phixtral": ARCHITECTURES["phixtral"],  # two matrices, biases
    "olmoe": {**tiny.OLMOE, "intermediate_size": 96},
    "kimi_k3": ARCHITECTURES["kimi_k3"],  # a norm behind its sum
    "longcat": tiny.LONGCAT,  # identity experts
}
WIDE_DEEPSEEK = {**tiny.DEEPSEEK_V3, "moe_intermediate_size": 96}  # shared experts
PROMPT = np.random.default_rng(0).integers(2, 300, 40)
NUM_STEPS = 3


def _logits(model: Any) -> np.ndarray:
    cache = make_prompt_cache(model)
    tokens = mx.array(PROMPT)[None]
    steps = [tokens[:, :-NUM_STEPS]]
    steps += [tokens[:, i : i + 1] for i in range(len(PROMPT) - NUM_STEPS, len(PROMPT))]
    return np.array(mx.concatenate([model(step, cache=cache) for step in steps], 1)[0])


@dataclass(frozen=True)
class Case:
    """One model on all ranks.

    Attributes:
        configs: of every rank; one for all.
        folder: of its checkpoint; "" for gpt_oss in memory.
    """

    configs: tuple[EPConfig, ...]
    folder: str = ""
    is_dummy: bool = False


@dataclass(frozen=True)
class Seen:
    """What a rank saw of it."""

    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    experts: str = ""
    held: int = 0
    computed: int = 0
    routed: int = 0
    error: str = ""


def _run(group: mx.distributed.Group, cases: list[Case]) -> list[Seen]:
    return [_run_one(group, case) for case in cases]


def _run_one(group: mx.distributed.Group, case: Case) -> Seen:
    config = case.configs[group.rank() % len(case.configs)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # K outputs per token may have to travel
            if case.folder:
                model, _ = mlx_ep.load(
                    case.folder, group, config, dummy_weights=case.is_dummy
                )
            else:
                model = tiny.make_model(CONFIGS["gpt_oss"])
                mlx_ep.parallelize(model, group, config)
    except ValueError as error:
        return Seen(error=str(error))
    parallel = model.expert_parallel
    logits = _logits(model)
    return Seen(
        logits,
        parallel.group.placement.describe(group.rank()),
        held_bytes(model),
        parallel.counters.pairs_computed,
        parallel.counters.pairs_routed,
    )


def _config(**settings: Any) -> EPConfig:
    return EPConfig(warmup=False, **settings)


def _save(folder: Path, name: str, bits: int | None = None) -> str:
    quantization = AFFINE if bits else None
    folder = folder / f"{name}-{bits}"
    if not folder.exists():
        tiny.save_checkpoint(folder, CONFIGS[name], 0, quantization)
    return str(folder)


def _shared_width(folder: Path, ep_size: int, names: Iterable[str]) -> list[Case]:
    """Checkpoints in float32 and, where 3 quantization groups are a width, 4 bits."""
    config = (_config(ep_size=ep_size),)
    packed = [name for name in names if name in ("qwen3_moe", "gpt_oss")]
    folders = [_save(folder, name) for name in names]
    folders += [_save(folder, name, 4) for name in packed]
    return [Case(config, path) for path in folders]


def _check_shared_width(case: Case, ranks: list[Seen]) -> None:
    model, _ = load_model(Path(case.folder))
    expected = _logits(model)
    for seen in ranks:
        assert not seen.error
        np.testing.assert_array_equal(seen.logits, ranks[0].logits)
        np.testing.assert_allclose(
            seen.logits, expected, atol=3e-5, rtol=0, err_msg=case.folder
        )
        assert "width" in seen.experts
    # Every pair is computed by each rank of the group that has the expert.
    computed = sum(seen.computed for seen in ranks)
    ep_size = case.configs[0].ep_size
    assert ep_size is not None
    if "longcat" not in case.folder:  # identity experts are computed by nobody
        assert computed == ranks[0].routed * len(ranks) // ep_size


Ranks = dict[str, tuple[Case, list[Seen]]]


def _run_cases(num_ranks: int, cases: dict[str, Case]) -> Ranks:
    transport = "mpi" if num_ranks > 2 else "ring"
    ranks = run_ranks(
        num_ranks, _run, list(cases.values()), transport=transport, timeout=240
    )
    found = zip(cases.items(), zip(*ranks, strict=True), strict=True)
    return {name: (case, list(seen)) for (name, case), seen in found}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """All cases of two ranks, in one start of them."""
    folder = tmp_path_factory.mktemp("m")
    cases = {c.folder: c for c in _shared_width(folder, 1, CONFIGS)}
    qwen = _save(folder, "qwen3_moe")
    in_memory = tiny.make_model(CONFIGS["gpt_oss"])
    sizes = expert_sizes(in_memory)
    memory = tuple(
        (sizes.dense_bytes + n * sizes.expert_bytes) / 1e9 for n in (7.5, 3.5)
    )
    deepseek = tiny.save_checkpoint(folder / "deepseek", WIDE_DEEPSEEK)
    cases["tensor"] = Case((_config(ep_size=1, attention="tensor"),), str(deepseek))
    cases["in memory, width"] = Case((_config(ep_size=1),))
    cases["in memory, memory"] = Case((_config(memory=memory),))
    for bits in (None, 4):
        path = _save(folder / "dummy", "gpt_oss", bits)
        for file in Path(path).glob("*.safetensors"):
            file.unlink()
        cases[f"dummy {bits}"] = Case((_config(ep_size=1),), path, True)

    def file(name: str, *ranks: list[int | str]) -> EPConfig:
        content = {"format": "mlx_ep placement", "version": 1, "experts": 10}
        path = folder / name
        path.write_text(json.dumps({**content, "ranks": ranks}))
        return _config(placement_file=str(path))

    good = file("good.json", ["0-4", 9, 8], [5, "6-7"])
    same = file("same.json", [0, 1, 2, 3, 4, 9, 8], ["5-7"])
    other = file("other.json", ["0-3", 9, 8], [4, 5, "6-7"])
    cases["same file"] = Case((good, same), qwen)
    cases["other file"] = Case((good, other), qwen)
    cases["no file"] = Case((good, _config(placement_file="/nowhere/p.json")), qwen)
    cases["too little"] = Case((_config(memory=(0.001, 0.0006)),), qwen)
    cases["gathered"] = Case((_config(ep_size=1, strategy="gathered"),), qwen)
    cases["per slot"] = Case((_config(ep_size=1, reduction="per_slot"),), qwen)
    cases["three groups"] = Case((_config(ep_size=3),), qwen)
    return _run_cases(2, cases)


def test_two_ranks_share_the_width(two_ranks: Ranks) -> None:
    checked = 0
    for name, (case, ranks) in two_ranks.items():
        if name == case.folder:
            _check_shared_width(case, ranks)
            checked += 1
    assert checked == len(CONFIGS) + 2


def test_all_is_tensor_parallel(two_ranks: Ranks) -> None:
    """Shared width and a split dense part, whose shared experts join the one sum."""
    case, ranks = two_ranks["tensor"]
    _check_shared_width(case, ranks)
    whole = held_bytes(load_model(Path(case.folder))[0])
    assert all(seen.held < 0.8 * whole for seen in ranks)


def test_parallelize(two_ranks: Ranks) -> None:
    expected = _logits(tiny.make_model(CONFIGS["gpt_oss"]))
    for name in ("in memory, width", "in memory, memory"):
        for seen in two_ranks[name][1]:
            np.testing.assert_allclose(seen.logits, expected, atol=2e-5, rtol=0)
    assert [seen.experts for seen in two_ranks["in memory, memory"][1]] == [
        "experts 0..6 (7 of 10 per layer)",
        "experts 7..9 (3 of 10 per layer)",
    ]


@pytest.mark.parametrize("bits", [None, 4])
def test_dummy_weights_are_the_same_model(two_ranks: Ranks, bits: int | None) -> None:
    case, ranks = two_ranks[f"dummy {bits}"]
    whole = _run_one(mx.distributed.init(), Case((_config(),), case.folder, True))
    for seen in ranks:
        np.testing.assert_allclose(seen.logits, whole.logits, atol=2e-5, rtol=0)
        assert seen.held < whole.held


def test_placement_file(two_ranks: Ranks) -> None:
    # What is compared is what a file says, not how it is written.
    assert [seen.experts for seen in two_ranks["same file"][1]] == [
        "experts 0..4,9,8 (7 of 10 per layer)",
        "experts 5..7 (3 of 10 per layer)",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("other file", "rank 1 has another placement than rank 0"),
        ("no file", "rank 1: The placement file /nowhere/p.json"),
        ("too little", "must hold 10 experts of 0.000147 GB"),
        ("gathered", "only the sum of strategy replicated"),
        ("per slot", "reduction per_slot"),
        ("three groups", "one of 1, 2; got 3"),
    ],
)
def test_refused_on_all_ranks(two_ranks: Ranks, name: str, text: str) -> None:
    first, second = two_ranks[name][1]
    assert text in first.error
    assert first.error == second.error


@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "names"),
    [
        (4, 2, ["qwen3_moe"]),
        pytest.param(3, 1, ["qwen3_moe", "gpt_oss"], marks=pytest.mark.slow),
        pytest.param(4, 2, list(CONFIGS), marks=pytest.mark.slow),
        pytest.param(4, 1, ["phixtral"], marks=pytest.mark.slow),
    ],
)
def test_more_ranks(
    tmp_path: Path, num_ranks: int, ep_size: int, names: list[str]
) -> None:
    cases = {c.folder: c for c in _shared_width(tmp_path, ep_size, names)}
    folder = _save(tmp_path, "qwen3_moe")
    model, _ = load_model(Path(folder))
    sizes = expert_sizes(model)
    counts = (6, 0, 4, 0)[:num_ranks]
    memory = tuple(  # the model fits in no other way
        (sizes.dense_bytes + n * sizes.expert_bytes + 9) / 1e9 for n in counts
    )
    cases["memory"] = Case((_config(memory=memory),), folder)
    found = _run_cases(num_ranks, cases)
    _, ranks = found.pop("memory")
    for case, seen in found.values():
        _check_shared_width(case, seen)
    assert [seen.experts for seen in ranks] == [
        "experts 0..5 (6 of 10 per layer)",
        "experts none (0 of 10 per layer)",
        "experts 6..9 (4 of 10 per layer)",
        "experts none (0 of 10 per layer)",
    ][:num_ranks]
    for seen, limit in zip(ranks, memory, strict=True):
        assert seen.held <= limit * 1e9
        np.testing.assert_allclose(seen.logits, _logits(model), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_command_refuses_in_one_line() -> None:
    argv = [sys.executable, "-m", "mlx_ep.generate", "--max-tokens", "1"]
    for outcome in run_commands(2, [*argv, "--memory", "0.001,0.001"]):
        assert outcome.returncode == 2
        lines = [line for line in outcome.stderr.splitlines() if "error:" in line]
        assert len(lines) <= 1
        assert all("must hold 16 experts" in line for line in lines)
