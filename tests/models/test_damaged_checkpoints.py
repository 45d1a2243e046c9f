"""Damaged checkpoints: one line that names the file and the tensor, before loading."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer

from mlx_ep.api import prepare
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.loading import checkpoint_weights
from mlx_ep.loading.identity import model_facts
from tests.support import tiny
from tests.support.waiting import LONG

UP = "model.layers.1.mlp.switch_mlp.up_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return tiny.save_checkpoint(folder, tiny.QWEN3_MOE)


def read(folder):
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(folder, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + data)


def entry(**changes):
    """A tensor's header entry with other values."""

    def damage(folder):
        header, data = read(folder)
        header[UP] |= changes
        write(folder, header, data)

    return damage


def header(change):
    def damage(folder):
        found, data = read(folder)
        write(folder, change(found) or found, data)

    return damage


def tensors(change):
    def damage(folder):
        found = dict(mx.load(str(folder / WEIGHTS)).items())
        mx.eval(found)
        change(found)
        mx.save_safetensors(str(folder / WEIGHTS), found)

    return damage


def config(**changes):
    def damage(folder):
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changes))

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def overlap(found):
    found[UP]["data_offsets"] = found[UP.replace("up", "gate")]["data_offsets"]


def twice(found):
    one = json.dumps({UP: found[UP]})[1:-1]
    return f"{{{one}, {one}}}".encode()


def cut(num_bytes):
    def damage(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:num_bytes])

    return damage


def rename(old, new):
    return tensors(lambda t: t.update({new: t.pop(old)}))


def second_file(folder):
    found = dict(mx.load(str(folder / WEIGHTS)).items())
    mx.save_safetensors(str(folder / "model-2.safetensors"), {UP: found[UP]})


