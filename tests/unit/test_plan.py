"""What mlx_ep.plan says, against what is there when a model is loaded and has run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep.loading import Checkpoint, TensorReader, held_bytes, load_local
from mlx_ep.loading.caches import CacheQuantization, cache_bytes, cache_growth
from mlx_ep.loading.estimate import ModelOutline, RankNeed, Workload, rank_needs
from mlx_ep.loading.local import build_model
from mlx_ep.loading.working import working_memory
from mlx_ep.models.tensor_parallel import split_dense
from mlx_ep.placement import Placement, read_placement
from mlx_ep.plan import __main__ as command
from mlx_ep.plan import build
from mlx_ep.plan.speeds import Speed, predict, verdict
from mlx_ep.policy.profile import find_profile
from tests import tiny
from tests.hub_server import HubServer, Repository, use_cache
from tests.models.architectures import ARCHITECTURES
from tests.models.hub_layouts import HUB_LAYOUTS

AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}
WIDE = {**tiny.QWEN3_MOE, "moe_intermediate_size": 96}
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
        "float32": (WIDE, {}),
        "4 bit": (WIDE, {"quantization": AFFINE}),
        "per expert": (WIDE, {"layout": "per_expert", "shards": 2}),
        "4 bit, halves": (
            {**WIDE, "intermediate_size": 128},
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


# ---------------------------------------------------------------- the command


def _run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, str]:
    """The exit code of the command, and what it printed."""
    monkeypatch.setattr("sys.argv", ["mlx_ep.plan", *flags])
    monkeypatch.setattr(build, "calibrated_profile", lambda num_ranks: None)
    code = 0
    try:
        command.main()
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, text = _run(
        monkeypatch,
        capsys,
        *("--model", "jargon-moe", "--memory", "0.06,0.04,0.02", "--chip", "m3-ultra"),
        *("--json", str(tmp_path / "plan.json")),
        *("--write-placement", str(tmp_path / "placement.json")),
    )
    assert code == 0, text
    assert "16 experts per MoE layer, 7.64 MB of weights" in text
    assert "It fits. Run with: --memory 0.06,0.04,0.02 --context 4096" in text
    assert "Predicted, not measured" in text
    assert "compiled from published figures" in text
    assert "One Mac alone is the better choice: decode" in text
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["fits"] is True
    placement = read_placement(tmp_path / "placement.json", 16, 3)
    for rank, of_rank in enumerate(content["ranks"]):
        assert of_rank["experts"] == placement.describe(rank)
        assert of_rank["total_bytes"] <= of_rank["memory_bytes"]
    assert sum(rank["expert_bytes"] for rank in content["ranks"]) == 6291456
    assert [p["arm"] for p in content["predicted"]] == [
        "single", "tp", "ep-replicated", "ep-tensor",
    ]  # fmt: skip
    # 128 outputs of the embedded model's queries are not divided by 3.
    assert "cannot split this model over 3 ranks" in content["predicted"][1]["why_not"]


def test_command_says_what_would_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    json_file = tmp_path / "plan.json"
    flags = ("--model", "jargon-moe", "--json", str(json_file))

    def plan(*more: str) -> tuple[int, str]:
        return _run(monkeypatch, capsys, *flags, *more)

    code, text = plan("--memory", "0.0265,0.0265", "--context", "4096")
    assert code == 1
    assert "It does not fit." in text and "TOO MUCH" in text
    advice = "\n".join(json.loads(json_file.read_text())["advice"])
    # Every way that it names is a way.
    needed = max(r["total_bytes"] for r in json.loads(json_file.read_text())["ranks"])
    assert plan("--memory", ",".join([str(needed / 1e9)] * 2))[0] == 0
    ranks = int(advice.split(" in all")[0].split()[-1])
    assert plan("--memory", ",".join(["0.0265"] * ranks))[0] == 0
    assert plan("--memory", ",".join(["0.0265"] * (ranks - 1)))[0] == 1
    context = advice.split("A smaller context: ")[1].split()[0]
    assert plan("--memory", "0.0265,0.0265", "--context", context)[0] == 0
    assert "--attention tensor fits" in advice
    assert plan("--memory", "0.0265,0.0265", "--attention", "tensor")[0] == 0
    # What chooses by itself takes it.
    code, text = plan("--memory", "0.0265,0.0265", "--attention", "auto")
    assert code == 0
    assert "replicated does not fit the memory" in text


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ((), "Say how many Macs"),
        (("--ranks", "3", "--memory", "1,1"), "3 of them; got 2"),
        (("--ranks", "2", "--memory", "1,x"), "must be GB per rank"),
        (("--ranks", "2", "--ep", "3"), "one of 1, 2; got 3"),
        (("--ranks", "3", "--attention", "tensor"), "over 3 ranks"),
        (("--ranks", "2", "--chip", "m9"), "one of m1-ultra"),
        (("--ranks", "3", "--chip", "m4-max,m4-max"), "or one per rank"),
        (("--ranks", "2", "--chip", "m4-max", "--profile", "x"), "not both"),
        (("--ranks", "2", "--chip", "m4-max", "--link", "x"), "no link 'x'"),
        (("--ranks", "2", "--link", "ring"), "--link is of a profile"),
        (("--ranks", "2", "--placement", "/nowhere"), "cannot be read here"),
    ],
)
def test_wrong_usage_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    match: str,
) -> None:
    code, text = _run(monkeypatch, capsys, "--model", "jargon-moe", *flags)
    assert code == 2
    assert match in text
    assert text.count("\n") == 1


def test_shared_width_and_several_sequences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, four = tmp_path / "1.json", tmp_path / "4.json"
    for file, sequences in ((one, "1"), (four, "4")):
        code, text = _run(
            monkeypatch,
            capsys,
            *("--model", "jargon-moe", "--ranks", "4", "--ep", "2"),
            *("--sequences", sequences, "--json", str(file), "--chip", "m4-max"),
        )
        assert code == 0
        assert "Whether that fits: --memory" in text
        assert "Speeds: not predicted with --ep" in text
    few, many = (json.loads(file.read_text())["ranks"][0] for file in (one, four))
    assert many["cache_bytes"] == 4 * few["cache_bytes"]
    assert many["working_bytes"] == 4 * few["working_bytes"]
    assert many["weight_bytes"] == few["weight_bytes"]
    assert "width 0..31 of 64" in few["experts"]


def test_hub_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of the weight files, the headers are all that is fetched."""
    folder = tiny.save_checkpoint(tmp_path / "m", WIDE, quantization=AFFINE, shards=2)
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", "")  # undone at the end
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", "")
    use_cache(tmp_path / "cache")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    plans = []
    with HubServer({"me/m": Repository(folder)}) as hub:
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name in ("me/m", str(folder)):
            file = tmp_path / "plan.json"
            flags = ("--model", name, "--ranks", "3", "--json", str(file))
            assert _run(monkeypatch, capsys, *flags)[0] == 0
            plans.append(json.loads(file.read_text())["ranks"])
        sent = hub.bytes_of("")
    assert plans[0] == plans[1]
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert 0 < sent < weights / 5


