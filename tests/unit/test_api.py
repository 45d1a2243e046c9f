"""The edge: configuration, memory, where models come from, what a model reports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_ep
from mlx_ep.api import install
from mlx_ep.config import EPConfig, settings
from mlx_ep.loading import MemoryNeed, find_model, memory_problems
from mlx_ep.metrics import RankReport
from mlx_ep.models import BlockState, find_moe_sites, routing_probe
from mlx_ep.models.routing_probe import IdentityProbe, StandInProbe
from mlx_ep.moe import ExpertGroup
from mlx_ep.rows import Mover
from mlx_ep.tune import ModelPolicy, tune
from tests.support import tiny


def test_unknown_config_fields_raise() -> None:
    assert EPConfig.from_dict({"reduction": "per_slot"}).reduction == "per_slot"
    with pytest.raises(ValueError, match="Unknown EPConfig fields: reductoin"):
        EPConfig.from_dict({"reductoin": "per_slot"})


def test_config_values_are_checked() -> None:
    """In a process without the checks of types that tests switch on."""
    program = """
from mlx_ep import EPConfig
fields = ("mode", "sums", "attention", "reduction", "shared_routing", "overlap")
for field in (*fields, "memory_limit_gb"):
    try:
        EPConfig(**{field: -1 if field == "memory_limit_gb" else "nonsense"})
    except ValueError as error:
        assert f"{field} must be" in str(error), error
    else:
        raise AssertionError(field)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_report_line() -> None:
    report = RankReport(
        rank=1,
        experts="experts 32..63 (32 of 64 per layer)",
        held_bytes=1_230_000_000,
        read_bytes=1_240_000_000,
        peak_resident_bytes=1_400_000_000,
        seconds=2.06,
    )
    assert str(report) == (
        "rank 1: experts 32..63 (32 of 64 per layer), 1.23 GB held, 1.24 GB read, "
        "peak 1.40 GB resident, 2.1 s"
    )


def test_ranks_on_one_host_share_its_memory() -> None:
    needs = [
        MemoryNeed("a", 6 * 10**9, 10 * 10**9),
        MemoryNeed("a", 5 * 10**9, 10 * 10**9),
        MemoryNeed("b", 9 * 10**9, 10 * 10**9),
    ]
    problems = memory_problems(needs, limit_is_per_rank=False)
    assert "2 ranks on this host need 11.00 GB, 10.00 GB are to be had" in problems[0]
    assert problems[1]
    assert problems[2] == ""
    assert memory_problems(needs, limit_is_per_rank=True) == ["", "", ""]


def test_unreachable_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="as a hub repository it could not be fetched"):
        find_model("no-such-owner/no-such-model")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="there is no folder"):
        find_model(str(tmp_path / "file"))


def test_config_json_itself_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path / "config.json")) == tmp_path


def test_a_dense_model_has_nothing_to_spread() -> None:
    plain, model = tiny.make_model(tiny.DENSE), tiny.make_model(tiny.DENSE)
    with pytest.warns(UserWarning, match="^--overlap and --runner: no effect on a den"):
        mlx_ep.parallelize(model, config=EPConfig(overlap="single", runner="gather"))
    tokens = mx.arange(9)[None]
    np.testing.assert_array_equal(np.array(model(tokens)), np.array(plain(tokens)))
    assert model.expert_parallel.blocks == []
    with pytest.raises(ValueError, match=r"dense.*a record of routing"):
        model.expert_parallel.recorder()


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"memory": (1.0,)}, "--memory"),
        ({"replica_memory": "1GB"}, "--replica-memory"),
        ({"placement_file": "none.json"}, "--placement"),
        ({"ep_size": 1}, "--ep"),
        ({"rebalance_every": 3}, "--rebalance-every"),
    ],
)
def test_experts_of_a_dense_model_are_not_placed(setting, flag) -> None:
    model = tiny.make_model(tiny.DENSE)
    with pytest.raises(ValueError, match=f"dense.*, and {flag} spreads"):
        mlx_ep.parallelize(model, config=EPConfig(**setting))


def test_parallelize_twice_is_refused() -> None:
    model = mlx_ep.parallelize(tiny.make_model(tiny.QWEN3_MOE))
    with pytest.raises(ValueError, match="expert-parallel already"):
        mlx_ep.parallelize(model)


