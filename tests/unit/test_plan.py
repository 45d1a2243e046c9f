"""What mlx_ep.plan says, against what is there when a model is loaded and has run."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.loading import Checkpoint, TensorReader, held_bytes, load_local
from mlx_ep.loading.caches import CacheQuantization, cache_bytes, cache_growth
from mlx_ep.loading.estimate import ModelOutline, Workload, rank_needs
from mlx_ep.loading.local import build_model
from mlx_ep.loading.working import working_memory
from mlx_ep.models.tensor_parallel import split_dense
from mlx_ep.placement import Placement
from tests.support import tiny
from tests.support.architectures import AFFINE, ARCHITECTURES
from tests.support.hub_layouts import HUB_LAYOUTS

UNEVEN = Placement(((7, 2, 3, 0, 1), (), (9, 8, 4, 5, 6)))
SHARED = Placement.from_groups([7, 3], [(64, 32), (32, 64)])


def _save(folder: Path, name: str) -> Path:
    """A checkpoint: in float, packed, or as the hub has it."""
    if name == "hub gpt_oss":
        config = ARCHITECTURES["gpt_oss"]
        model = tiny.make_model(config)
        weights = HUB_LAYOUTS["gpt_oss"](
            dict(nn.utils.tree_flatten(model.parameters()))
        )
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        (folder / "config.json").write_text(json.dumps(config))
        return folder
    configs = {
        "float32": (tiny.WIDE_QWEN3_MOE, {}),
        "4 bit": (tiny.WIDE_QWEN3_MOE, {"quantization": AFFINE}),
        "per expert": (tiny.WIDE_QWEN3_MOE, {"layout": "per_expert", "shards": 2}),
        "4 bit, halves": (
            {**tiny.WIDE_QWEN3_MOE, "intermediate_size": 128},
            {"quantization": AFFINE},
        ),
        "MLA": (ARCHITECTURES["deepseek_v3"], {}),
        "linear attention": (ARCHITECTURES["qwen3_next"], {"quantization": AFFINE}),
    }
    config, options = configs[name]
    return tiny.save_checkpoint(folder, config, **options)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "name",
    [
        "4 bit",
        "MLA",
        "hub gpt_oss",
        pytest.param("float32", marks=pytest.mark.slow),
        pytest.param("per expert", marks=pytest.mark.slow),
        pytest.param("linear attention", marks=pytest.mark.slow),
    ],
)
def test_weights_are_what_a_rank_holds(tmp_path: Path, name: str) -> None:
    folder = _save(tmp_path, name)
    model, checkpoint = ModelOutline.open(folder), Checkpoint.open(folder)
    is_wide = name in ("float32", "4 bit", "per expert")
    for placement in [UNEVEN] + ([SHARED] if is_wide else []):
        needs = rank_needs(model, placement, Workload(context=8))
        for rank, need in enumerate(needs):
            with TensorReader() as reader:
                loaded = load_local(checkpoint, placement, rank, reader)
            assert need.weight_bytes == held_bytes(loaded)
            assert bool(need.expert_bytes) == bool(placement.rank_experts[rank])


@pytest.mark.parametrize("name", ["4 bit, halves", "MLA", "hub gpt_oss"])
def test_weights_of_a_split_dense_part(tmp_path: Path, name: str) -> None:
    folder = _save(tmp_path, name)
    model, checkpoint = ModelOutline.open(folder), Checkpoint.open(folder)
    placement = Placement.contiguous(10, 2)
    workload = Workload(context=8, attention="tensor")
    whole = rank_needs(model, placement, Workload(context=8))
    for rank, need in enumerate(rank_needs(model, placement, workload)):
        with TensorReader() as reader:
            loaded = load_local(
                checkpoint,
                placement,
                rank,
                reader,
                lambda made, rank=rank: split_dense(made, 2, rank),
            )
        assert need.weight_bytes == held_bytes(loaded)
        assert need.dense_bytes < whole[rank].dense_bytes
        assert need.expert_bytes == whole[rank].expert_bytes


def test_config_alone(tmp_path: Path) -> None:
    """Without weight files: the shapes of the model that config.json makes."""
    folder = tiny.save_checkpoint(tmp_path, tiny.QWEN3_MOE, quantization=AFFINE)
    placement, workload = Placement.contiguous(10, 3), Workload(context=8)
    exact = rank_needs(ModelOutline.open(folder), placement, workload)
    for file in folder.glob("model*"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    for key, dtype in (("torch_dtype", "float32"), ("dtype", "torch.bfloat16")):
        (folder / "config.json").write_text(json.dumps({**config, key: dtype}))
        found = ModelOutline.open(folder)
        assert (
            f"alone, what is not quantized as {dtype[-8:].strip('.')}" in found.source
        )
        needs = rank_needs(found, placement, workload)
        pairs = zip(needs, exact, strict=True)
        if dtype == "float32":
            assert all(a.weight_bytes == b.weight_bytes for a, b in pairs)
        else:
            assert all(a.weight_bytes < b.weight_bytes for a, b in pairs)


# ---------------------------------------------------------------- caches

# Windows that rotate, latents, states, chunks, and caches of a kind of its own.
FEW = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "llama4", "deepseek_v41")
MANY = sorted(set(ARCHITECTURES) - {"muse_spark", *FEW})  # which needs Metal


def _prefilled(
    name: str, num_tokens: int, quantization: CacheQuantization, step: int
) -> int:
    """Bytes of the caches after mlx-lm's own prefill."""
    model = tiny.make_model(ARCHITECTURES[name])
    caches = make_prompt_cache(model)
    prompt = mx.arange(num_tokens) % 290 + 2
    steps = generate_step(
        prompt,
        model,
        max_tokens=0,
        prompt_cache=caches,
        prefill_step_size=step,
        kv_bits=quantization.kv_bits,
        kv_group_size=quantization.kv_group_size,
        quantized_kv_start=quantization.quantized_kv_start,
    )
    for _ in steps:
        pass
    return sum(cache.nbytes for cache in caches)


