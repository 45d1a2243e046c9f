"""Every mlx-lm architecture with experts, on real ranks, against one process.

The fast tier runs a few of them on 2 ranks: those whose block differs most from the
ones in tests/ranks. `make test-slow` runs all on 1, 2 and 3 ranks, and all once more in
the tier below the one that they have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest

import mlx_ep
from mlx_ep.config import EPConfig
from mlx_ep.models import find_moe_sites, stack_experts, why_not_here
from tests.support import architectures, tiny
from tests.support.architectures import ARCHITECTURES, Job, Measured, Saved
from tests.support.metal_stand_in import STAND_INS, metal_stand_in
from tests.support.ranks import run_ranks

FAST = (
    "dbrx",  # a list of experts
    "deepseek_v41",  # experts one level below the block
    "gemma4_text",  # router beside the experts; fused on the hub
    "kimi_k3",  # a norm after the sum; per expert on the hub
    "Klear",  # shared and routed experts mixed by a router of their own
    "laguna",  # its router's bias is among the experts
    "llama4",  # gates applied to the experts' input; transposed on the hub
    "longcat_flash",  # identity experts
    "muse_spark",  # a norm of each expert's output
    "nemotron_h_latent",  # experts of two layers, in a latent width
    "phixtral",  # the same, with biases
    "qwen3_5_moe",  # linear attention
)
# Models that are not in the tier `routed`, and what find_probe says of their blocks.
# muse_spark: a norm of each expert's output stands before their sum.
PARTIAL_SUM = {"muse_spark": "does not run on an identity"}

# Blocks whose sum over the ranks is in another place, for running them in that tier.
BELOW_FAST = (
    "deepseek_v41",  # in the module around the block
    "kimi_k3",  # before a norm, together with the shared experts
    "Klear",  # behind the block, with gated shared experts
    "longcat_flash",  # before the identity experts
)
# The least common blocks, for strategies in which ranks have tokens of their own.
SHARDED = ("kimi_k3", "longcat_flash", "muse_spark", "nemotron_h_latent")

# Of the largest logit; float32 has 1.2e-7. What 2 ranks give is in docs/models.md.
TOLERANCE = 1e-5

on_ranks = pytest.mark.requires("ranks", "mpi")

Results = list[tuple[Saved, list[Measured]]]


@dataclass(frozen=True)
class Run:
    """Checkpoints, and what each rank measured of them.

    Attributes:
        best: in the best tier that their blocks have.
        below: one form of each, in the tier `partial-sum`.
        sharded: one form of each, by strategy.
    """

    best: Results
    below: Results
    sharded: dict[str, Results]


SLOW = [pytest.mark.slow, pytest.mark.timeout(1500)]
EVERY = tuple(ARCHITECTURES)
# Architectures, ranks, those to run in the tier below, strategies.
RUNS = [
    pytest.param((FAST, 2, BELOW_FAST, ["all_to_all"]), id="few-2"),
    pytest.param((EVERY, 1, EVERY, ["gathered"]), id="all-1", marks=SLOW),
    pytest.param((EVERY, 2, EVERY, ["gathered", "all_to_all"]), id="all-2", marks=SLOW),
    pytest.param((EVERY, 3, EVERY, ["gathered", "all_to_all"]), id="all-3", marks=SLOW),
]


@pytest.fixture(scope="module", params=RUNS)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    names, num_ranks, below, strategies = request.param
    saved = architectures.save_all(
        tmp_path_factory.mktemp("models"),
        names,
        architectures.few_forms if names == FAST else architectures.forms,
    )
    last = {one.name: one for one in saved}  # one form of each
    jobs = [Job(saved), Job([last[name] for name in below], tier="partial-sum")]
    for strategy in strategies:
        config = EPConfig(strategy=strategy)
        jobs.append(Job([last[name] for name in SHARDED], config=config))
    # Three ranks on two cores wait for each other much longer over the ring.
    transport = "mpi" if num_ranks > 2 else "ring"
    ranks = run_ranks(
        num_ranks, architectures.measure, jobs, transport=transport, timeout=1400
    )
    best, partial, *sharded = (
        list(zip(job.saved, map(list, zip(*measured, strict=True)), strict=True))
        for job, measured in zip(jobs, zip(*ranks, strict=True), strict=True)
    )
    return Run(best, partial, dict(zip(strategies, sharded, strict=True)))


@on_ranks
def test_logits_are_those_of_one_process(run: Run) -> None:
    problems = []
    for one, ranks in run.best:
        limit = TOLERANCE * float(np.abs(one.expected).max())
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
    for one, ranks in run.best:
        computed = [rank.computed for rank in ranks]
        if "longcat" in one.name:  # identity experts are computed nowhere
            assert 0.5 < sum(computed) / ranks[0].routed < 1, one
        else:
            assert sum(computed) == ranks[0].routed, one
        assert min(computed) > 0, one


@on_ranks
def test_one_collective_per_layer(run: Run) -> None:
    for one, ranks in run.best:
        for rank in ranks:
            assert rank.collectives == rank.layer_calls > 0, one


@on_ranks
def test_a_rank_reads_what_it_holds(run: Run) -> None:
    """In every layout; these checkpoints have nothing that mlx-lm drops."""
    for one, ranks in run.best:
        for rank in ranks:
            assert rank.read_bytes <= 1.02 * rank.held_bytes, one
        if len(ranks) > 1:
            whole = sum(f.stat().st_size for f in one.folder.glob("*.safetensors"))
            assert max(rank.read_bytes for rank in ranks) < 0.9 * whole, one


@on_ranks
def test_blocks_have_the_best_tier(run: Run) -> None:
    for one, ranks in run.best:
        for rank in ranks:
            assert not rank.warned, one
            if one.name in PARTIAL_SUM:
                assert rank.tiers == ["partial-sum"], one
                assert len(rank.reasons) == 1, one
                assert PARTIAL_SUM[one.name] in rank.reasons[0], one
            else:
                assert rank.tiers == ["routed"], (one, rank.reasons)


@on_ranks
def test_partial_sums(run: Run) -> None:
    """Every block in the tier below: its code unchanged, one sum over the ranks."""
    for one, ranks in run.below:
        limit = TOLERANCE * float(np.abs(one.expected).max())
        for rank in ranks:
            assert not rank.error, one
            assert rank.tiers == ["partial-sum"], (one, rank.reasons)
            assert rank.difference <= limit, one
            assert rank.collectives == rank.layer_calls > 0, one
            assert rank.in_block == (not _adds_behind_the_block(one.name)), one
        # A pair is computed once; identity experts of longcat count as expert 0 here.
        assert sum(rank.computed for rank in ranks) == ranks[0].routed, one
        assert len({rank.digest for rank in ranks}) == 1, one


@on_ranks
def test_sharded_strategies(run: Run) -> None:
    """Ranks with tokens of their own, here the same ones, on the least common blocks.

    A block that is not `routed` exchanges K outputs per token, and says so.
    """
    for strategy, results in run.sharded.items():
        for one, ranks in results:
            limit = TOLERANCE * float(np.abs(one.expected).max())
            tier = "per-slot" if one.name in PARTIAL_SUM else "routed"
            for rank in ranks:
                assert not rank.error, (strategy, one)
                assert rank.difference <= limit, (strategy, one)
                assert rank.tiers == [tier], (strategy, one, rank.reasons)
                assert rank.warned == (tier == "per-slot"), (strategy, one)


def _adds_behind_the_block(name: str) -> bool:
    """Whether mlx-lm's code of a block has no sum over ranks."""
    with metal_stand_in():
        model = stack_experts(tiny.make_model(ARCHITECTURES[name]))
        site = find_moe_sites(model)[0]
    return not hasattr(site.summing, "sharding_group")


