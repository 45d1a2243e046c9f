"""Writes docs/models.md: every mlx-lm architecture with experts, run on 2 and 3 ranks.

    python -m tools.models_table [--only mixtral,dbrx] [--output FILE]

The models and the measurement are those of tests/models.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mlx_lm.utils import _get_classes

from mlx_ep.config import EPConfig
from mlx_ep.models.tensor_parallel import tensor_problem
from tests.support import quantizations, tiny
from tests.support.architectures import (
    ARCHITECTURES,
    Job,
    Measured,
    Saved,
    measure,
    model_file,
    moe_files,
    save_all,
)
from tests.support.hub_layouts import layout_name
from tests.support.metal_stand_in import STAND_INS
from tests.support.ranks import run_ranks

TABLE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

INTRODUCTION = """\
# Models

All models with routed experts of mlx-lm {mlx_lm}: {num_types} configurations, which
load {num_files} of its files. On the machine below they run
{tiers}.
Which tier a model has is found from the structure and the arithmetic of its blocks when
it is loaded; there is no list of names.

- **tier**, how experts' outputs travel; a block that is not `routed` says why.
  - `routed`: the gates are read off the block's own code, each rank adds its experts'
    outputs, and that sum travels, `[T, D]` (narrower where experts work in a latent
    width). All strategies, kernels and `--attention data` apply.
  - `partial-sum`: the block's code runs unchanged, with exact zeros for the experts of
    other ranks, which are not computed. One sum over the ranks per block: in the place
    where mlx-lm has one for tensor parallelism, else of the block's output, in the
    dtype that the block has there. With strategy `replicated`.
  - `per-slot`: every expert's output travels by itself, K times the bytes. What is left
    where the check of the other two fails, and for debugging (`--reduction per_slot`).
- **TP in mlx-lm**: whether the model's class in mlx-lm defines `shard()`, without which
  mlx-lm cannot spread it over Macs by tensor parallelism.
- **EP here**: whether it ran on 2 and 3 ranks.
- **attention**: what `--attention` may be with strategy `replicated`. `tensor`
  splits the dense part by mlx-lm's own `shard()`; it was run on 2 ranks.
- **quantizations**: those that were run, beside float32.
- **hub layout**: the checkpoint layout beside mlx-lm's own names that was loaded too,
  with logits that have the same bits; or else, where mlx-lm turns the matrices, with
  this largest difference of a logit to mlx-lm in one process.
- **largest difference** of a logit to mlx-lm in one process, float32 / 4-bit; 0 is bit
  for bit. These models' largest logits are between {smallest:.1f} and {largest:.1f}.

With attention replicated, on every rank and in every layout, the bytes read were at
most {reading:.3f} times the bytes held, and each MoE layer took one collective.
`nemotron_h_latent` is `nemotron_h` with a `moe_latent_size`.
{stand_ins}
A model that is not here, or whose experts are not found:
[add-a-model.md](add-a-model.md).

## How this was made

By `python -m tools.models_table` on {day}, on a 2-core x86 Linux machine: MLX {mlx}
with its CPU backend, 2 ranks over the ring transport and 3 over MPI. Each model is
tiny and random (10 experts, 3 of them per token where the model allows it, hidden width
64 or 128, 2 to 4 layers; `tests/support/architectures.json`). It is saved, each rank
loads its part with `mlx_ep.load`, runs a prompt of 68 tokens and then 4 tokens one by
one with the cache, and the logits of all 72 positions are compared. What runs the
experts is chosen by the rule that holds without warm-up, so that layouts can be
compared by their bits. `make test-slow` repeats it with warm-up, on 1 rank too, and
runs every model in the tier `partial-sum` as well.

What it does not show: real checkpoints, Metal, and speed. Checkpoints packed in a form
that mlx-lm unpacks when it loads them (fp8, int4, mxfp4 and mxfp8 of the hub) have a
test by themselves, `tests/models/test_packed_checkpoints.py`.

## The table
"""

STAND_IN = """
`{name}` runs on Metal only: mlx-lm has its router and its norms as Metal kernels and in
no other form. It was measured with plain MLX in their place, on both sides
(`tests/support/metal_stand_in.py`); without Metal it is refused. It rounds its last
norm to bfloat16, and so the differences of its logits.
"""

QUANTIZATIONS = """
## Quantizations

