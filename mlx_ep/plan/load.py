"""Which cluster for a load: ``mlx_ep.plan --simulate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from mlx_ep import cli
from mlx_ep.cost.profile import find_profile
from mlx_ep.loading import find_model, model_shape
from mlx_ep.loading.estimate import ModelOutline
from mlx_ep.metrics import aligned
from mlx_ep.models.tensor_parallel import plan_split
from mlx_ep.placement import Placement, is_record
from mlx_ep.simulate.candidates import (
    Candidate,
    as_json,
    candidates_rows,
    pick,
    simulate_candidates,
)
from mlx_ep.simulate.model import read_model
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.simulate.traces import read_trace


@dataclass(frozen=True)
class Load:
    """Candidates for a load, and the one to take; None: none keeps the limits."""

    candidates: Sequence[Candidate]
    picked: Candidate | None


def check_load_flags(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: a flag is without what it needs.
    """
    if args.simulate is None:
        for name in ("price", "most_ttft", "most_tpot"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with --simulate.")
    elif args.ranks is None or not (args.chip or args.profile):
        raise ValueError(
            "--simulate needs --ranks, the most Macs, and --chip or --profile."
        )
    elif args.memory is not None or args.write_placement:
        raise ValueError(
            "--memory and --write-placement do not go with --simulate: a profile says "
            "what a Mac may hold, and experts are spread evenly."
        )
    elif args.ep_size is not None:
        raise ValueError("--ep does not go with --simulate, which has whole experts.")
    elif args.placement_file is not None and not is_record(args.placement_file):
        raise ValueError(
            "--placement with --simulate must be a record of routing (.npz), as a "
            f"placement is for one number of ranks; got {args.placement_file}."
        )


def make_load(args: argparse.Namespace) -> Load:
    """Every candidate, simulated.

    Raises:
        ValueError: the model, the trace or a profile is not possible.
    """
    if args.chip and args.profile:
        raise ValueError("Give --profile or --chip, not both.")
    trace = read_trace(args.simulate)
    path = find_model(args.model, args.revision, download="ranges")
    sizes = read_model(args.model, path / "config.json")
    outline = ModelOutline.open(path)
    names = [name.strip() for name in (args.chip or args.profile).split(",")]
    profiles = {name: find_profile(name) for name in names}
    prices = _prices(args.price)
    if unknown := sorted(set(prices) - set(profiles)):
        raise ValueError(
            f"--price must name chips of --chip, {', '.join(profiles)}; got "
            f"{unknown[0]!r}."
        )

    def split_problem(devices: int) -> str:
        made = outline.make(Placement.contiguous(sizes.num_experts, devices), 0)
        return plan_split(made, devices).problem

    with tqdm(unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:
        found = simulate_candidates(
            trace,
            sizes,
            model_shape(outline.config, name=args.model),
            profiles,
            args.ranks,
            settings=EngineSettings(
                placement_file=args.placement_file or "",
                replica_memory=args.replica_memory,
            ),
            prices=prices,
            split_problem=split_problem,
            link=args.link,
            progress=bar.update,
        )
    return Load(found, pick(found, args.most_ttft, args.most_tpot))


def _prices(text: str | None) -> dict[str, float]:
    found = {}
    for part in text.split(",") if text else []:
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise ValueError(
                f"--price must be CHIP=NUMBER, as m3-ultra=4000; got {part!r}."
            ) from None
    return found


def load_text(load: Load) -> str:
    """A table, what it is from, and the pick."""
    lines = [
        aligned(candidates_rows(load.candidates), left=(0, 2, 9)),
        "Simulated, not measured: the cost model with these profiles and vLLM's way to "
        "schedule (docs/simulate.md).",
    ]
    taken = load.picked
    if taken is None:
        lines.append("No candidate runs and keeps the limits.")
    else:
        price = "" if taken.price is None else f", {taken.price:.0f}"
        lines.append(f"Pick: {taken.devices} x {taken.chip}, {taken.way}{price}.")
    return "\n".join(lines)


def print_load(load: Load, args: argparse.Namespace) -> None:
    """Print the table; exit code 1 where there is nothing to pick."""
    print(load_text(load), file=cli.beside(args))
    if args.json is not None:
        content = {
            "candidates": [as_json(one) for one in load.candidates],
            "pick": as_json(load.picked),
        }
        cli.write_json(args.json, content)
    if load.picked is None:
        sys.exit(1)