def _check_caches(name: str, num_tokens: int, **settings: int) -> None:
    quantization = CacheQuantization(**settings)
    model = build_model(ARCHITECTURES[name])
    found = cache_bytes(model, num_tokens, quantization, step=32)
    assert found == _prefilled(name, num_tokens, quantization, 32)


@pytest.mark.parametrize("name", FEW)
def test_caches_are_those_of_a_prefill(name: str) -> None:
    _check_caches(name, 135)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 37, 71, 300])
@pytest.mark.parametrize("name", [*FEW, *MANY])
def test_caches_of_every_architecture(name: str, num_tokens: int) -> None:
    _check_caches(name, num_tokens)


@pytest.mark.parametrize("start", [0, 100])
def test_quantized_caches(start: int) -> None:
    config = {**ARCHITECTURES["qwen3_moe"], "head_dim": 64}
    ARCHITECTURES["wide heads"] = config
    try:
        _check_caches(
            "wide heads", 71, kv_bits=4, kv_group_size=64, quantized_kv_start=start
        )
        _check_caches(
            "wide heads", 300, kv_bits=8, kv_group_size=32, quantized_kv_start=start
        )
    finally:
        del ARCHITECTURES["wide heads"]
    with pytest.raises(ValueError, match="cannot be quantized with --kv-bits 8"):
        cache_bytes(
            build_model(ARCHITECTURES["gpt_oss"]), 300, CacheQuantization(8, 32)
        )


def test_cache_growth() -> None:
    model = build_model(ARCHITECTURES["qwen3_moe"])
    # 3 layers, keys and values, 2 heads of 16 numbers in float32.
    assert cache_growth(model, 5000) == 3 * 2 * 2 * 16 * 4
    # Of the two layers, the one with the window does not grow.
    model = build_model(ARCHITECTURES["gpt_oss"])
    assert cache_growth(model, 5000) == 1 * 2 * 2 * 16 * 4


def test_working_memory_formula() -> None:
    working = working_memory(build_model(tiny.QWEN3_MOE), 100)
    # H = D = 64; the widest dense output is the first layer's 96; K = 3, F = 32.
    assert working.fixed == 100 * ((4 * 64 + 2 * 96) * 4 + 4 * 64)
    assert working.all_experts == 100 * 3 * (2 * 64 + 3 * 32) * 4
    assert working.of(5, 10) == working.fixed + working.all_experts // 2


@pytest.mark.parametrize(
    ("width", "expert_width", "num_experts", "top_k", "num_tokens"),
    [
        (512, 256, 16, 4, 512),
        pytest.param(512, 512, 8, 2, 1024, marks=pytest.mark.slow),
    ],
)
def test_working_memory_is_about_what_a_step_needs(
    width: int, expert_width: int, num_experts: int, top_k: int, num_tokens: int
) -> None:
    config = {
        **tiny.QWEN3_MOE,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": expert_width,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "head_dim": 64,
    }
    model = tiny.make_model(config)
    caches = make_prompt_cache(model)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model(mx.arange(num_tokens)[None] % 290, cache=caches)
    mx.eval([cache.state for cache in caches])
    measured = mx.get_peak_memory() - before - sum(c.nbytes for c in caches)
    if not mx.metal.is_available():  # whose kernel does not write the scores down
        measured -= config["num_attention_heads"] * num_tokens**2 * 4
    estimate = working_memory(build_model(config), num_tokens)
    assert 0.7 < measured / estimate.of(num_experts, num_experts) < 1.4