# What is done to the folder, and what the message must say.
DAMAGES = {
    "empty file": (cut(0), [WEIGHTS, "truncated"]),
    "only a length": (cut(8), [WEIGHTS, "truncated"]),
    "cut in the header": (cut(100), [WEIGHTS, "truncated"]),
    "cut in the data": (cut(-10), [WEIGHTS, "truncated"]),
    "LFS pointer": (
        text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        [WEIGHTS, "Git LFS pointer"],
    ),
    "header of 2^63 bytes": (
        lambda f: write(f, {}, b"", 2**63),
        [WEIGHTS, "header"],
    ),
    "header no JSON": (lambda f: write(f, b"{]", b""), [WEIGHTS, "not JSON"]),
    "header no text": (lambda f: write(f, b"\xff\xfe", b""), [WEIGHTS, "not JSON"]),
    "header a list": (lambda f: write(f, [1], b""), [WEIGHTS, "JSON object"]),
    "header nested": (lambda f: write(f, b"[" * 100_000, b""), [WEIGHTS, "not JSON"]),
    "a name twice": (header(twice), [WEIGHTS, UP, "twice"]),
    "entry a number": (header(lambda h: h.update({UP: 3})), [WEIGHTS, UP]),
    "unknown dtype": (entry(dtype="F5"), [WEIGHTS, UP, "F5"]),
    "dtype a list": (entry(dtype=["F32"]), [WEIGHTS, UP, "dtype"]),
    "shape a text": (entry(shape="4"), [WEIGHTS, UP, "shape"]),
    "shape of fractions": (entry(shape=[1.5]), [WEIGHTS, UP, "shape"]),
    "shape below 0": (entry(shape=[-1, -2]), [WEIGHTS, UP, "shape"]),
    "shape beyond 32 bits": (entry(shape=[2**40]), [WEIGHTS, UP, "shape"]),
    "shape of another size": (entry(shape=[4, 4]), [WEIGHTS, UP, "bytes"]),
    "offsets backwards": (entry(data_offsets=[8, 0]), [WEIGHTS, UP, "data_offsets"]),
    "offsets below 0": (entry(data_offsets=[-8, 0]), [WEIGHTS, UP, "data_offsets"]),
    "one offset": (entry(data_offsets=[8]), [WEIGHTS, UP, "data_offsets"]),
    "offsets behind the end": (
        entry(data_offsets=[2**50, 2**50 + 8]),
        [WEIGHTS, UP, "truncated"],
    ),
    "overlap": (header(overlap), [WEIGHTS, UP, "share bytes"]),
    "a tensor in two files": (second_file, [WEIGHTS, "model-2", UP]),
    "experts missing": (tensors(lambda t: t.pop(UP)), [UP]),
    "dense tensor missing": (
        tensors(lambda t: t.pop("model.norm.weight")),
        ["model.norm.weight"],
    ),
    "extra tensor": (tensors(lambda t: t.update(x=t[UP])), ["x"]),
    "extra expert tensor": (
        rename(UP, UP.replace("up_proj", "sideways_proj")),
        ["sideways_proj"],
    ),
    "a name of 500 KB": (rename(UP, "n" * 500_000), []),
    "experts transposed": (
        tensors(lambda t: t.update({UP: t[UP].transpose(0, 2, 1)})),
        [UP],
    ),
    "router of another width": (
        tensors(
            lambda t: t.update({"model.layers.1.mlp.gate.weight": mx.zeros((3, 3))})
        ),
        ["model.layers.1.mlp.gate.weight"],
    ),
    "integer experts": (
        tensors(lambda t: t.update({UP: t[UP].astype(mx.int32)})),
        [WEIGHTS, UP, "floating"],
    ),
    "NaN in experts": (
        tensors(lambda t: t.update({UP: t[UP] * float("nan")})),
        [UP, "NaN"],
    ),
    "100,000 layers": (config(num_hidden_layers=100_000), ["num_hidden_layers"]),
    "a layer too many": (config(num_hidden_layers=7), ["num_hidden_layers"]),
    "no layers": (config(num_hidden_layers=0), []),
    "layers a text": (config(num_hidden_layers="2"), ["num_hidden_layers"]),
    "10^9 experts": (config(num_experts=10**9), ["num_experts"]),
    "other experts": (config(num_experts=5), []),
    "more experts a token than there are": (config(num_experts_per_tok=99), []),
    "model_type a path": (config(model_type="../../x"), ["model_type"]),
    "config null": (text("config.json", "null"), ["config.json"]),
    "config nested": (text("config.json", "[" * 100_000), ["config.json"]),
    "index a list": (text(WEIGHTS + ".index.json", "[]"), ["index.json"]),
    "index of numbers": (
        text(WEIGHTS + ".index.json", '{"weight_map": {"a": 3}}'),
        ["index.json"],
    ),
    "generation config a list": (
        text("generation_config.json", "[]"),
        ["generation_config.json"],
    ),
    "tokenizer damaged": (text("tokenizer.json", '{"model": 3}'), ["tokenizer"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint(whole: Path, tmp_path: Path, name: str) -> None:
    damage, said = DAMAGES[name]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    damage(folder)
    with pytest.raises(ValueError) as error:
        prepared = prepare(str(folder), GroupComm(mx.distributed.init()), EPConfig())
        assert name == "NaN in experts"  # which is seen when numbers are read
        prepared.load()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 2000, message[:300]
    for words in said:
        assert words in message


def test_what_ranks_must_have_alike(whole: Path, tmp_path: Path) -> None:
    """Every file that ranks must have alike counts, of weights the header."""

    def facts(folder: Path, rank: int) -> dict[str, str]:
        tokenizer = load_tokenizer(folder)
        return model_facts(folder, tokenizer, checkpoint_weights(folder, rank, 2).files)

    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    before = facts(whole, 0)
    assert facts(folder, 1) == before
    assert {"config.json", "tokenizer.json", f"header of {WEIGHTS}"} <= set(before)
    found, data = read(folder)
    write(folder, found | {"__metadata__": {"a": "b"}}, data)
    (folder / "generation_config.json").write_text("{}")
    (folder / "unused.safetensors").write_bytes(b"")  # not of the checkpoint
    after = facts(folder, 0)
    differ = {k for k in before | after if before.get(k) != after.get(k)}
    assert differ == {f"header of {WEIGHTS}", "generation_config.json"}


def test_stop_tokens_that_are_no_numbers(whole: Path, tmp_path: Path) -> None:
    """mlx-lm loads them, and they stop nothing."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    content = '{"eos_token_id": [2, "x", null]}'
    (folder / "generation_config.json").write_text(content)
    comm = GroupComm(mx.distributed.init())
    tokenizer = prepare(str(folder), comm, EPConfig()).tokenizer
    assert set(tokenizer.eos_token_ids) == {1, 2, "x", None}
    assert model_facts(folder, tokenizer, [])["stop tokens"] == "1 2 None x"


def test_some_mutations(capfd: pytest.CaptureFixture[str]) -> None:
    """A sample of `make fuzz`."""
    from tests.support import fuzz_checkpoints

    code = subprocess.run(
        [sys.executable, "-m", fuzz_checkpoints.__name__, "--cases", "120"],
        timeout=LONG,
        check=False,
    ).returncode
    assert code == 0, capfd.readouterr().out