def test_paths_names_and_classes_stay() -> None:
    plain, parallel = tiny.make_model(tiny.QWEN2_MOE), tiny.make_model(tiny.QWEN2_MOE)
    mlx_ep.parallelize(parallel)
    assert type(parallel) is type(plain)
    expected = dict(tree_flatten(plain.parameters()))
    found = dict(tree_flatten(parallel.parameters()))
    assert list(found) == list(expected)
    for name, parameter in expected.items():
        np.testing.assert_array_equal(np.array(found[name]), np.array(parameter))
    for old, new in zip(find_moe_sites(plain), find_moe_sites(parallel), strict=True):
        assert old.path == new.path
        assert isinstance(new.block, type(old.block))


@pytest.mark.parametrize(
    "config",
    [tiny.QWEN3_MOE, tiny.QWEN2_MOE, tiny.DEEPSEEK_V3, tiny.GPT_OSS, tiny.OLMOE],
    ids=lambda config: config["model_type"],
)
def test_a_block_runs_once_per_call(config: dict) -> None:
    model = mlx_ep.parallelize(tiny.make_model(config))
    calls: dict[str, int] = {}
    for block in model.expert_parallel.blocks:
        assert type(block.form.probe) is StandInProbe, block.form.why_not_routed
        assert block.form.probe.top_k == 3
        _count_calls(block, calls)
    mx.eval(model(mx.array([[5, 6, 7]])))
    assert calls == dict.fromkeys(calls, 1)
    assert len(calls) == len(model.expert_parallel.blocks)


def _count_calls(block: BlockState, calls: dict[str, int]) -> None:
    path, code = block.form.site.path, block.block_class.__call__

    def counted(self: object, *args: object) -> mx.array:
        calls[path] = calls.get(path, 0) + 1
        return code(self, *args)

    block.block_class = type("Counted", (block.block_class,), {"__call__": counted})


