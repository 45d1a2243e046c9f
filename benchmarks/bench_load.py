"""How many bytes does a rank read, and hold at its peak, to load its share of a model?

Two ranks load a synthetic checkpoint (qwen3_moe, over 1 GB, experts over 90 % of it)
with mlx_ep.load and with mlx_lm.utils.sharded_load, each load in fresh processes. The
kernel counts what was read (rchar of /proc/self/io) and the peak of resident memory
(VmHWM of /proc/self/status), so this script needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model, sharded_load

from benchmarks.harness import (
    Samples,
    Target,
    arguments,
    barrier_of,
    finish,
    heading,
    ratio,
    run_pinned,
    slowest,
)
from mlx_ep.metrics import markdown_table
from tests.support.tiny import QWEN3_MOE, make_tokenizer

NUM_RANKS = 2
NUM_FILES = 6
SUM_LIMIT = 0.02  # of the seconds of a load
TIME_LIMIT = 0.7  # of sharded_load's seconds
HELD_LIMIT = 1.05  # what a load takes beside the process's own memory, of what stays
READ_LIMIT = 1.02  # of dense + the rank's experts
PEAK_FACTOR, PEAK_CONSTANT = 1.25, 300e6  # of the bytes held; bytes
# Headers, config, tokenizer and the modules that Python imports meanwhile.
BESIDE_WEIGHTS = 2e6

WIDTHS: dict[str, Any] = {
    **QWEN3_MOE,
    "hidden_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "eos_token_id": 1,
}
# Layers (the first is dense) by bits per weight: over 1 GB, and --quick.
LAYERS = {32: (9, 3), 4: (48, 12)}

Record = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """Bytes of the tensors of a checkpoint."""

    dense: int
    experts: int

    @property
    def rank_bytes(self) -> int:
        """What a rank needs: all dense tensors and its share of the experts."""
        assert WIDTHS["num_experts"] % NUM_RANKS == 0
        return self.dense + self.experts // NUM_RANKS


def write_checkpoint(folder: Path, layout: str, bits: int, layers: int) -> Written:
    """A folder that mlx-lm loads, written file by file; one file's share is held."""
    config = {**deepcopy(WIDTHS), "num_hidden_layers": layers}
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))  # lazy: no number exists yet
    if bits < 32:
        model, config = quantize_model(model, config, group_size=64, bits=bits)
    num_files = min(NUM_FILES, layers)
    files: dict[int, dict[str, mx.array]] = defaultdict(dict)
    for name, parameter in parameters(model).items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        files[int(layer[1]) * num_files // layers if layer else 0][name] = parameter
    del model, parameter
    sizes = {True: 0, False: 0}
    index: dict[str, str] = {}
    for number in sorted(files):
        tensors = files.pop(number)
        if layout == "per_expert":
            tensors = dict(split_experts(tensors))
        file_name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        mx.save_safetensors(str(folder / file_name), tensors, {"format": "mlx"})
        index |= dict.fromkeys(tensors, file_name)
        for name, tensor in tensors.items():
            sizes[".switch_mlp." in name or ".experts." in name] += tensor.nbytes
        del tensors, tensor
        mx.clear_cache()
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    return Written(dense=sizes[False], experts=sizes[True])


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def split_experts(tensors: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """The hub's names: a tensor for each expert."""
    for name, tensor in tensors.items():
        if ".switch_mlp." not in name:
            yield name, tensor
            continue
        for expert in range(tensor.shape[0]):
            new = name.replace(".switch_mlp.", f".experts.{expert}.")
            yield new, mx.contiguous(tensor[expert])


def load_mlx_ep(group: mx.distributed.Group, path: str) -> tuple[Any, int | None]:
    """The model, and the bytes that the package says it read."""
    import mlx_ep
    from mlx_ep import loading
    from mlx_ep.api import calls, install, prepared

    for owner, name in (
        (calls, "prepare"), (loading.weights, "load_local"),
        (install, "find_forms"), (install, "tune"), (prepared, "dense_facts"),
    ):  # fmt: skip
        setattr(owner, name, _timed(name, getattr(owner, name)))
    model, _ = mlx_ep.load(path, group)
    return model, model.expert_parallel.reports[group.rank()].read_bytes


# What load() does, by the function of the package that does it.
PHASES = {
    "prepare": "check",
    "load_local": "read",
    "dense_facts": "sum the bits of the dense part",
    "find_forms": "try the blocks",
    "tune": "time the experts",
}
_SECONDS: dict[str, float] = {}


def _timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _SECONDS[name] = time.perf_counter() - start

    return run


def load_sharded(group: mx.distributed.Group, path: str) -> tuple[Any, int | None]:
    model, _ = sharded_load(path, tensor_group=group)
    return model, None


ARMS: dict[str, Callable[[mx.distributed.Group, str], tuple[Any, int | None]]] = {
    "mlx_ep.load": load_mlx_ep,
    "mlx_lm sharded_load": load_sharded,
}


def measure(group: mx.distributed.Group, arm: str, path: str) -> Record:
    """One load on one rank, in a process that has loaded nothing before."""
    import mlx_ep.api  # noqa: F401, imports are not what is measured

    barrier_of(group)()
    before, peak_before = _kernel("io"), _kernel("status")["VmHWM"]
    start = time.perf_counter()
    model, counted = ARMS[arm](group, path)
    seconds = time.perf_counter() - start
    after = _kernel("io")
    return {
        "arm": arm,
        "rank": group.rank(),
        "seconds": seconds,
        "phases": dict(_SECONDS),
        "read": after["rchar"] - before["rchar"],
        "from_disk": after["read_bytes"] - before["read_bytes"],
        "counted": counted,
        "held": sum(p.nbytes for p in parameters(model).values()),
        "peak_before": peak_before,
        "peak": _kernel("status")["VmHWM"],
    }


def _kernel(file: str) -> dict[str, int]:
    """The numbers of /proc/self/FILE in bytes."""
    text = Path(f"/proc/self/{file}").read_text()
    lines = re.findall(r"^(\w+):\s+(\d+)( kB)?$", text, re.MULTILINE)
    return {name: int(number) * (1024 if kb else 1) for name, number, kb in lines}


def drop_cached_pages(folder: str) -> None:
    """Let the kernel forget the files of a folder, so that they come from the disk."""
    for file in Path(folder).iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # only pages that are on the disk can go
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_arms(path: str, samples: int, cold: bool) -> list[Record]:
    """Every arm on all ranks, one arm after another in turn, `samples` times."""
    records = []
    for sample in range(samples):
        for arm in ARMS:
            if cold:
                drop_cached_pages(path)
            ranks = run_pinned(NUM_RANKS, measure, arm, path)
            records += [{"sample": sample, **rank} for rank in ranks]
    return records


def report(records: list[Record], written: Written) -> tuple[list[Target], str]:
    """Print the table and the ratios; the targets and the figure."""
    needed = written.rank_bytes
    headers = "arm,rank,read MB,of needed,from disk MB,own count MB,held MB"
    headers += ",peak before MB,peak MB,median (quartiles)"
    rows, times = [], dict[str, Samples]()
    for arm in ARMS:
        ranks = [_select(records, arm, rank) for rank in range(NUM_RANKS)]
        seconds = [Samples(tuple(r["seconds"] for r in runs)) for runs in ranks]
        times[arm] = slowest(seconds)
        for rank, runs in enumerate(ranks):
            read = _highest(runs, "read")
            row = [arm, rank, _mb(read), f"{read / needed:.3f}"]
            keys = ("from_disk", "counted", "held", "peak_before", "peak")
            row += [_mb(_highest(runs, key)) for key in keys]
            rows.append([*row, seconds[rank].text("s")])
    print(markdown_table(headers.split(","), rows))
    ours, theirs = (_select(records, arm) for arm in ARMS)
    read, read_theirs = _highest(ours, "read"), _highest(theirs, "read")
    peak, peak_theirs = _highest(ours, "peak"), _highest(theirs, "peak")
    faster = ratio(*reversed(times.values()))
    low, high = faster.quartiles
    print(
        f"\nmlx_lm sharded_load over mlx_ep.load: {read_theirs / read:.2f} x the bytes "
        f"read, {peak_theirs / peak:.2f} x the peak, {faster.median:.2f} "
        f"({low:.2f} .. {high:.2f}) x the seconds of the slower rank\n"
    )
    for name, title in PHASES.items():
        spent = Samples(tuple(r["phases"][name] for r in ours))
        print(f"- {title}: {spent.text('s')}")
    print()
    excess = max(r["peak"] / (PEAK_FACTOR * r["held"] + PEAK_CONSTANT) for r in ours)
    over_own = max((r["peak"] - r["peak_before"]) / r["held"] for r in ours)
    share = Samples(tuple(r["phases"]["dense_facts"] / r["seconds"] for r in ours))
    uncounted = max(abs(r["read"] - r["counted"]) for r in ours)
    tolerance = 0.01 * _highest(ours, "counted") + BESIDE_WEIGHTS
    targets = [
        Target("read / (dense + its experts)", read / needed, READ_LIMIT),
        Target("peak RSS / (1.25 x held + 300 MB)", excess, 1.0),
        Target("seconds / sharded_load's", 1 / faster.median, TIME_LIMIT),
        Target("summing the dense part / seconds", share.median, SUM_LIMIT),
        Target("peak over own memory / held", over_own, HELD_LIMIT),
        Target("MB read beside the package's count", uncounted / 1e6, tolerance / 1e6),
    ]
    figure = (
        f"mlx_ep.load on {NUM_RANKS} ranks: read {read / needed:.3f} x (dense + its "
        f"experts) per rank, peak {_mb(peak)} MB; sharded_load "
        f"{read_theirs / needed:.3f} x, peak {_mb(peak_theirs)} MB."
    )
    return targets, figure


def _select(records: list[Record], arm: str, rank: int | None = None) -> list[Record]:
    return [r for r in records if r["arm"] == arm and rank in (None, r["rank"])]


def _highest(records: list[Record], key: str) -> Any:
    """The most bytes of all samples; None where an arm does not count them."""
    return max((r[key] for r in records if r[key] is not None), default=None)


def _mb(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.1f}"


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "", samples=5)
    parser.add_argument(
        "--layout", choices=["stacked", "per_expert"], default="stacked"
    )
    parser.add_argument("--bits", type=int, choices=LAYERS, default=32)
    parser.add_argument(
        "--cold", action="store_true", help="read from the disk, not from memory"
    )
    args = parser.parse_args()
    if sys.platform != "linux":
        parser.error("needs Linux: other kernels do not count the bytes read")
    if args.layout == "per_expert" and args.bits < 32:
        parser.error(
            "mlx-lm stacks experts of qwen3_moe only if they are not quantized"
        )
    return args


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="bench_load-") as folder:
        layers = LAYERS[args.bits][args.quick]
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm tells of quantizing
            written = write_checkpoint(Path(folder), args.layout, args.bits, layers)
        total = written.dense + written.experts
        print(heading("Bytes and memory to load a rank's share of a model"))
        print(
            f"Checkpoint: qwen3_moe, {layers} layers, {WIDTHS['num_experts']} experts, "
            f"{args.layout}, {args.bits} bits, {total / 1e6:.0f} MB in "
            f"{min(NUM_FILES, layers)} files, experts {written.experts / total:.1%}.\n"
            f"Needed by a rank (dense + its experts): {_mb(written.rank_bytes)} MB. "
            f"{args.samples} loads per arm, arms in turn.\n"
            f"Page cache before each load: {'cold' if args.cold else 'warm'}.\n"
        )
        records = run_arms(folder, args.samples, args.cold)
    targets, figure = report(records, written)
    return finish(args, records, targets, figure)


if __name__ == "__main__":
    raise SystemExit(main())
