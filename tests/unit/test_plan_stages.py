"""``mlx_ep.plan --pp``: stages as `mlx_ep.generate --pp` makes them, and their cost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlx_ep import EPConfig
from mlx_ep.cost.profile import find_profile
from mlx_ep.cost.stages import StageSize, pipeline_cost
from mlx_ep.cost.step import step_cost
from mlx_ep.loading import checkpoint_weights, find_model, model_shape, read_config
from tests.support import tiny
from tests.support.plan_command import run_plan

MODEL = ("--model", "jargon-moe")


@pytest.mark.parametrize(
    ("memory", "pp"),
    [
        ((0.03, 0.03), 2),
        ((0.004, 1.0), 2),
        ((1.0, 1.0, 0.025, 1.0), 2),
        ((0.03,) * 4, 4),
    ],
)
def test_a_plan_is_what_generate_loads(monkeypatch, capsys, tmp_path, memory, pp):
    """The same layers for every rank, uneven ones too, and the same bytes."""
    file = tmp_path / "plan.json"
    given = ",".join(map(str, memory))
    flags = (*MODEL, "--pp", str(pp), "--memory", given, "--json", str(file))
    _, text = run_plan(monkeypatch, capsys, *flags, "--context", "64")
    content = json.loads(file.read_text())
    config = EPConfig(pp=pp, memory=memory)
    path, members = find_model("jargon-moe"), len(memory) // pp
    for rank, need in enumerate(content["ranks"]):
        weights = checkpoint_weights(path, rank, len(memory), config)
        held, stage = weights.placement.stage, content["stages"][rank // members]
        assert stage["layers"] == [held.start, held.stop] and rank in stage["ranks"]
        assert need["experts"] == weights.placement.describe(rank % members)
        assert need["weight_bytes"] == weights.rank_bytes
        assert f"{held.start}..{held.stop - 1} of 4" in text
    # Each layer's KV cache is on the ranks of one stage.
    whole = json_of(monkeypatch, capsys, file, "--ranks", "1")["ranks"][0]
    caches = [need["cache_bytes"] for need in content["ranks"][::members]]
    assert sum(caches) == whole["cache_bytes"] and min(caches) > 0


def json_of(monkeypatch, capsys, file, *flags):
    flags = (*MODEL, "--context", "64", "--json", str(file), *flags)
    code, text = run_plan(monkeypatch, capsys, *flags)
    assert code == 0, text
    return json.loads(file.read_text())


def test_the_command_to_copy_and_the_table(monkeypatch, capsys, tmp_path):
    flags = (*MODEL, "--ranks", "4", "--pp", "2", "--chip", "m4-max")
    code, text = run_plan(monkeypatch, capsys, *flags)
    assert code == 0
    assert "--ranks 4 --pp 2 --attention replicated" in " ".join(
        text.replace("\\", "").split()
    )
    lines = [line.split() for line in text.splitlines()]
    (first,) = [line for line in lines if line[:4] == ["0", "0", "1", "0..1"]]
    assert first[4] == "2" and float(first[-2]) > 0
    assert "stages of layers, --pp" in text and "From stage to stage" in text
    # Without a profile there are no times.
    code, text = run_plan(monkeypatch, capsys, *flags[:-2])
    assert code == 0 and "ms a token" not in text
    # Weights have room, the cache of so many tokens has not.
    code, text = run_plan(
        monkeypatch, capsys, *MODEL, "--pp", "2", "--memory", "0.02,0.02",
        "--context", "100000",
    )  # fmt: skip
    assert code == 1 and "rank 0 needs" in text


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--ranks", "3", "--pp", "2"), "must divide the 3 ranks"),
        (("--ranks", "8", "--pp", "8"), "at least one layer for each stage"),
        (("--memory", "0.002,0.002", "--pp", "2"), "leaves no room"),
        (("--memory", "0.000001,1", "--pp", "2"), "the embedding and the head take"),
        (("--ranks", "2", "--pp", "2", "--attention", "tensor"), "--attention tensor"),
        (("--ranks", "4", "--pp", "2", "--ep", "2"), "does not go with --ep"),
        (("--ranks", "2", "--pp", "2", "--sequences", "2"), "runs one sequence"),
        (("--ranks", "2", "--pp", "2", "--kv-bits", "8"), "--kv-bits"),
        (("--ranks", "2", "--pp", "2", "--write-placement", "x"), "--write-placement"),
        (("--ranks", "2", "--pp", "0"), "--pp"),
    ],
)
def test_what_cannot_be_is_one_line(monkeypatch, capsys, flags, match):
    code, text = run_plan(monkeypatch, capsys, *MODEL, *flags)
    assert code == 2 and match in text and text.count("\n") == 1


@pytest.fixture(scope="module")
def shape():
    return model_shape(read_config(find_model("jargon-moe")))


def test_stages_share_out_the_seconds_of_a_step(shape):
    """Stages of one rank have together what one rank alone takes, and cost a start."""
    profile = find_profile("m4-max")
    sizes = [StageSize(1, 1), StageSize(3, 3)]
    cost = pipeline_cost([profile] * 2, shape, sizes, prompt=100)
    alone = step_cost(profile, shape, "single", tokens=1, phase="decode", context=100)
    assert sum(cost.decode) == pytest.approx(
        alone.seconds - alone.head + profile.step_seconds
    )
    assert cost.decode[1] > cost.decode[0]
    assert cost.token > sum(cost.decode) + cost.hop
    # In one chunk a stage waits for the one before.
    assert cost.prompt > sum(cost.prefill)


def test_chunks_keep_stages_busy(shape):
    """Even stages: C chunks take about C + S - 1 times a stage's chunk, not C S."""
    profile = replace(find_profile("m4-max"), step_seconds=0.0)
    sizes = [StageSize(2, 2)] * 2
    cost = pipeline_cost([profile] * 2, shape, sizes, prompt=64 * 32, step_tokens=64)
    assert max(cost.prefill) < cost.prompt < 0.6 * sum(cost.prefill)


def test_dense_layers_are_those_without_experts():
    """A stage of dense layers takes no time for experts."""
    shape = model_shape(tiny.DEEPSEEK_V3 | {"num_hidden_layers": 4})
    dense = shape.num_layers - shape.num_moe_layers
    assert dense
    profile = find_profile("m4-max")
    sizes = [StageSize(dense, 0), StageSize(shape.num_moe_layers, shape.num_moe_layers)]
    cost = pipeline_cost([profile] * 2, shape, sizes, prompt=8)
    slow = replace(profile, sync_seconds=1.0)
    assert pipeline_cost([slow] * 2, shape, sizes, prompt=8).decode[0] == cost.decode[0]
    assert min(cost.decode) > 0
