"""Wrong files and flags: one line, exit code 2, the file and the field by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.simulate.data import (
    MODELS,
    cluster,
    instance,
    make_folder,
    trace_lines,
    two_members,
    write_trace,
)
from tests.support.simulate.running import run_command

Change = Callable[[dict[str, Any]], object]
_INSTANCE = "nodes[0].instances[0]"


def _first(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["nodes"][0]["instances"][0]
    return found


def _set(**changes: Any) -> Change:
    return lambda content: _first(content).update(changes)


def _top(**changes: Any) -> Change:
    return lambda content: content.update(changes)


BAD_CLUSTERS: list[tuple[Change, str]] = [
    (
        _set(ep_size=4, tp_size=2),
        f"{_INSTANCE}.ep_size: ep_size (4) > tp_size (2) requires dp_group to be set",
    ),
    (
        _set(ep_size=3, tp_size=3),
        f"{_INSTANCE}.ep_size: ep_size (3) must divide the model's expert count (16)",
    ),
    (
        _set(num_npus=3, tp_size=2),
        f"{_INSTANCE}.num_npus: num_npus (3) != tp_size (2) * pp_size (1)",
    ),
    (
        _set(npu_mem={"mem_size": 0.0001, "mem_bw": 1, "mem_latency": 0}),
        f"{_INSTANCE}.npu_mem.mem_size: Model size 0.00GB exceeds total NPU memory",
    ),
    (_top(link_bw=[1, 2]), "link_bw: must be one number, or exactly 1"),
    (_top(link_bw=[1]), "link_latency: both of link_bw and link_latency must be"),
    (_top(link_bw=0), "link_bw: must be numbers above 0; got 0"),
    (_top(link_latency="fast"), "link_latency: must be numbers 0 or more; got 'fast'"),
    (_top(num_nodes=2), "num_nodes: must be the number of nodes, 1; got 2"),
    (_top(nodes=[]), "nodes: must be a list with at least one object; got []"),
    (_top(node=[]), "node: is not known here"),
    (
        lambda content: content["nodes"][0].update(num_instances=2),
        "nodes[0].num_instances: must be the number of instances, 1; got 2",
    ),
    (
        lambda content: content["nodes"][0].pop("cpu_mem"),
        "nodes[0].cpu_mem: is missing",
    ),
    (_set(model_name="tiny/none"), f"{_INSTANCE}.model_name: model_name 'tiny/none'"),
    (_set(hardware="H100"), f"{_INSTANCE}.hardware: 'H100' has no bundle"),
    (_set(pd_type="both"), f"{_INSTANCE}.pd_type: must be prefill, decode or null"),
    (_set(pd_type="decode"), "pd_type decode needs one with pd_type prefill"),
    (_set(tp_size=0), f"{_INSTANCE}.tp_size: must be 1 or more; got 0"),
    (_set(tp_size=True), f"{_INSTANCE}.tp_size: must be a whole number; got true"),
    (_set(tp_size=4, ep_size=4), "has no tp4; it has tp1, tp2"),
    (_set(max_num_seqs="8"), f"{_INSTANCE}.max_num_seqs: must be a whole number"),
    (_set(dtype="int4"), f"{_INSTANCE}.dtype: must be one of float16, bfloat16"),
    (
        _set(npu_mem={"mem_size": 1, "mem_bw": 1, "mem_latency": 0, "mem_util": 1.5}),
        f"{_INSTANCE}.npu_mem.mem_util: must be 0 to 1; got 1.5",
    ),
    (_set(placement={"weights": "cpu"}), f"{_INSTANCE}.placement: is not simulated"),
    (_set(model_name="tiny/dense", ep_size=2), "must be 1: tiny/dense has no experts"),
    (_set(tpsize=2), f"{_INSTANCE}.tpsize: is not known here"),
]

GOOD = {"input_toks": 4, "output_toks": 2, "arrival_time_ns": 0}
BAD_LINES: list[tuple[Any, str]] = [
    ("", "must hold at least one request; it is empty"),
    ("{", "line 1: must be JSON"),
    ("[1, 2]", "line 1: the file must be an object"),
    ({}, "line 1: arrival_time_ns: is missing"),
    (GOOD | {"input_toks": 0}, "line 1: input_toks: must be 1 or more; got 0"),
    (GOOD | {"output_toks": 0}, "line 1: output_toks: must be 1 or more; got 0"),
    (GOOD | {"input_toks": 1.5}, "line 1: input_toks: must be a whole number"),
    (GOOD | {"input_toks": "4"}, "line 1: input_toks: must be a whole number"),
    (GOOD | {"output_toks": None}, "line 1: output_toks: is missing"),
    (GOOD | {"arrival_time_ns": -1}, "line 1: arrival_time_ns: must be nanoseconds"),
    (GOOD | {"arrival_time_ns": "now"}, "line 1: arrival_time_ns: must be nanoseconds"),
    (GOOD | {"input_tok_ids": [1, 2]}, "input_tok_ids: must hold as many ids"),
    (GOOD | {"output_tok_ids": "ab"}, "output_tok_ids: must be a list of whole"),
    (GOOD | {"input_tok_ids": [1, 2, 3, 0.5]}, "input_tok_ids: must be a list of"),
    (GOOD | {"inputs": 3}, "line 1: inputs: is not known here"),
    (GOOD | {"input_toks": 10**9}, "line 1 of the trace: 1000000002 tokens must fit"),
    (
        {"session_id": "a", "sub_requests": [GOOD]},
        "line 1: arrival_time_ns: is missing",
    ),
    (
        {"session_id": "a", "arrival_time_ns": 0, "sub_requests": []},
        "sub_requests: must be a list with at least one",
    ),
    (
        {"arrival_time_ns": 0, "sub_requests": [GOOD]},
        "line 1: session_id: is missing",
    ),
    (
        {
            "session_id": "a",
            "arrival_time_ns": 0,
            "sub_requests": [{"input_toks": 4, "output_toks": 2}, {"input_toks": 4}],
        },
        "line 1: sub_requests[1].output_toks: is missing",
    ),
    (
        {
            "session_id": "a",
            "arrival_time_ns": 0,
            "sub_requests": [
                {"input_toks": 4, "output_toks": 2, "tool_duration_ns": -5}
            ],
        },
        "line 1: sub_requests[0].tool_duration_ns: must be nanoseconds",
    ),
    ([GOOD, GOOD | {"output_toks": -3}], "line 2: output_toks: must be 1 or more"),
]

BAD_FLAGS: list[tuple[list[str], str]] = [
    (["--block-size", "0"], "--block-size: must be 1 or more"),
    (["--npu-memory-utilization", "0"], "must be above 0 and at most 1"),
    (["--log-interval", "0"], "must be a number above 0"),
    (["--dtype", "fp4"], "invalid choice: 'fp4'"),
    (["--num-reqs", "-1"], "must be 0 or more"),
    (["--request-routing-policy", "CUSTOM"], "go together"),
    (["--expert-routing-policy", "TRACE"], "TRACE needs --expert-routing-file"),
    (["--expert-routing-file", "x"], "--expert-routing-file goes with"),
    (["--dataset", "none.jsonl"], "none.jsonl: cannot be read"),
    (["--cluster-config", "none.json"], "none.json: cannot be read"),
    (["--output", "."], "must be a file in a folder that can be written"),
    (["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8"], "must fit"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_folder(tmp_path_factory.mktemp("errors"), good=cluster(instance()))
    write_trace(made / "good.jsonl", trace_lines(3, inputs=(20, 30)))
    return made


def _assert_one_line(cluster_file: Path, trace: Path, text: str, *flags: str) -> str:
    outcome = run_command(
        ["--cluster-config", cluster_file, "--dataset", trace, *flags]
    )
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("mlx_ep.simulate: error: "), outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert text in outcome.err, outcome.err
    assert outcome.out == ""
    return outcome.err


@pytest.mark.parametrize("case", range(len(BAD_CLUSTERS)))
def test_bad_clusters(case: int, folder: Path) -> None:
    change, text = BAD_CLUSTERS[case]
    content = copy.deepcopy(cluster(instance()))
    change(content)
    file = folder / "bad.json"
    file.write_text(json.dumps(content))
    error = _assert_one_line(file, folder / "good.jsonl", text)
    assert str(file) in error or "has no tp4" in error


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"tp_size": 2}, "instances of dp_group 'A' must have the same tp_size"),
        ({"ep_size": 4}, "instances of dp_group 'A' must have the same ep_size"),
        ({"model_name": "tiny/dense", "ep_size": 1}, "must have the same"),
    ],
)
def test_members_that_differ(changes: dict[str, Any], text: str, folder: Path) -> None:
    content = two_members()
    content["nodes"][0]["instances"][1].update(changes)
    file = folder / "bad.json"
    file.write_text(json.dumps(content))
    _assert_one_line(file, folder / "good.jsonl", text)


def test_local_ep(folder: Path) -> None:
    """Four shares on two instances of one device each."""
    one = instance(ep_size=4, dp_group="A")
    file = folder / "bad.json"
    file.write_text(json.dumps(cluster(one, dict(one))))
    text = "makes local_ep 2, which must be a whole number from 1 to tp_size (1)"
    _assert_one_line(file, folder / "good.jsonl", text)


@pytest.mark.parametrize("case", range(len(BAD_LINES)))
def test_bad_traces(case: int, folder: Path) -> None:
    line, text = BAD_LINES[case]
    if isinstance(line, str):
        content = line
    else:
        lines = line if isinstance(line, list) else [line]
        content = "\n".join(json.dumps(one) for one in lines)
    file = folder / "bad.jsonl"
    file.write_text(content)
    error = _assert_one_line(folder / "good.json", file, text)
    assert str(file) in error or "of the trace" in error


@pytest.mark.parametrize("case", range(len(BAD_FLAGS)))
def test_bad_flags(case: int, folder: Path) -> None:
    flags, text = BAD_FLAGS[case]
    _assert_one_line(folder / "good.json", folder / "good.jsonl", text, *flags)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok: must be at most the 16"),
        ({"kv_lora_rank": 8}, "qk_rope_head_dim: is missing"),
        ({"index_topk": 8}, "index_topk: is of an attention that the simulator"),
    ],
)
def test_bad_models(change: dict[str, Any], text: str, folder: Path) -> None:
    file = folder / "models" / "tiny" / "bad.json"
    file.write_text(json.dumps(MODELS["tiny/moe"] | change))
    (folder / "bad.json").write_text(
        json.dumps(cluster(instance(model_name="tiny/bad")))
    )
    error = _assert_one_line(folder / "bad.json", folder / "good.jsonl", text)
    assert str(file) in error


@pytest.mark.parametrize(
    "name, old, new, text",
    [
        ("dense.csv", "o_proj", "oproj", "has no layer o_proj"),
        ("dense.csv", "time_us", "us", "line 1: has no column time_us"),
        (
            "attention.csv",
            "0,0,1,16,",
            "0,0,1,16,x",
            "line 2: time_us must be a number",
        ),
        ("skew_fit.csv", "0.25", "?", "alpha must be a number; got '?'"),
    ],
)
def test_bad_bundles(name: str, old: str, new: str, text: str, tmp_path: Path) -> None:
    made = make_folder(tmp_path, good=cluster(instance()))
    trace = write_trace(made / "t.jsonl", trace_lines(1))
    file = made / "perf" / "TINY" / "tiny" / "moe" / "bf16" / "tp1" / name
    found = file.read_text()
    assert old in found
    file.write_text(found.replace(old, new))
    error = _assert_one_line(made / "good.json", trace, text)
    assert str(file) in error