@pytest.mark.skipif(not STAND_INS, reason="it runs on Metal")
def test_what_needs_metal_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Before a weight is read: there is none in this folder."""
    config = ARCHITECTURES["muse_spark"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    needs = r"mlx_lm\.models\.muse_spark runs on Metal only: mlx-lm has expert_routing"
    with pytest.raises(ValueError, match=needs):
        mlx_ep.load(str(tmp_path))
    with pytest.raises(ValueError, match=needs):
        mlx_ep.parallelize(tiny.make_model(config))
    own = type("Own", (nn.Module,), {"__module__": "a_file_of_the_model"})
    assert why_not_here(own) == ""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST[:3] else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_every_expert_matters(name: str) -> None:
    """The prompt reaches all experts, and a wrong one could not hide in the rounding.

    Each expert in turn returns 0; a logit must change by 100 times the tolerance.
    """
    with metal_stand_in():
        effects = architectures.effect_of_experts(ARCHITECTURES[name])
    assert len(effects) == 10
    assert min(effects) > 100 * TOLERANCE * 3, effects


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_identity_experts_are_found_with_any_weights(seed: int) -> None:
    config = ARCHITECTURES["longcat_flash"]
    expected = architectures.logits(architectures.make_model(config, seed))
    model = mlx_ep.parallelize(architectures.make_model(config, seed))
    assert {block.form.tier for block in model.expert_parallel.blocks} == {"routed"}
    found = architectures.logits(model)
    limit = TOLERANCE * float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


def test_every_file_with_experts_has_an_architecture() -> None:
    files = {architectures.model_file(config) for config in ARCHITECTURES.values()}
    assert files == architectures.moe_files()


def test_the_table_has_a_row_for_every_file() -> None:
    table = Path(__file__).parents[2] / "docs" / "models.md"
    rows = [line.split("|") for line in table.read_text().splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) > 3]
    assert {row[1] for row in rows} >= {f"`{name}`" for name in ARCHITECTURES}
    assert {row[2] for row in rows} >= {f"`{n}.py`" for n in architectures.moe_files()}


DUMMY = [
    "dbrx",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gemma4_text",
    "gpt_oss",
    "kimi_k3",
]


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
