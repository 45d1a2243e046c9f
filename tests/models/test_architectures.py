"""Every mlx-lm architecture with experts, on real ranks, against one process.

The fast tier runs a few of them on 2 ranks: those whose block differs most from the
ones in tests/ranks. `make test-slow` runs all on 1, 2 and 3 ranks.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mlx_ep
from tests.models import architectures
from tests.models.architectures import ARCHITECTURES, CANNOT, Measured, Saved
from tests.ranks import run_ranks

FAST = (
    "deepseek_v41",  # experts one level below the block
    "gemma4_text",  # router beside the experts; fused on the hub
    "kimi_k3",  # a norm after the sum; per expert on the hub
    "Klear",  # shared and routed experts mixed by a router of their own
    "llama4",  # gates applied to the experts' input; transposed on the hub
    "nemotron_h",  # experts of two layers
    "phixtral",  # the same, with biases
    "qwen3_5_moe",  # linear attention
    *CANNOT,
)
RUNS = [
    pytest.param((FAST, 2), id="few-2"),
    *(
        pytest.param(
            (tuple(ARCHITECTURES), num_ranks),
            id=f"all-{num_ranks}",
            marks=[pytest.mark.slow, pytest.mark.timeout(1500)],
        )
        for num_ranks in (1, 2, 3)
    ),
]

# Where K outputs per token travel, and what find_probe says of the block.
NOT_LINEAR = "not linear in what the experts return"
NO_IDENTITY = "does not run on an identity"
PER_SLOT = {
    "kimi_k3": NO_IDENTITY,  # a norm of the latent width follows the sum
    "nemotron_h_latent": NO_IDENTITY,  # a projection from the latent width
    "longcat_flash": NOT_LINEAR,  # identity experts
    "longcat_flash_ngram": NOT_LINEAR,
}

# Of the largest logit; float32 has 1.2e-7. What 2 ranks give is in docs/models.md.
TOLERANCE = 1e-5

on_ranks = pytest.mark.requires("ranks", "mpi")

Run = list[tuple[Saved, list[Measured]]]


@pytest.fixture(scope="module", params=RUNS)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Checkpoints, and what each rank measured of them."""
    names, num_ranks = request.param
    saved = architectures.save_all(
        tmp_path_factory.mktemp("models"), names, few=names == FAST
    )
    # Three ranks on two cores wait for each other much longer over the ring.
    transport = "mpi" if num_ranks > 2 else "ring"
    ranks = run_ranks(
        num_ranks, architectures.measure, saved, transport=transport, timeout=1000
    )
    return list(zip(saved, map(list, zip(*ranks, strict=True)), strict=True))


def _runnable(run: Run) -> Run:
    return [(one, ranks) for one, ranks in run if one.can_run]


@on_ranks
def test_logits_are_those_of_one_process(run: Run) -> None:
    problems = []
    for one, ranks in _runnable(run):
        limit = TOLERANCE * float(np.abs(one.expected).max())
        if one.name in PER_SLOT:
            limit = 0.0  # bit-identical
        errors = {rank.error for rank in ranks} - {""}
        worst = max(rank.difference for rank in ranks)
        if errors or worst > limit or len({rank.digest for rank in ranks}) > 1:
            problems.append(
                f"{one.name} {one.form}: {worst:.1e} > {limit:.1e} {errors}"
            )
    assert not problems, "\n".join(problems)


@on_ranks
def test_ranks_share_the_work(run: Run) -> None:
    """Every pair is computed on exactly one rank, and every rank computes some."""
    for one, ranks in _runnable(run):
        computed = [rank.computed for rank in ranks]
        assert sum(computed) == ranks[0].routed, one
        assert min(computed) > 0, one


@on_ranks
def test_a_rank_reads_what_it_holds(run: Run) -> None:
    """In every layout; these checkpoints have nothing that mlx-lm drops."""
    for one, ranks in _runnable(run):
        for rank in ranks:
            assert rank.read_bytes <= 1.02 * rank.held_bytes, one
        if len(ranks) > 1:
            whole = sum(f.stat().st_size for f in one.folder.glob("*.safetensors"))
            assert max(rank.read_bytes for rank in ranks) < 0.9 * whole, one


@on_ranks
def test_sums_travel_where_the_block_is_linear(run: Run) -> None:
    """Elsewhere K outputs per token do, with a warning that says why."""
    for one, ranks in _runnable(run):
        for rank in ranks:
            assert rank.warned == bool(rank.reasons), one
            if one.name in PER_SLOT:
                assert len(rank.reasons) == 1, one
                assert PER_SLOT[one.name] in rank.reasons[0], one
            else:
                assert not rank.reasons, one


@on_ranks
def test_what_cannot_run_says_why(run: Run) -> None:
    refused = {one.name for one, _ in run if not one.can_run}
    assert refused == set(CANNOT)
    for one, ranks in run:
        if not one.can_run:
            assert all(CANNOT[one.name] in rank.error for rank in ranks), ranks[0].error


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST[:3] else pytest.mark.slow)
        for name in ARCHITECTURES
        if name not in CANNOT
    ],
)
def test_every_expert_matters(name: str) -> None:
    """The prompt reaches all experts, and a wrong one could not hide in the rounding.

    Each expert in turn returns 0; a logit must change by 100 times the tolerance.
    """
    effects = architectures.effect_of_experts(ARCHITECTURES[name])
    assert len(effects) == 10
    assert min(effects) > 100 * TOLERANCE * 3, effects


@pytest.mark.filterwarnings("ignore:.*K outputs per token travel:UserWarning")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_identity_experts_are_found_with_any_weights(seed: int) -> None:
    config = ARCHITECTURES["longcat_flash"]
    expected = architectures.logits(architectures.make_model(config, seed))
    model = mlx_ep.parallelize(architectures.make_model(config, seed))
    np.testing.assert_array_equal(architectures.logits(model), expected)


def test_every_file_with_experts_has_an_architecture() -> None:
    files = {architectures.model_file(config) for config in ARCHITECTURES.values()}
    assert files == architectures.moe_files()


def test_the_table_has_a_row_for_every_file() -> None:
    table = Path(__file__).parents[2] / "docs" / "models.md"
    rows = [line.split("|") for line in table.read_text().splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) > 3]
    assert {row[1] for row in rows} >= {f"`{name}`" for name in ARCHITECTURES}
    assert {row[2] for row in rows} >= {f"`{n}.py`" for n in architectures.moe_files()}


DUMMY = ["qwen3_moe", "deepseek_v2", "deepseek_v3", "gemma4_text", "gpt_oss", "kimi_k3"]


@pytest.mark.filterwarnings("ignore:.*K outputs per token travel:UserWarning")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", DUMMY)
def test_dummy_weights(tmp_path: Path, name: str, bits: int | None) -> None:
    """Numbers that are finite and differ, with nothing but a config.json."""
    config = dict(ARCHITECTURES[name])
    if bits:
        config["quantization"] = {"group_size": 32, "bits": bits, "mode": "affine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = mlx_ep.load(str(tmp_path), dummy_weights=True)
    logits = architectures.logits(model)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01
