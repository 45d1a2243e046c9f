"""The tutorial's command, and the folders in which it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.simulate.data import (
    cluster,
    instance,
    make_folder,
    trace_lines,
    write_trace,
)

TUTORIAL = (
    "--cluster-config clusters/single_node_moe_single_instance.json --dtype bfloat16 "
    "--block-size 16 --dataset traces/example_trace.jsonl --output out.csv "
    "--log-interval 1.0"
)


def tutorial_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of the tutorial, with a small model, and the working directory."""
    name = "single_node_moe_single_instance"
    made = make_folder(tmp_path)
    (made / "clusters").mkdir()
    content = cluster(instance(tp_size=2, ep_size=2, num_npus=2))
    (made / "clusters" / f"{name}.json").write_text(json.dumps(content))
    (made / "traces").mkdir()
    write_trace(made / "traces" / "example_trace.jsonl", trace_lines(20, gap_ns=2e8))
    monkeypatch.chdir(made)
    return made