2 ranks, attention replicated; widths of 128. In float32 (of all that is not packed):
the largest difference of a logit to mlx-lm in one process. In bfloat16 and float16: how
far all logits are from those that float32 gives, relative (the root of the sum of
squares), on 2 ranks / in mlx-lm in one process. `mixed`: a setting of its own for each
projection of the experts, and a layer that is not quantized, as config.json may say by
path."""


@dataclass
class Row:
    """What was measured of one architecture, per form of its checkpoint.

    Attributes:
        two: on 2 ranks, attention replicated.
        three: on 3 ranks.
        tensor: on 2 ranks, attention tensor.
        why_not_tensor: the reason, where mlx-lm has a shard() and it cannot be used.
    """

    name: str
    two: dict[str, list[Measured]] = field(default_factory=dict)
    three: dict[str, list[Measured]] = field(default_factory=dict)
    tensor: dict[str, list[Measured]] = field(default_factory=dict)
    why_not_tensor: str = ""

    @property
    def replicated(self) -> list[Measured]:
        """All that ran with attention replicated."""
        runs = [*self.two.values(), *self.three.values()]
        return [m for ranks in runs for m in ranks if not m.error]

    @property
    def error(self) -> str:
        runs = [*self.two.values(), *self.three.values()]
        return next((m.error for ranks in runs for m in ranks if m.error), "")

    @property
    def has_shard(self) -> bool:
        model_class, _ = _get_classes(dict(ARCHITECTURES[self.name]))
        return hasattr(model_class, "shard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="some architectures, for trying it out")
    parser.add_argument("--output", type=Path, default=TABLE)
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(ARCHITECTURES)
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        saved = save_all(Path(folder), names)
        wide = [name for name in quantizations.WIDE if name in names]
        packed = [
            quantizations.save(Path(folder) / "packed", name, form)
            for name in wide
            for form in quantizations.QUANTIZATIONS
        ]
        rows, packed_results = _measure(saved, packed)
        lines = [_introduction(saved, rows), *_table(rows)]
        lines += [QUANTIZATIONS, *_packed_table(wide, packed_results)]
    arguments.output.write_text("\n".join(lines) + "\n")


def _measure(
    saved: list[Saved], packed: list[Saved]
) -> tuple[list[Row], dict[Saved, list[Measured]]]:
    rows = {one.name: Row(one.name) for one in saved}
    for row in rows.values():
        row.why_not_tensor = tensor_problem(tiny.make_model(ARCHITECTURES[row.name]), 2)
    stacked = [one for one in saved if one.form != "hub"]
    split = [one for one in stacked if not rows[one.name].why_not_tensor]
    # Without times that decide what runs the experts: layouts are compared by bits.
    config = EPConfig(warmup=False)
    tensor = Job(split, config=EPConfig(warmup=False, attention="tensor"))
    two, of_tensor, of_packed = _run(
        2, [Job(saved, config=config), tensor, Job(packed, config=config)]
    )
    [three] = _run(3, [Job(stacked, config=config)])
    for one, ranks in two.items():
        rows[one.name].two[one.form] = ranks
    for one, ranks in of_tensor.items():
        rows[one.name].tensor[one.form] = ranks
    for one, ranks in three.items():
        rows[one.name].three[one.form] = ranks
    return list(rows.values()), of_packed


def _run(num_ranks: int, jobs: Sequence[Job]) -> list[dict[Saved, list[Measured]]]:
    """What every rank measured, per job and checkpoint."""
    transport = "mpi" if num_ranks > 2 else "ring"
    ranks = run_ranks(num_ranks, measure, list(jobs), transport=transport, timeout=2400)
    return [
        {
            one: list(measured)
            for one, measured in zip(job.saved, zip(*results, strict=True), strict=True)
        }
        for job, results in zip(jobs, zip(*ranks, strict=True), strict=True)
    ]


def _introduction(saved: Sequence[Saved], rows: Sequence[Row]) -> str:
    ran = [m for row in rows for m in row.replicated]
    logits = [float(np.abs(one.expected).max()) for one in saved]
    assert all(m.collectives == m.layer_calls for m in ran)
    stand_ins = [row.name for row in rows if row.name in STAND_INS]
    return INTRODUCTION.format(
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
        day=date.today().isoformat(),
        num_types=len(rows),
        num_files=len(moe_files() & {model_file(ARCHITECTURES[r.name]) for r in rows}),
        tiers=_tiers(rows),
        stand_ins=STAND_IN.format(name=stand_ins[0]) if stand_ins else "",
        smallest=min(logits),
        largest=max(logits),
        reading=max(m.read_bytes / m.held_bytes for m in ran),
    )


def _tiers(rows: Sequence[Row]) -> str:
    tiers = [_tier(row.two["float32"][0]) for row in rows]
    counts = {tier: tiers.count(tier) for tier in dict.fromkeys(tiers)}
    parts = [
        f"{count} in the tier `{tier}`" if tier else f"{count} cannot run"
        for tier, count in counts.items()
    ]
    return ", ".join(parts)


def _table(rows: Sequence[Row]) -> list[str]:
    heads = [
        "model type", "mlx-lm file", "tier", "TP in mlx-lm", "EP here", "attention",
        "quantizations", "hub layout", "2 ranks", "3 ranks", "2 ranks, tensor",
    ]  # fmt: skip
    lines = [_line(heads), _line(["---"] * 8 + ["---:"] * 3)]
    for row in sorted(rows, key=lambda row: row.name.lower()):
        lines.append(
            _line(
                [
                    f"`{row.name}`",
                    f"`{model_file(ARCHITECTURES[row.name])}.py`",
                    _tier_with_reason(row.two["float32"][0]),
                    "yes" if row.has_shard else "no",
                    _ep_here(row),
                    _attention(row),
                    _quantizations(row),
                    _hub_layout(row),
                    _differences(row.two),
                    _differences(row.three),
                    _differences(row.tensor),
                ]
            )
        )
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _tier(measured: Measured) -> str:
    """The lowest tier of the model's blocks, or "" where it does not run."""
    return measured.tiers[0] if measured.tiers else ""


