"""Ranks that differ are refused before the first step, with a table of who has what."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from mlx_ep.comm.symmetry import MOST_FACTS, differences, digest
from mlx_ep.loading import find_model
from tests.support.ranks import run_commands, run_ranks


def test_a_table_says_who_has_what():
    ranks = [{"seed": "1", "mode": "a"}, {"seed": "1", "mode": "b"}, {"seed": "1"}]
    assert differences(ranks).splitlines() == [
        "|      | rank 0 | rank 1 | rank 2 |",
        "| mode | a      | b      | -      |",
    ]
    assert differences(ranks[:1] * 3) == ""
    long = [{"text": "x" * 99}, {"text": "x" * 98 + "y"}]
    row = differences(long).splitlines()[1].split(" | ")
    assert row[1] != row[2] and max(map(len, row)) < 50
    many = [{str(i): str(rank) for i in range(50)} for rank in range(2)]
    rows = differences(many).splitlines()
    assert len(rows) == MOST_FACTS + 2 and rows[-1] == "| and 30 more |"


def test_a_digest_stands_for_the_content():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
    assert digest(b"{}") != digest(b"{} ") and len(digest(b"")) == 16


def change_config(folder):
    change_json(folder / "config.json", "rope_theta", 12345.0)


def change_top_k(folder):
    change_json(folder / "config.json", "norm_topk_prob", False)


def change_eos(folder):
    change_json(folder / "generation_config.json", "eos_token_id", 5)


def change_template(folder):
    file = folder / "chat_template.jinja"
    old = file.read_text() if file.exists() else "{{ messages[0]['content'] }}"
    file.write_text(old + " ")


def change_json(file, key, value):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | {key: value}))


def change_bit(folder, word):
    """One bit of one weight whose name has the word in it."""
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if word in name and name.endswith("weight"))
    data[8 + size + header[name]["data_offsets"][0] + 5] ^= 1
    file.write_bytes(data)


CHANGES = {
    "nothing": (lambda folder: None, ""),
    "configuration": (change_config, "| config.json"),
    "renormalizing": (change_top_k, "| config.json"),
    "stop tokens": (change_eos, "| generation_config.json"),
    "chat template": (change_template, "| chat template"),
    "q_proj": (lambda folder: change_bit(folder, "q_proj"), "| weights of model.lay"),
    "router": (lambda folder: change_bit(folder, "mlp.gate"), "| weights of model.lay"),
}


def load_each(group, root):
    """What each change on the last rank is answered with."""
    import mlx_ep

    answers = {}
    quick = mlx_ep.EPConfig(warmup=False)
    for change in CHANGES:
        name = change if group.rank() == group.size() - 1 else "nothing"
        try:
            mlx_ep.load(str(Path(root) / name), group, quick)
            answers[change] = ""
        except ValueError as error:
            answers[change] = str(error)
    configs = [quick, mlx_ep.EPConfig(warmup=False, reduction="per_slot")]
    try:
        mlx_ep.load(str(Path(root) / "nothing"), group, configs[group.rank()])
    except ValueError as error:
        answers["EPConfig"] = str(error)
    return answers


@pytest.mark.requires("ranks")
def test_models_that_differ_are_refused(tmp_path):
    for name, (change, _) in CHANGES.items():
        folder = tmp_path / name
        shutil.copytree(find_model("jargon-moe"), folder)
        change(folder)
    answers, others = run_ranks(2, load_each, str(tmp_path))
    assert answers == others
    for name, (_, text) in CHANGES.items():
        assert (text in answers[name]) if text else answers[name] == "", answers[name]
    assert "| reduction | partial_sum | per_slot |" in answers["EPConfig"]


FLAGS = """
import os, sys
from mlx_ep.generate.__main__ import main
own = ["--max-tokens", "7"] if os.environ["MLX_RANK"] == "1" else ["--prompt", "x"]
sys.argv = ["mlx_ep.generate", *own]
main()
"""


@pytest.mark.requires("ranks")
def test_flags_that_differ_are_refused():
    outcomes = run_commands(2, [sys.executable, "-c", FLAGS])
    assert [outcome.returncode for outcome in outcomes] == [2, 2]
    assert outcomes[1].stderr == ""
    line, *table = outcomes[0].stderr.splitlines()
    assert "error: All ranks must have the same flags; these differ:" in line
    assert table == [
        "|              | rank 0 | rank 1 |",
        "| --max-tokens | 100    | 7      |",
    ]


DTYPES = """
import os, sys
from mlx_ep.generate.__main__ import main
own = ["--dispatch-dtype", "int8"] if os.environ["MLX_RANK"] == "1" else []
sys.argv = ["mlx_ep.generate", "--attention", "data", "--prompts-file", sys.argv[1]]
sys.argv += own
main()
"""


@pytest.mark.requires("ranks")
def test_a_dispatch_dtype_that_differs_is_refused(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    outcomes = run_commands(2, [sys.executable, "-c", DTYPES, str(prompts)])
    assert [outcome.returncode for outcome in outcomes] == [2, 2], outcomes
    assert outcomes[1].stderr == ""
    assert "these differ:" in outcomes[0].stderr
    row = outcomes[0].stderr.splitlines()[-1]
    assert row.split() == ["|", "dispatch_dtype", "|", "model", "|", "int8", "|"]
