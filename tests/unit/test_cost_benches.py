"""The two scripts that hold the cost model against measured and published figures."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import bench_cost_model
from benchmarks.published_figures import figures
from mlx_ep.cost.profile import overridden, write_profile
from tests.support.round_numbers import LAYER, MODEL, PROFILE

LAYER_RECORD = {
    "level": "layer",
    "arm": "tp",
    "runner": "gather",
    "shape": LAYER.to_json(),
    "ranks": 2,
    "tokens": 16,
    "phase": "layer",
}
MODEL_RECORD = {
    "level": "e2e",
    "arm": "ep-replicated",
    "runner": "auto",
    "shape": MODEL.to_json(),
    "ranks": 2,
    "batch": 4,
    "context": 9,
}
RECORDS = [
    LAYER_RECORD,
    {**LAYER_RECORD, "arm": "ep-all-to-all", "tokens": 64},
    {**MODEL_RECORD, "phase": "prefill", "tokens": 4 * 10},
    {**MODEL_RECORD, "phase": "decode", "tokens": 4},
]


def _run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["bench_cost_model", *map(str, argv)])
    code = bench_cost_model.main()
    return code, capsys.readouterr().out


@pytest.mark.parametrize("factor, code", [(1.0, 0), (1.1, 0), (1.3, 1)])
def test_error_is_that_of_the_points(tmp_path, monkeypatch, capsys, factor, code):
    """Measured times that are the predicted ones divided by a factor."""
    profile, file = tmp_path / "profile.json", tmp_path / "records.json"
    write_profile(PROFILE, profile)
    measured = [
        {
            **record,
            "seconds_median": bench_cost_model.predicted_seconds(PROFILE, record)
            / factor,
        }
        for record in RECORDS
    ]
    skewed = {**measured[0], "skew": 1.0, "seconds_median": 1e6}
    file.write_text(json.dumps({"command": "x", "records": [*measured, skewed]}))
    found, output = _run(monkeypatch, capsys, profile, file, "--check")
    assert found == code
    assert f"mean absolute error {factor - 1:.1%} over 4 points" in output
    assert "1 points with skewed routing" in output


def test_prompts_end_with_a_step_of_their_last_tokens() -> None:
    one = {**MODEL_RECORD, "phase": "prefill", "tokens": 4}
    step = {**MODEL_RECORD, "phase": "decode", "tokens": 4, "context": 0}
    assert bench_cost_model.predicted_seconds(
        PROFILE, one
    ) == bench_cost_model.predicted_seconds(PROFILE, step)


@pytest.mark.parametrize("content", ["[]", "{}", '[{"level": "x"}]', "no"])
def test_files_without_records_are_refused(tmp_path, content) -> None:
    file = tmp_path / "records.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"records of level|not a benchmark's JSON"):
        bench_cost_model.read_records(file)


def test_figures_that_set_a_profile_come_out_of_it() -> None:
    by_kind = {kind: [] for kind in ("set", "predicted", "other fence")}
    for figure in figures():
        by_kind[figure.kind].append(figure)
    assert len(by_kind["set"]) == 3 and len(by_kind["predicted"]) == 12
    for figure in by_kind["set"]:
        assert abs(figure.error(figure.predict())) < 0.005, figure.what


def test_predictions_follow_the_profile() -> None:
    """A record is predicted from the profile that is given."""
    slower = overridden(PROFILE, {"memory_bandwidth": 5e8})
    for record in RECORDS:
        assert bench_cost_model.predicted_seconds(
            slower, record
        ) > bench_cost_model.predicted_seconds(PROFILE, record)