def _tier_with_reason(measured: Measured) -> str:
    if not measured.reasons:
        return _tier(measured) or "-"
    where = ", in the place of mlx-lm's own sum" if measured.in_block else ""
    return f"{_tier(measured)}{where}: {'; '.join(measured.reasons)}"


def _ep_here(row: Row) -> str:
    if row.error:
        return f"cannot run: {row.error}"
    return "with a stand-in for Metal" if row.name in STAND_INS else "yes"


def _attention(row: Row) -> str:
    if row.why_not_tensor:
        reason = f"; not tensor: {_short(row.why_not_tensor)}" if row.has_shard else ""
        return f"replicated{reason}"
    failed = [
        f"; not tensor in {form}: {_short(ranks[0].error)}"
        for form, ranks in row.tensor.items()
        if ranks[0].error
    ]
    ran = [ranks[0] for ranks in row.tensor.values() if not ranks[0].error]
    if ran and ran[0].tiers != row.two["float32"][0].tiers:
        failed.insert(0, f" (there in the tier {_tier(ran[0])})")
    return "replicated, tensor" + "".join(failed)


def _short(reason: str) -> str:
    """A reason of `tensor_parallel` without what all of them say."""
    own = reason.partition(".py: ")[2].partition(". ")[0] or reason
    return re.sub(r" \([^()]*=[^()]*\)$", "", own)  # less the numbers of heads


def _quantizations(row: Row) -> str:
    if "quantization" in ARCHITECTURES[row.name]:
        return "its own, of config.json"
    return "all of those below" if row.name in quantizations.WIDE else "4-bit"


def _differences(run: dict[str, list[Measured]]) -> str:
    def worst(form: str) -> str:
        ranks = run.get(form, [])
        if not ranks or any(m.error for m in ranks):
            return "-"
        found = max(m.difference for m in ranks)
        return f"{found:.1e}" if found else "0"

    return f"{worst('float32')} / {worst('4-bit')}" if run else "-"


def _hub_layout(row: Row) -> str:
    """The layout's name, and the difference where it is not the same bits."""
    if "hub" not in row.two:
        return "-"
    ranks = row.two["hub"]
    if ranks[0].error:
        return f"{layout_name(row.name)}: {ranks[0].error}"
    if {m.digest for m in ranks} == {m.digest for m in row.two["float32"]}:
        return layout_name(row.name)
    return f"{layout_name(row.name)}, {max(m.difference for m in ranks):.1e}"


def _packed_table(
    names: Sequence[str], results: dict[Saved, list[Measured]]
) -> list[str]:
    cells = {(s.form, s.name): _packed_cell(s, ranks) for s, ranks in results.items()}
    heads = ["quantization", *(f"`{name}`" for name in names)]
    lines = ["", _line(heads), _line(["---"] + ["---:"] * len(names))]
    for form in quantizations.QUANTIZATIONS:
        lines.append(_line([form, *(cells[form, name] for name in names)]))
    return lines


def _packed_cell(one: Saved, ranks: Sequence[Measured]) -> str:
    if errors := [m.error for m in ranks if m.error]:
        return errors[0]
    if not one.is_half:
        return f"{max(m.difference for m in ranks):.1e}"
    ours = max(m.half_error for m in ranks)
    return f"{ours:.1e} / {one.error(one.expected):.1e}"


if __name__ == "__main__":
    main()
