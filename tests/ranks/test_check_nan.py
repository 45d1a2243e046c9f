"""NaN on one rank ends all, with its rank and layer; prompt caches must be alike."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, save_prompt_cache

import mlx_ep
from mlx_ep.cli.prompt_cache import read_prompt_cache
from mlx_ep.comm import GroupComm
from tests.support import tiny
from tests.support.ranks import run_commands, run_ranks

pytestmark = pytest.mark.requires("ranks")

PROGRAM = """
import os, sys
import mlx_ep.api.prepared as prepared
from mlx_ep.generate.__main__ import main

install = prepared.install_experts

def with_nan(model, *rest):
    model = install(model, *rest)
    if os.environ.get("MLX_RANK") in ("1", None):
        switch = model.model.layers[2].mlp.switch_mlp
        switch.down_proj.weight = switch.down_proj.weight * float("nan")
    return model

prepared.install_experts = with_nan
sys.argv = ["mlx_ep.generate", "--prompt", "x", "--check-nan", "--no-warmup"]
main()
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_nan_on_one_rank_ends_all(num_ranks):
    outcomes = run_commands(num_ranks, [sys.executable, "-c", PROGRAM])
    reason = f"NaN on rank {num_ranks - 1}, layer 2: in what this rank's experts give"
    for outcome in outcomes:
        assert outcome.returncode == 2, outcome
        assert outcome.stderr.count(reason) == 1
        assert "Traceback" not in outcome.stderr


def load_twice(group, folders):
    """What loading says: NaN in an expert of the last rank, then in a norm."""
    said = []
    for folder in folders:
        with pytest.raises(ValueError) as error:
            mlx_ep.load(folder, group, mlx_ep.EPConfig(warmup=False))
        said.append(str(error.value))
    return said


def test_nan_in_weights_is_told_with_its_rank_and_layer(tmp_path):
    expert = "model.layers.1.mlp.switch_mlp.up_proj.weight"
    norm = "model.layers.2.input_layernorm.weight"
    for name, where in ((expert, -1), (norm, 0)):
        folder = tiny.save_checkpoint(tmp_path / name, tiny.QWEN3_MOE)
        file = str(folder / "model.safetensors")
        weights = dict(mx.load(file).items())
        mx.eval(weights)
        weights[name][where] = float("nan")
        mx.save_safetensors(file, weights)
    folders = [str(tmp_path / expert), str(tmp_path / norm)]
    said = run_ranks(2, load_twice, folders)
    assert said[0] == said[1]
    assert f"rank 1: Tensor {expert} of the checkpoint holds NaN" in said[0][0]
    assert said[0][1].startswith(f"Tensor {norm} of the checkpoint holds NaN")


def cache_file(folder: Path, name: str, change: int = -1, length: int = 5) -> None:
    layers = []
    for number in range(3):
        layer = KVCache()
        keys = mx.full((1, 2, length, 8), 1.0 + number)
        values = keys + (1e-6 if number == change else 0)
        layer.update_and_fetch(keys, values)
        layers.append(layer)
    metadata = {"model": "jargon-moe", "tokenizer_config": "{}"}
    save_prompt_cache(str(folder / name), layers, metadata)


CACHES = {
    "the same": ({}, ""),
    "a value": ({"change": 1}, "| layer 1 |"),
    "another length": ({"length": 6}, "| layer 2 |"),
}


def read_each(group, folder):
    answers = {}
    for case in CACHES:
        name = case if group.rank() else "the same"
        file = Path(folder) / f"{name}.safetensors"
        try:
            read_prompt_cache(file, None, None, 64, GroupComm(group))
            answers[case] = ""
        except ValueError as error:
            answers[case] = str(error)
    return answers


def test_prompt_caches_must_hold_the_same(tmp_path):
    for case, (change, _) in CACHES.items():
        cache_file(tmp_path, f"{case}.safetensors", **change)
    answers, others = run_ranks(2, read_each, str(tmp_path))
    assert answers == others
    for case, (_, text) in CACHES.items():
        assert (text in answers[case]) if text else answers[case] == "", answers[case]
        if text:
            assert answers[case].startswith("--prompt-cache-file must hold the same")