# ---------------------------------------------------------------- speeds


def test_verdict() -> None:
    alone = Speed("single", 100.0, 20.0, fits=True)
    slow = Speed("ep-replicated", 90.0, 15.0, fits=True)
    fast = Speed("ep-replicated", 180.0, 25.0, fits=True)
    half = Speed("ep-replicated", 180.0, 15.0, fits=True)
    assert verdict([alone, slow]).startswith("One Mac alone is the better choice: ")
    assert "for decoding, several for prefill" in verdict([alone, half])
    assert verdict([alone, fast]).startswith("Several Macs are the better choice")
    too_large = Speed("single", 100.0, 20.0, fits=False)
    assert verdict([too_large, slow]) == "One Mac alone does not hold the model."
    # What cannot run is no choice.
    broken = Speed("tp", why_not="no shard()")
    assert verdict([alone, broken, slow]).startswith("One Mac alone is the better")


def test_predict_is_the_cost_model() -> None:
    from mlx_ep.loading import model_shape
    from mlx_ep.policy.cost import prefill_seconds, step_cost

    profile = find_profile("m3-ultra")
    shape = model_shape(tiny.QWEN3_MOE)
    speeds = predict([profile] * 2, shape, prompt=300, sequences=3)
    assert [speed.arm for speed in speeds] == [
        "single", "tp", "ep-replicated", "ep-tensor",
    ]  # fmt: skip
    for speed in speeds:
        seconds = prefill_seconds(profile, shape, speed.arm, prompt=300, num_ranks=2)
        assert speed.prefill == pytest.approx(300 / seconds)
        step = step_cost(
            profile,
            shape,
            speed.arm,
            tokens=3,
            phase="decode",
            context=300,
            num_ranks=2,
        )
        assert speed.decode == pytest.approx(step.tokens_per_second)
    assert [s.arm for s in predict([profile], shape, prompt=300)] == ["single"]
    # Alone it is the best Mac that holds the model, together the slowest counts.
    mixed = [find_profile(name) for name in ("m4-pro", "m3-ultra", "m4-max")]
    known = {p.name: predict([p], shape, prompt=300)[0].decode for p in mixed}
    any_of = predict(mixed, shape, prompt=300)
    assert any_of[0].chip == max(known, key=lambda name: known[name])
    assert any_of[0].fits is None
    only = predict(mixed, shape, prompt=300, fits_alone=[True, False, False])
    assert (only[0].chip, only[0].decode) == (mixed[0].name, known[mixed[0].name])
    none = predict(mixed, shape, prompt=300, fits_alone=[False] * 3)
    assert none[0].fits is False
    assert only[2].decode < predict(mixed[1:] * 2, shape, prompt=300)[2].decode


def test_missing_bytes() -> None:
    values: dict[str, Any] = {
        "rank": 0, "experts": "", "dense_bytes": 1, "expert_bytes": 2,
        "cache_bytes": 4, "working_bytes": 8,
    }  # fmt: skip
    assert RankNeed(**values).missing_bytes == 0
    assert RankNeed(**values, memory=16).missing_bytes == -1
    assert RankNeed(**values, memory=14).missing_bytes == 1
