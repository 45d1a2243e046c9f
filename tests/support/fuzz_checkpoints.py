"""Mutated checkpoints, configurations, tokenizers, journals and hub answers.

    python -m tests.support.fuzz_checkpoints [--cases 20000] [--seed N] [--first N]

Each case is a function of its seed. What may come of it: one line of at most 2,000
characters as a ValueError, or what mlx-lm makes of the same files. Anything else
(another type, a traceback, a crash, more than --deadline seconds, memory) is a finding,
printed with the seed that `--seed` and `--first` repeat. Cases run in forked batches;
the process that forks computes nothing, as threads do not survive a fork.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
MOST_CHARACTERS = 2100  # "rank 0: " and the middle's dots included
BATCH = 250
MEMORY = 6 << 30  # address space of a batch

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 99, 2**31 - 1, 2**31, 2**63, 10**30, 0.5,
    -1.5, float("nan"), float("inf"), "", "2", "x", "a\nb", "\0", "../../etc/passwd",
    "n" * 5000, [], [0], [1, 2, 3], [-1], [[1]], {}, {"a": 1}, [None], ["full"] * 3,
]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "I32", "U8", "F64", "F8_E5M2", "C64", "f32", "I64"]


class TooSlowError(Exception):
    """A case did not end in time."""


def damaged_json(draw: random.Random, value: Any) -> Any:
    """A value of JSON with one part of it replaced, removed, added or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        way = draw.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.15:
            return value | {draw.choice(["x", "", "a.b", key + "2"]): value[key]}
        return value | {key: damaged_json(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        changed = [damaged_json(draw, value[at])] if draw.random() < 0.8 else []
        return value[:at] + changed + value[at + 1 :]
    if type(value) is int and draw.random() < 0.5:
        return draw.choice([value + 1, value - 1, value * 2, -value, value << 20])
    return draw.choice(VALUES)


def damaged_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes of which some are changed, removed, inserted or cut off."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(found) + 1)
        way = draw.randrange(4)
        if way == 0 and at < len(found):
            found[at] = draw.randrange(256)
        elif way == 1:
            del found[at : at + draw.choice([1, 4, 100])]
        elif way == 2:
            found[at:at] = draw.choice([b"{", b"[", b"9", b"\xff", b'"', b"[" * 5000])
        elif draw.random() < 0.2:
            del found[at:]
    return bytes(found)


def damage_header(draw: random.Random, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = draw.choice([n for n in header if n != "__metadata__"])
    other = draw.choice([n for n in header if n != "__metadata__"])
    way = draw.randrange(8)
    if way == 0:
        header[name]["dtype"] = draw.choice([*DTYPES, draw.choice(VALUES)])
    elif way == 1:
        header[name]["shape"] = damaged_json(draw, header[name]["shape"])
    elif way == 2:
        header[name]["data_offsets"] = damaged_json(draw, header[name]["data_offsets"])
    elif way == 3:
        header[name], header[other] = header[other], header[name]
    elif way == 4:
        header[draw.choice(["x", name + "x", name.replace(".1.", ".9.")])] = header.pop(
            name
        )
    elif way == 5:
        header = damaged_json(draw, header)
    text = json.dumps(header).encode()
    if way == 6:
        text = damaged_bytes(draw, text)
    size = draw.choice([0, 1, 2**31, 2**62, len(text) - 1]) if way == 7 else len(text)
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + rest)


def damage_data(draw: random.Random, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    way = draw.randrange(4)
    if way == 0:
        data = data[: draw.randrange(len(data))]
    elif way == 1:
        data += bytes(draw.randrange(1, 100))
    elif way == 2:
        data = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    else:
        at = draw.randrange(len(data) // 2, len(data) - 16)
        data = data[:at] + b"\x00\x00\xc0\x7f" * 4 + data[at + 16 :]
    (folder / WEIGHTS).write_bytes(data)


def damage_text(draw: random.Random, folder: Path, names: list[str]) -> None:
    file = folder / draw.choice([n for n in names if (folder / n).exists()])
    if draw.random() < 0.2:
        file.write_bytes(damaged_bytes(draw, file.read_bytes()))
    else:
        file.write_text(json.dumps(damaged_json(draw, json.loads(file.read_text()))))


def damage_config(draw: random.Random, folder: Path) -> None:
    damage_text(draw, folder, ["config.json"])


def damage_other(draw: random.Random, folder: Path) -> None:
    damage_text(draw, folder, ["generation_config.json", f"{WEIGHTS}.index.json"])


def damage_tokenizer(draw: random.Random, folder: Path) -> None:
    damage_text(draw, folder, ["tokenizer.json", "tokenizer_config.json"])


MODEL_KINDS: dict[str, tuple[int, Callable[[random.Random, Path], None]]] = {
    "header": (35, damage_header),
    "data": (8, damage_data),
    "config": (25, damage_config),
    "index": (7, damage_other),
    "tokenizer": (10, damage_tokenizer),
}


def try_model(draw: random.Random, whole: Path, folder: Path) -> str:
    import mlx.core as mx

    from mlx_ep.api import prepare
    from mlx_ep.comm import GroupComm
    from mlx_ep.config import EPConfig

    kinds = list(MODEL_KINDS)
    weights = [MODEL_KINDS[k][0] for k in kinds]
    kind = draw.choices(kinds, weights)[0]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    MODEL_KINDS[kind][1](draw, folder)
    comm = GroupComm(mx.distributed.init())
    try:
        prepared = prepare(str(folder), comm, EPConfig(warmup=False))
    except ValueError as error:
        return check_line(kind, error)
    try:
        model, _ = prepared.load()
    except ValueError as error:
        return check_line(f"{kind}, in load", error)
    return f"{kind}: {compare(draw, model, folder)}"


def compare(draw: random.Random, model: Any, folder: Path) -> str:
    """Logits against mlx-lm's own of the same files, for some of the cases."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    tokens = mx.array([[1, 2, 3, 4]])
    got = np.array(model(tokens).astype(mx.float32))
    plain, _ = load_model(folder)
    expected = np.array(plain(tokens).astype(mx.float32))
    scale = np.abs(expected).max(initial=0)
    if not np.isfinite(expected).all():
        return "right"  # as far as infinity is
    assert np.abs(got - expected).max() <= 1e-3 * scale + 1e-6, "other logits"
    return "right"


def try_record(draw: random.Random, folder: Path) -> str:
    from huggingface_hub import constants

    from mlx_ep.loading.hub.repository import HubFolder

    constants.HF_ASSETS_CACHE = str(folder / "assets")
    commit = "c" * 40
    path = folder / "assets/mlx_ep/owner--name/ranges/commits" / commit
    path.mkdir(parents=True, exist_ok=True)
    file = {"name": WEIGHTS, "size": 10, "etag": "e" * 64}
    record = {"repository": "owner/name", "commit": commit, "files": [file]}
    text = json.dumps(damaged_json(draw, record)).encode()
    if draw.random() < 0.3:
        text = damaged_bytes(draw, json.dumps(record).encode())
    (path / "mlx_ep_hub.json").write_bytes(text)
    try:
        found = HubFolder.of(path)
    except ValueError as error:
        return check_line("record", error)
    assert found is not None
    blobs = (folder / "assets/mlx_ep/owner--name/ranges/blobs").resolve()
    for weights in found.files:
        assert found.blob(weights).resolve().parent == blobs, weights
        assert (path / weights.name).parent == path, weights
        assert 0 <= weights.size <= 1 << 44
    return "record: right"


def try_journal(draw: random.Random, folder: Path) -> str:
    from mlx_ep.loading.hub.ranges import Span
    from mlx_ep.loading.hub.sparse import Journal

    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "blob")
    journal.path.unlink(missing_ok=True)
    for start in range(0, 40, 10):
        journal.append(Span(start, start + 5))
    journal.path.write_bytes(damaged_bytes(draw, journal.path.read_bytes()))
    read = Journal(folder / "blob")
    there = {i for i in range(200) if not read.missing(Span(i, i + 1))}
    # A damaged line is no line: nothing is there that was not written.
    assert there <= {i for i in range(40) if i % 10 < 5}, there
    return "journal: right"


def try_answer(draw: random.Random, folder: Path) -> str:
    from mlx_ep.loading.hub.repository import checked_file, has_all_weights

    folder.mkdir(parents=True, exist_ok=True)
    index = {"weight_map": {"a": WEIGHTS, "b": "model-2.safetensors"}}
    text = json.dumps(damaged_json(draw, index)).encode()
    (folder / f"{WEIGHTS}.index.json").write_bytes(
        damaged_bytes(draw, text) if draw.random() < 0.3 else text
    )
    has_all_weights(folder)
    answer = [WEIGHTS, 10, "e" * 64]
    answer[draw.randrange(3)] = draw.choice(VALUES)
    try:
        file = checked_file(*answer)
    except ValueError as error:
        return check_line("hub answer", error)
    assert "/" not in file.name and type(file.size) is int
    return "hub answer: right"


def check_line(kind: str, error: ValueError) -> str:
    text = str(error)
    assert "\n" not in text, f"{kind}: more than a line: {text[:300]!r}"
    assert text, f"{kind}: no message"
    assert len(text) <= MOST_CHARACTERS, f"{kind}: {len(text)} characters"
    return f"{kind}: refused"


def try_case(seed: int, whole: Path, folder: Path) -> str:
    draw = random.Random(seed)
    kind = draw.random()
    if kind < 0.7:
        return try_model(draw, whole, folder / "model")
    if kind < 0.8:
        return try_record(draw, folder / "hub")
    if kind < 0.9:
        return try_journal(draw, folder / "journal")
    return try_answer(draw, folder / "answer")


def run_batch(seeds: range, whole: Path, folder: Path, deadline: int) -> None:
    """In a process of its own: a JSON line per case into `folder`/out."""

    def stop(*_: Any) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    with (folder / "out").open("w") as out:
        for seed in seeds:
            out.write(f"{seed} ")
            out.flush()
            signal.alarm(deadline)
            printed = io.StringIO()
            try:
                with (
                    contextlib.redirect_stdout(printed),
                    contextlib.redirect_stderr(printed),
                ):
                    outcome = try_case(seed, whole, folder)
            except BaseException as error:  # it is what is looked for
                cause = f" < {error.__cause__!r}" if error.__cause__ else ""
                outcome = f"FOUND {type(error).__name__}: {error}{cause}"
            signal.alarm(0)
            out.write(json.dumps(outcome[:600]) + "\n")


def fork_batch(seeds: range, whole: Path, deadline: int) -> tuple[list[str], list[str]]:
    """Outcomes and findings of a batch; what a crash left undone is run on."""
    outcomes, findings = [], []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder, first = Path(name), seeds.start
        while first < seeds.stop:
            child = os.fork()
            if child == 0:
                try:
                    run_batch(range(first, seeds.stop), whole, folder, deadline)
                finally:
                    os._exit(0)
            status = os.waitpid(child, 0)[1]
            for line in (folder / "out").read_text().splitlines():
                seed, _, text = line.partition(" ")
                first = int(seed) + 1
                outcome = json.loads(text) if text else f"FOUND ended with {status}"
                if outcome.startswith("FOUND"):
                    findings.append(f"seed {seed}: {outcome}")
                outcomes.append(
                    outcome.partition(":")[0] if "FOUND" in outcome else outcome
                )
    return outcomes, findings


def make_whole(folder: Path) -> None:
    """The checkpoint that is damaged, made in another process."""
    code = (
        "import sys; from pathlib import Path; from tests.support import tiny;"
        "tiny.save_checkpoint(Path(sys.argv[1]), tiny.QWEN3_MOE)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    names = {"a.weight": WEIGHTS}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    generation = {"eos_token_id": 1, "max_length": 20}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="skip so many cases")
    parser.add_argument("--deadline", type=int, default=20, help="seconds of a case")
    args = parser.parse_args(argv)
    import mlx_ep.api  # noqa: F401, once for all batches; nothing is computed
    from mlx_ep import loading  # noqa: F401

    start, found = time.monotonic(), collections.Counter[str]()
    findings: list[str] = []
    base = args.seed * 1_000_000
    with tempfile.TemporaryDirectory(prefix="fuzz-whole-") as name:
        make_whole(Path(name))
        for first in range(args.first, args.cases, BATCH):
            seeds = range(base + first, base + min(first + BATCH, args.cases))
            outcomes, new = fork_batch(seeds, Path(name), args.deadline)
            found.update(outcomes)
            findings += new
            for line in new:
                print(line[:500], flush=True)
    for outcome, count in sorted(found.items()):
        print(f"{count:6} {outcome}")
    print(
        f"{sum(found.values())} cases in {time.monotonic() - start:.0f} s, "
        f"{len(findings)} findings"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
