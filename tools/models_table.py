"""Writes docs/models.md: every mlx-lm architecture with experts, run on 2 ranks.

    python -m tools.models_table

The models and the measurement are those of tests/models/test_architectures.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mlx_lm.utils import _get_classes

from tests.models.architectures import (
    ARCHITECTURES,
    Measured,
    Saved,
    measure,
    model_file,
    moe_files,
    save_all,
)
from tests.models.hub_layouts import layout_name
from tests.ranks import run_ranks

TABLE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

INTRODUCTION = """\
# Models

All models with routed experts of mlx-lm {mlx_lm}: {num_types} configurations, which
load {num_files} of its files. On the machine below, {num_summed} of them run with one
sum of `[T, D]` per MoE layer over the network, {num_per_slot} with K outputs per token,
and {num_cannot} cannot run.

- **experts**: *sum* where each rank adds its experts' outputs and only that sum
  travels; *K outputs* where every expert's output travels by itself, K times the
  bytes, with the reason that mlx_ep gives when it loads the model.
- **TP**: whether the model's class in mlx-lm defines `shard()`, without which mlx-lm
  cannot spread it over Macs by tensor parallelism.
- **float32**, **4-bit**: the largest difference of a logit to mlx-lm in one process,
  on 2 ranks; 0 is bit for bit. The largest logits of these models are between
  {smallest:.1f} and {largest:.1f}.
- **hub layout**: the checkpoint layout beside mlx-lm's own stacks that was loaded too,
  with logits that have the same bits as those from the stacks.

`nemotron_h_latent` is `nemotron_h` with a `moe_latent_size`. On every rank and in every
layout, the bytes read were at most {reading:.3f} times the bytes held.

## How this was made

By `python -m tools.models_table` on {day}, on a 2-core x86 Linux machine: MLX {mlx}
with its CPU backend, 2 ranks over the ring transport, attention replicated. Each model
is tiny and random (10 experts, 3 of them per token where the model allows it, hidden
width 64 or 128, 2 to 4 layers; `tests/models/architectures.json`). It is saved, each
rank loads its part with `mlx_ep.load`, runs a prompt of 68 tokens and then 4 tokens one
by one with the cache, and the logits of all 72 positions are compared.
`make test-slow` repeats it on 1, 2 and 3 ranks.

What it does not show: real checkpoints, bfloat16, Metal, and speed. Packed formats
(fp8, int4, mxfp4, mxfp8) and layers that mlx-lm drops have a test by themselves,
`tests/models/test_packed_checkpoints.py`, which compares the parameters of ranks.

## The table
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        saved = save_all(Path(folder), ARCHITECTURES)
        ranks = run_ranks(2, measure, saved, timeout=1000)
        results: dict[str, dict[str, list[Measured]]] = {}
        for one, measured in zip(saved, zip(*ranks, strict=True), strict=True):
            results.setdefault(one.name, {})[one.form] = list(measured)
        text = _introduction(saved, results) + "\n".join(_table(results)) + "\n"
    TABLE.write_text(text)


def _introduction(
    saved: Sequence[Saved], results: dict[str, dict[str, list[Measured]]]
) -> str:
    first = [forms["float32"][0] for forms in results.values()]
    ran = [m for forms in results.values() for ms in forms.values() for m in ms]
    ran = [m for m in ran if not m.error]
    logits = [float(np.abs(one.expected).max()) for one in saved if one.can_run]
    return INTRODUCTION.format(
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
        day=date.today().isoformat(),
        num_types=len(results),
        num_files=len(moe_files()),
        num_summed=sum(not m.error and not m.reasons for m in first),
        num_per_slot=sum(bool(m.reasons) for m in first),
        num_cannot=sum(bool(m.error) for m in first),
        smallest=min(logits),
        largest=max(logits),
        reading=max(m.read_bytes / m.held_bytes for m in ran),
    )


def _table(results: dict[str, dict[str, list[Measured]]]) -> list[str]:
    rows = [
        "",
        "| model type | mlx-lm file | experts | TP | float32 | 4-bit | hub layout |",
        "| --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    for name in sorted(results, key=str.lower):
        forms, config = results[name], ARCHITECTURES[name]
        model_class, _ = _get_classes(dict(config))
        cells = [
            f"`{name}`",
            f"`{model_file(config)}.py`",
            _experts(forms["float32"][0]),
            "yes" if hasattr(model_class, "shard") else "no",
            _difference(forms["float32"]),
            _difference(forms.get("4-bit", [])),
            layout_name(name) if _same_bits(forms) else "-",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _experts(measured: Measured) -> str:
    if measured.error:
        return f"cannot run: {measured.error.replace('|', '/')}"
    if measured.reasons:
        return f"K outputs: {'; '.join(measured.reasons)}"
    return "sum"


def _difference(ranks: list[Measured]) -> str:
    if not ranks or ranks[0].error:
        return "-"
    worst = max(rank.difference for rank in ranks)
    return f"{worst:.1e}" if worst else "0"


def _same_bits(forms: dict[str, list[Measured]]) -> bool:
    """Whether a hub layout was loaded and gave the logits of the stacks."""
    if "hub" not in forms:
        return False
    digests = {m.digest for form in ("float32", "hub") for m in forms[form]}
    assert len(digests) == 1, "the hub layout gives other logits than the stacks"
    return True


if __name__ == "__main__":
    main()
