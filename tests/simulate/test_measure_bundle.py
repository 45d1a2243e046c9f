"""A bundle that was measured here is read and simulated with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_ep.comm import init
from mlx_ep.measure.timer import Timer
from mlx_ep.simulate.measure_bundle import write_bundle
from mlx_ep.simulate.model import read_model
from mlx_ep.simulate.times.bundle import read_bundle
from tests.support.simulate.data import (
    DENSE,
    MOE,
    cluster,
    instance,
    make_folder,
    trace_lines,
    write_trace,
)
from tests.support.simulate.running import make_engine
from tests.support.usage import outcomes_of


@pytest.mark.parametrize("kind", ["moe", "dense", "packed"])
def test_measured_bundle(kind: str, tmp_path: Path) -> None:
    name = "tiny/dense" if kind == "dense" else "tiny/moe"
    config = dict(DENSE if kind == "dense" else MOE)
    if kind == "packed":
        config["quantization"] = {"bits": 4, "group_size": 32}
    folder = make_folder(tmp_path)
    model_file = folder / "models" / f"{name}.json"
    model_file.write_text(json.dumps(config))
    model = read_model(name, model_file)
    timer = Timer(init(), seconds=0.0, longest=0.02, most=3)
    variant = write_bundle(folder / "perf", timer, model, "float32", "HERE", quick=True)
    assert variant == folder / "perf" / "HERE" / name / "fp32"
    bundle = read_bundle(variant, 1, model.is_moe)
    assert (bundle.experts is not None) == model.is_moe
    assert all(line.times.min() > 0 for line in bundle.dense.values())
    content = cluster(instance(model_name=name, hardware="HERE", dtype="float32"))
    (folder / "c.json").write_text(json.dumps(content))
    trace = write_trace(folder / "t.jsonl", trace_lines(5))
    engine = make_engine(folder / "c.json", trace)
    engine.run()
    assert all(request.end > request.arrival for request in engine.requests)


def test_wrong_flags(tmp_path: Path) -> None:
    cases = [
        (["--model", "x"], "--model goes with --bundle"),
        (["--bundle", str(tmp_path)], "--bundle needs --model and one rank"),
        (["--bundle", str(tmp_path), "--model", str(tmp_path)], "config.json"),
    ]
    found = outcomes_of(1, [argv for argv, _ in cases], "mlx_ep.calibrate")
    for (argv, text), [(code, printed)] in zip(cases, found, strict=True):
        assert code == 2 and text in printed, (argv, printed)
        assert len(printed.splitlines()) == 1
