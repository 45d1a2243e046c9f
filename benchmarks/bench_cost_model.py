"""How far is the cost model from what was measured on the same machine?

Takes what ``mlx_ep.benchmark ... --json FILE`` wrote (one file or several, of level
layer or e2e) and the profile that ``mlx_ep.calibrate --output FILE`` measured on the
same ranks, and prints measured against predicted seconds for every point.

    mlx.launch --backend mpi -n 2 -- mlx_ep.calibrate --pin --output profile.json
    mlx.launch --backend mpi -n 2 -- mlx_ep.benchmark layer --pin --json layer.json
    python -m benchmarks.bench_cost_model profile.json layer.json [e2e.json] --check

Target: a mean absolute error of at most 15 %. Points with skewed routing are left out,
as the model knows uniform routing only; the output says how many.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Target, arguments, finish, heading
from mlx_ep.cost.profile import Profile, find_profile
from mlx_ep.cost.shape import ModelShape, layer_from_json, model_from_json
from mlx_ep.cost.step import PREFILL_TOKENS, layer_cost, step_cost
from mlx_ep.metrics import markdown_table

MOST_ERROR = 0.15
Record = Mapping[str, Any]


def read_records(file: Path) -> list[Record]:
    """The records of a benchmark's JSON: a list, or an object with "records".

    Raises:
        ValueError: it holds none.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a benchmark's JSON: {error}.") from error
    records = content.get("records") if isinstance(content, dict) else content
    known = isinstance(records, list) and records
    if not known or not all(r.get("level") in ("layer", "e2e") for r in records):
        raise ValueError(
            f"{file} must hold records of level layer or e2e, as mlx_ep.benchmark "
            "writes them with --json."
        )
    return records


def predicted_seconds(profile: Profile, record: Record) -> float:
    """What the model says of a point."""
    options = {"num_ranks": record["ranks"], "runner": record["runner"]}
    if record["level"] == "layer":
        layer = layer_from_json(record["shape"])
        cost = layer_cost(
            profile, layer, record["arm"], tokens=record["tokens"], **options
        )
        return cost.seconds
    model = model_from_json(record["shape"])
    if record["phase"] == "prefill":
        return _prompts_seconds(profile, model, record, options)
    return step_cost(
        profile,
        model,
        record["arm"],
        tokens=record["tokens"],
        phase="decode",
        context=record["context"],
        **options,
    ).seconds


def _prompts_seconds(
    profile: Profile, model: ModelShape, record: Record, options: Mapping[str, Any]
) -> float:
    """All but the last token of each prompt, then a step of those with logits.

    So mlx-lm's BatchGenerator takes them, whose first tokens the benchmark waits for.
    """
    batch, arm = record["batch"], record["arm"]
    length = record["tokens"] // batch
    total = 0.0
    for first in range(0, length - 1, PREFILL_TOKENS):
        part = min(PREFILL_TOKENS, length - 1 - first)
        total += step_cost(
            profile,
            model,
            arm,
            tokens=batch * part,
            phase="prefill",
            sequences=batch,
            context=first,
            logits=0,
            **options,
        ).seconds
    last = step_cost(
        profile,
        model,
        arm,
        tokens=batch,
        phase="decode",
        context=length - 1,
        **options,
    )
    return total + last.seconds


def compare(profile: Profile, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every point with measured and predicted seconds and the error, relative."""
    points = []
    for record in records:
        measured = record["seconds_median"]
        if not measured:  # a rank without anything to do
            continue
        predicted = predicted_seconds(profile, record)
        points.append(
            {
                "level": record["level"],
                "shape": record["shape"].get("name", ""),
                "arm": record["arm"],
                "runner": record["runner"],
                "phase": record["phase"],
                "batch": record.get("batch", 1),
                "tokens": record["tokens"],
                "context": record.get("context", 0),
                "measured": measured,
                "predicted": predicted,
                "error": predicted / measured - 1,
            }
        )
    return points


def mean_error(points: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(abs(point["error"]) for point in points)


def main() -> int:
    assert __doc__ is not None
    parser = arguments(__doc__, samples=1)
    parser.add_argument(
        "profile", help="a profile's file, or the name of a shipped one"
    )
    parser.add_argument(
        "records", nargs="+", type=Path, help="JSON of mlx_ep.benchmark"
    )
    args = parser.parse_args()
    try:
        profile = find_profile(args.profile)
        records = [record for file in args.records for record in read_records(file)]
    except ValueError as error:
        parser.error(str(error))
    uniform = [record for record in records if not record.get("skew")]
    if not uniform:
        parser.error("All records have skewed routing, which the model does not know.")
    print(heading("The cost model against measurements"))
    print(f"Profile: {profile.name}. {profile.note}\n")
    points = compare(profile, uniform)
    headers = [
        "point", "arm", "runner", "T", "measured ms", "predicted ms", "error",
    ]  # fmt: skip
    rows = [
        [
            f"{p['shape']} {p['level']} {p['phase'] if p['level'] == 'e2e' else ''}",
            p["arm"],
            p["runner"],
            p["tokens"],
            f"{p['measured'] * 1e3:.4g}",
            f"{p['predicted'] * 1e3:.4g}",
            f"{p['error']:+.0%}",
        ]
        for p in points
    ]
    print(markdown_table(headers, rows))
    print(f"\n{len(records) - len(uniform)} points with skewed routing are left out.\n")
    keys = sorted({(p["level"], p["arm"]) for p in points})
    groups = []
    for level, arm in keys:
        own = [p for p in points if (p["level"], p["arm"]) == (level, arm)]
        signed = statistics.fmean(p["error"] for p in own)
        groups.append(
            [f"{level}, {arm}", len(own), f"{mean_error(own):.0%}", f"{signed:+.0%}"]
        )
    print(
        markdown_table(
            ["points", "how many", "mean absolute error", "mean error"], groups
        )
    )
    print()
    error = mean_error(points)
    targets = [
        Target(f"mean absolute error, {level}", mean_error(own), MOST_ERROR)
        for level in ("layer", "e2e")
        if (own := [p for p in points if p["level"] == level])
    ]
    figure = (
        f"cost model: mean absolute error {error:.1%} over {len(points)} points, "
        f"largest {max(abs(p['error']) for p in points):.0%}"
    )
    return finish(args, points, targets, figure)


if __name__ == "__main__":
    sys.exit(main())
