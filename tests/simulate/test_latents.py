"""Models with latents (MLA): what a device holds, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_ep.loading import model_shape
from mlx_ep.simulate.model import read_model
from tests.support import tiny
from tests.support.simulate.data import (
    cluster,
    instance,
    make_folder,
    trace_lines,
    write_trace,
)
from tests.support.simulate.running import make_engine, run_command


@pytest.mark.parametrize("q_rank", [32, None])
def test_sizes_are_those_of_the_model(tmp_path: Path, q_rank: int | None) -> None:
    """Matrices and caches of mlx-lm's own model, without norms."""
    config = {**tiny.DEEPSEEK_V3, "q_lora_rank": q_rank}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = read_model("mla", tmp_path / "config.json")
    shape = model_shape(config, dtype="bfloat16")
    assert sizes.latents is not None and sizes.latents.q_rank == (q_rank or 0)
    each = sizes.latents.weights(sizes.width, sizes.num_heads)
    assert sizes.num_layers * each == shape.attention.weights
    assert sizes.kv_token_bytes(2) == shape.kv_bytes == 3 * (32 + 16) * 2
    embedding = sizes.vocabulary * sizes.width
    matrices = sizes.dense_weights - embedding + sizes.expert_weights
    matrices += sizes.gate_weights
    biases = sizes.num_moe_layers * sizes.num_experts  # of the routers
    assert 2 * (matrices + biases) == shape.num_bytes
    assert replace(sizes, latents=None).kv_split(4) == 4 and sizes.kv_split(4) == 1


def _folder(tmp_path: Path, **changes: object) -> Path:
    one = instance(model_name="tiny/mla", **changes)
    make_folder(tmp_path, c=cluster(one))
    file = tmp_path / "models" / "tiny" / "mla.json"
    file.write_text(json.dumps(tiny.DEEPSEEK_V3))
    return write_trace(tmp_path / "t.jsonl", trace_lines(4))


def test_latents_are_whole_on_every_device(tmp_path: Path) -> None:
    """Served with a profile, with either scheduler; two devices keep no more tokens
    than their smaller weights leave room for.
    """
    trace = _folder(tmp_path, hardware="m3-ultra", tp_size=2)
    for scheduler in ("vllm", "mlx_ep"):
        engine = make_engine(tmp_path / "c.json", trace, "--scheduler", scheduler)
        engine.run()
        assert all(request.end > 0 for request in engine.requests)
        pool = engine.cluster.instances[0].pool
        assert pool.block_bytes == 16 * 3 * (32 + 16) * 2


def test_a_bundle_has_no_kernels_for_them(tmp_path: Path) -> None:
    trace = _folder(tmp_path)
    perf = tmp_path / "perf" / "TINY" / "tiny"
    (perf / "mla").symlink_to(perf / "moe")
    outcome = run_command(["--cluster-config", tmp_path / "c.json", "--dataset", trace])
    assert outcome.code == 2
    assert "tiny/mla has latents. Use a profile." in outcome.err
