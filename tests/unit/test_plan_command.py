"""The command mlx_ep.plan, and the speeds that it predicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_ep.cost.profile import find_profile, write_profile
from mlx_ep.loading.estimate import RankNeed
from mlx_ep.placement import read_placement
from mlx_ep.plan.speeds import Speed, predict, verdict
from tests.support import tiny
from tests.support.architectures import AFFINE
from tests.support.hub_server import HubServer, Repository, use_cache
from tests.support.plan_command import run_plan


def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, text = run_plan(
        monkeypatch,
        capsys,
        *("--model", "jargon-moe", "--memory", "0.06,0.04,0.02", "--chip", "m3-ultra"),
        *("--json", str(tmp_path / "plan.json")),
        *("--write-placement", str(tmp_path / "placement.json")),
    )
    assert code == 0, text
    assert "16 experts per MoE layer, 7.64 MB of weights" in text
    assert "It fits. To run it:" in text
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
        return run_plan(monkeypatch, capsys, *flags, *more)

    code, text = plan("--memory", "0.0265,0.0265", "--context", "4096")
    assert code == 1
    assert "It does not fit." in text and "lacks 1.06 MB" in text
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
    code, text = run_plan(monkeypatch, capsys, "--model", "jargon-moe", *flags)
    assert code == 2
    assert match in text
    assert text.count("\n") == 1


def test_of_a_dense_model_it_says_what_runs_it(monkeypatch, capsys, tmp_path) -> None:
    model = tiny.save_checkpoint(tmp_path / "llama", tiny.LLAMA)
    flags = ("--model", str(model), "--ranks", "2")
    code, text = run_plan(monkeypatch, capsys, *flags)
    assert code == 2 and text.count("\n") == 1
    assert "dense), and mlx_ep.plan spreads or counts experts. mlx_ep.generate" in text


def test_shared_width_and_several_sequences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, four = tmp_path / "1.json", tmp_path / "4.json"
    for file, sequences in ((one, "1"), (four, "4")):
        code, text = run_plan(
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
    folder = tiny.save_checkpoint(
        tmp_path / "m", tiny.WIDE_QWEN3_MOE, quantization=AFFINE, shards=2
    )
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
            assert run_plan(monkeypatch, capsys, *flags)[0] == 0
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
    from mlx_ep.cost.step import prefill_seconds, step_cost
    from mlx_ep.loading import model_shape

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


def test_a_profile_that_cannot_be_right_is_warned_of(monkeypatch, capsys, tmp_path):
    file = tmp_path / "profile.json"
    write_profile(replace(find_profile("m3-ultra"), sync_seconds=3.0), file)
    flags = ("--model", "jargon-moe", "--ranks", "2", "--profile", str(file))
    code, text = run_plan(monkeypatch, capsys, *flags)
    assert code == 0, text
    assert "is implausible, measure it again" in " ".join(text.split())
    assert "sync_seconds = 3: must be from 1e-07 to 0.05" in " ".join(text.split())
