"""Writes docs/oracle.md: mlx_ep on two ranks against transformers.

    python -m tools.oracle_table [--only mixtral,gpt_oss] [--output FILE]

in a Python with what `make test-oracle` installs. The checkpoints and the comparison
are those of tests/oracle.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tests.support.oracle.checkpoints import ARCHITECTURES, NUM_TOKENS
from tests.support.oracle.compare import NOTES, NUM_RANKS, TOLERANCE, Row, compare_all

TABLE = Path(__file__).resolve().parents[1] / "docs" / "oracle.md"

INTRODUCTION = """\
# Against transformers

mlx-lm and this package are compared with each other in [models.md](models.md). Here
both are compared with a third implementation, Hugging Face transformers {transformers}
on PyTorch {torch}.

For each architecture transformers writes a tiny random checkpoint in its own tensor
names and layout, and gives the logits of {tokens} tokens in float32 (plain attention,
plain experts, no cache). {ranks} ranks load it with `mlx_ep.load`, each its own
experts, and run the same tokens. The largest difference of a logit must be at most
{tolerance:g} of the largest logit, which is between {least:.1f} and {most:.1f} here.
{compared} of the {all} configurations are compared; {differ} is the largest difference.

- **mlx_ep**: {ranks} ranks to transformers. **mlx-lm**: one process of mlx-lm to
  transformers. **between**: {ranks} ranks to mlx-lm. So what is mlx-lm's own and what
  is ours can be told apart.
- **made alike**: where mlx-lm and transformers differ in more than rounding, what was
  made the same before comparing. None of these differences is this package's.
- The configurations are those of `tests/support/architectures.json`, and what
  `tests/support/oracle/checkpoints.py` adds. There, too, is where the layout that
  transformers saves is not the one of the hub's checkpoints (`_REWRITTEN`): it is
  rewritten.
- All parameters are random, the routers and their biases too (but for the table's).

## How this was made

By `python -m tools.oracle_table` on {date}, on x86 Linux: MLX {mlx} with its CPU
backend, mlx-lm {mlx_lm}, ranks over the ring transport, attention replicated.
`make test-oracle` repeats it; PyTorch is needed for nothing else.

What it does not show: decoding with a cache (compared with mlx-lm in
[models.md](models.md)), quantized checkpoints but for gpt_oss (mxfp4), real ones.

## The table

| model type | mlx_ep | mlx-lm | between | made alike |
| --- | ---: | ---: | ---: | --- |"""

NOT_COMPARED = """
## Not compared

| model type | why |
| --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="some architectures, for trying it out")
    parser.add_argument("--output", type=Path, default=TABLE)
    arguments = parser.parse_args()
    names = tuple(arguments.only.split(",") if arguments.only else ARCHITECTURES)
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        rows = sorted(compare_all(Path(folder), names), key=lambda row: row.name)
    compared = [row for row in rows if not row.problem]
    lines = [_introduction(rows, compared)]
    lines += [
        f"| `{row.name}` | {row.mlx_ep:.1e} | {row.mlx_lm:.1e} | {row.between:.1e} | "
        f"{NOTES.get(row.name, '')} |"
        for row in compared
    ]
    lines.append(NOT_COMPARED)
    lines += [
        f"| `{row.name}` | {row.problem.removeprefix('LookupError: ')} |"
        for row in rows
        if row.problem
    ]
    arguments.output.write_text("\n".join(lines) + "\n")


def _introduction(rows: list[Row], compared: list[Row]) -> str:
    return INTRODUCTION.format(
        transformers=version("transformers"),
        torch=version("torch").partition("+")[0],
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
        date=date.today(),
        tokens=NUM_TOKENS,
        ranks=NUM_RANKS,
        tolerance=TOLERANCE,
        least=min(row.scale for row in compared),
        most=max(row.scale for row in compared),
        compared=len(compared),
        all=len(rows),
        differ=f"{max(row.mlx_ep for row in compared):.1e}",
    )


if __name__ == "__main__":
    main()