@pytest.mark.parametrize(
    ("config", "width", "has_shared"),
    [
        (tiny.QWEN3_MOE, None, False),
        (tiny.QWEN2_MOE, None, True),
        (tiny.DEEPSEEK_V3, None, True),
        (tiny.GPT_OSS, None, False),
        (tiny.OLMOE, 64, False),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_routing_is_found_by_structure(
    monkeypatch: pytest.MonkeyPatch, config: dict, width: int | None, has_shared: bool
) -> None:
    """Also where a block would not take a stand-in."""
    expected = tiny.make_model(config)(mx.array([[5, 6, 7]]))
    monkeypatch.setattr(routing_probe, "_takes_stand_in", lambda *_: False)
    model = mlx_ep.parallelize(tiny.make_model(config))
    for block in model.expert_parallel.blocks:
        assert type(block.form.probe) is IdentityProbe, block.form.why_not_routed
        assert block.form.probe.width == width
        assert block.form.probe.has_shared == has_shared
        assert block.form.probe.top_k == 3
    found = model(mx.array([[5, 6, 7]]))
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)


def test_nonlinear_block_falls_back_with_its_reason() -> None:
    model = tiny.make_model(tiny.LONGCAT)
    block_class = type(model.layers[0].mlp)
    squared_class = type("Squared", (block_class,), {"__call__": _squared(block_class)})
    for layer in model.layers:
        layer.mlp.__class__ = squared_class
    with pytest.warns(UserWarning, match="K outputs per token travel"):
        mlx_ep.parallelize(model)
    assert model.expert_parallel.per_slot_reasons == [
        "its output is not linear in what the experts return, and its output is not "
        "one sum over the experts"
    ]


def _squared(block_class: type) -> object:
    return lambda self, x: block_class.__call__(self, x).square()


def test_counters_count_and_reset() -> None:
    model = mlx_ep.parallelize(tiny.make_model(tiny.QWEN3_MOE))
    counters = model.expert_parallel.counters
    assert counters.layer_calls == 0  # checking the blocks does not count
    mx.eval(model(mx.array([[5, 6, 7]])))
    assert counters.layer_calls == 2
    assert counters.pairs_computed == counters.pairs_routed == 2 * 3 * 3
    counters.reset()
    assert counters.pairs_computed == 0


def test_every_public_name_is_there() -> None:
    for name in mlx_ep.__all__:
        assert getattr(mlx_ep, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mlx_ep.nonsense


def test_all_to_all_of_one_rank_is_the_identity() -> None:
    x = mx.arange(6).reshape(3, 2)
    assert mlx_ep.all_to_all(x).tolist() == x.tolist()


def test_what_moves_rows_is_given_when_the_group_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One group, one strategy of it, and a trial of the blocks before both."""
    mover, made = Mover(), []

    def tuned(*args: Any, **settings: Any) -> ModelPolicy:
        assert not made and settings["moves_rows"]
        return replace(tune(*args, **settings), mover=mover)

    from_config = ExpertGroup.from_config

    def make(*args: Any) -> ExpertGroup:
        made.append(from_config(*args))
        return made[-1]

    monkeypatch.setattr(install, "tune", tuned)
    monkeypatch.setattr(ExpertGroup, "from_config", make)
    config = EPConfig(strategy="all_to_all")
    model = mlx_ep.parallelize(tiny.make_model(tiny.QWEN3_MOE), config=config)
    assert len(made) == 1
    assert made[0].strategy.mover is mover
    blocks = model.expert_parallel.blocks
    assert all(block.group.strategy is made[0].strategy for block in blocks)


BAD_CONFIGURATIONS = {
    "strategy='foo'": "strategy must be one of replicated, gathered, all_to_all, "
    "local, auto, or an alias (disabled, none,",
    "strategy=3": "strategy must be a text; got 3",
    "strategy=['auto']": "strategy must be a text; got ['auto']",
    "mode='fast'": "mode must be one of auto, low_latency, normal; got 'fast'",
    "attention='data'": "attention must be one of replicated, tensor, auto; got 'data'",
    "low_latency_tokens=0": "low_latency_tokens must be 1 or more; got 0",
    "round_tokens=1.5": "round_tokens must be a whole number; got 1.5",
    "dispatch_dtype='fp8'": "dispatch_dtype must be one of model, bf16, int8, mxfp8; "
    "got 'fp8'",
    "sums='bfloat16'": "sums must be one of model, float32; got 'bfloat16'",
    "capacity='3'": "capacity must be a whole number or None; got '3'",
    "capacity=True": "capacity must be a whole number or None; got True",
    "reduction=None": "reduction must be one of partial_sum, per_slot; got None",
    "shared_routing=True": "shared_routing must be one of auto, always, never; got Tru",
    "lm_head=2": "lm_head must be one of auto, whole, split; got 2",
    "runner='gpu'": "runner must be one of auto, gather, blas, metal; got 'gpu'",
    "backend='gpu'": "backend must be one of auto, cpu, metal; got 'gpu'",
    "warmup='no'": "warmup must be True or False; got 'no'",
    "memory_limit_gb='64GB'": "memory_limit_gb must be a number or None; got '64GB'",
    "memory_limit_gb=float('nan')": "memory_limit_gb must be above 0 or None, not",
    "download='all'": "download must be one of ranges, full; got 'all'",
    "memory=64": "memory must be a tuple, each a number, or None; got 64",
    "memory=(64, '32')": "memory must be a tuple, each a number, or None; got (64, '3",
    "memory=[64, -1]": "memory must be numbers above 0; got (64, -1)",
    "replica_memory=24": "replica_memory must be a text; got 24",
    "placement_file=3": "placement_file must be a text or None; got 3",
    "overlap='x'": "overlap must be one of none, single, two, auto; got 'x'",
    "eval_layers=-1": "eval_layers must be 0 or more; got -1",
    "check_nan=1": "check_nan must be True or False; got 1",
    "rebalance_every=-1": "rebalance_every must be 0 or more; got -1",
    "rebalance_below='x'": "rebalance_below must be a number; got 'x'",
    "rebalance_below=1.5": "rebalance_below must be 0 to 1, not 1.5",
    "rebalance_below=float('nan')": "rebalance_below must be 0 to 1, not nan",
    "ep_size=0": "ep_size must be 1 or more; got 0",
    "context=-1": "context must be 0 or more; got -1",
    "pp=0": "pp must be 1 or more; got 0",
}


def test_every_field_is_checked_when_a_configuration_is_made() -> None:
    """In a process of its own: here a wrong type is refused by the tests' own hook."""
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom mlx_ep import EPConfig\n"
        "def said(text):\n"
        "    try:\n        return repr(eval(f'EPConfig({text})'))\n"
        "    except ValueError as error:\n        return str(error)\n"
        "print(json.dumps([said(text) for text in json.load(sys.stdin)]))"
    )
    right = ["memory=[64, 32.5]", "placement_file=Path('a.json')", "capacity=None"]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([*BAD_CONFIGURATIONS, *right]),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    expected = [*BAD_CONFIGURATIONS.values(), *["EPConfig("] * len(right)]
    for text, said, wanted in zip([*BAD_CONFIGURATIONS, *right], found, expected):
        assert said.startswith(wanted), (text, said)
    assert {text.partition("=")[0] for text in BAD_CONFIGURATIONS} == {
        setting.name for setting in settings()
    }
