"""Measure what the cost model needs to know of this cluster: ``mlx_ep.calibrate``.

All ranks measure at once, the slowest of them counts, and rank 0 writes the profile:
to the user's cache folder, under a name that tells clusters apart, or to a file.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ep import cli
from mlx_ep.comm import Comm, gather_objects
from mlx_ep.cost.plausible import implausible
from mlx_ep.cost.profile import (
    OWN_BLOCK,
    Profile,
    from_json,
    slowest,
    to_json,
    write_profile,
)
from mlx_ep.cost.profile_store import store_profile
from mlx_ep.cost.profile_table import profile_table
from mlx_ep.cost.records import Link, MatrixCost
from mlx_ep.loading import find_model, memory_limit
from mlx_ep.measure.costs import (
    PACKINGS,
    collective_tables,
    crossing_seconds,
    dense_cost,
    machine_times,
)
from mlx_ep.measure.experts import expert_costs
from mlx_ep.measure.layers import layer_times
from mlx_ep.measure.machine import pin_ranks
from mlx_ep.measure.steps import fixed_times, loop_times
from mlx_ep.measure.timer import Rounds, Timer
from mlx_ep.rows import uses_metal
from mlx_ep.simulate.measure_bundle import write_bundle
from mlx_ep.simulate.model import ModelSizes, read_model
from mlx_ep.tune import share_cores
from mlx_ep.tune.cache import cache_folder
from mlx_ep.tune.timing import Clock

SIZES = (256, 4096, 65536, 1 << 20, 1 << 23)
QUICK_SIZES = (256, 65536)
WIDTH, EXPERT_WIDTH = 2048, 768  # of Qwen3-30B-A3B
QUICK_WIDTHS = (512, 256)
FAST = 0.1  # the quantile that computations are taken to need: of rounds, or samples
ROUNDS = 4  # in which all is timed: a machine can be slow for seconds
# Seconds for rounds: where they are long there are fewer, but no fewer than two.
MOST_SECONDS = 105.0


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="mlx_ep.calibrate",
        description="Measure a hardware profile for the cost model on this machine, or "
        "on the ranks that the launcher started (mlx.launch -n 2 -- mlx_ep.calibrate), "
        "and write it as JSON. Takes less than two minutes.",
    )
    cli.add_ranks_flag(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="Where the profile goes (default: a file for this cluster in the user's "
        "cache folder).",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="Instead of a profile, time the kernels of --model on this machine and "
        "write a bundle of mlx_ep.simulate: DIR/<hardware>/<model>/<dtype>/tp1.",
    )
    parser.add_argument(
        "--model",
        help="With --bundle: a model folder, its config.json, or a hub repository.",
    )
    parser.add_argument(
        "--model-name",
        metavar="NAME",
        help="With --bundle: what cluster files call it (default: as --model, or the "
        "folder's name).",
    )
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help="With --bundle: what cluster files call this machine (default: its chip).",
    )
    parser.add_argument(
        "--packings",
        default=",".join(PACKINGS),
        help="How the measured experts are packed (default: %(default)s; with --quick "
        "affine4).",
    )
    parser.add_argument(
        "--widths",
        metavar="D,F",
        help="Model and expert width of the measured experts: what you predict should "
        f"be near it (default: {WIDTH},{EXPERT_WIDTH}).",
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="Give each rank of a host cores of its own, as mlx_ep.benchmark --pin.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Seconds instead of a minute: small experts, few samples. To try it out: "
        "without --output it goes where no command looks for a profile.",
    )
    return parser


def chosen_packings(text: str, quick: bool) -> list[str]:
    """The names of ``--packings``.

    Raises:
        ValueError: one of them is not known.
    """
    if quick and text == ",".join(PACKINGS):
        return ["affine4"]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PACKINGS:
            raise ValueError(
                f"--packings must be some of {', '.join(PACKINGS)}; got {name!r}."
            )
    return names


def chosen_widths(
    text: str | None, quick: bool, packings: Sequence[str] = ()
) -> tuple[int, int]:
    """D and F of ``--widths``.

    Raises:
        ValueError: they are not two multiples of 256 (a quarter of F is packed too, in
            groups of 64); of 64 where nothing is packed.
    """
    if text is None:
        return QUICK_WIDTHS if quick else (WIDTH, EXPERT_WIDTH)
    parts = [part.strip() for part in text.split(",")]
    unit = 64 if list(packings) == ["plain"] else 256
    numbers = [int(part) for part in parts if part.isdigit()]
    if len(numbers) != 2 or len(parts) != 2 or any(n % unit or not n for n in numbers):
        raise ValueError(
            f"--widths must be two multiples of {unit}, D,F; got {text!r}."
        )
    return numbers[0], numbers[1]


def calibrate(
    comm: Comm,
    packings: Sequence[str],
    widths: tuple[int, int],
    quick: bool = False,
    clock: Clock = time.perf_counter,
    between: Callable[[], object] = lambda: None,
) -> Profile:
    """The profile of this cluster, the same on every rank. Every rank must call it.

    All is timed in `ROUNDS` rounds (see `Rounds`), or as many as `MOST_SECONDS` allow.

    Args:
        packings: names in `PACKINGS`.
        widths: D and F of the measured experts, see `chosen_widths`.
        quick: few and short samples, in one round.
        clock: of the samples, see `Timer`.
        between: called after each round.
    """
    started = time.perf_counter()
    memory = float(memory_limit(None) // share_cores(comm))
    # A call has as many samples in each round as there is time for in its part of it.
    timer = Timer(comm, 0.25 / ROUNDS, most=25 // ROUNDS, least=1, clock=clock)
    if quick:
        timer = Timer(comm, seconds=0.01, longest=0.02, most=5, clock=clock)
    else:
        timer = replace(timer, rounds=Rounds())
    lengths: list[float] = []
    for _ in range(1 if quick else ROUNDS):
        begun = time.perf_counter()
        if timer.rounds is not None:
            timer.rounds.begin()
        mine = _of_this_rank(timer, packings, widths, QUICK_SIZES if quick else SIZES)
        lengths.append(time.perf_counter() - begun)
        between()
        next_ends = sum(lengths) + max(lengths)
        if len(lengths) > 1 and timer.agreed(next_ends > MOST_SECONDS):
            break
    ranks = gather_objects(comm, to_json(replace(mine, memory_bytes=memory)))
    profiles = [from_json(rank) for rank in ranks]
    found = slowest(profiles)
    seconds = time.perf_counter() - started
    note = (
        f"Measured by mlx_ep.calibrate on {comm.size} ranks in {seconds:.0f} s: "
        f"the fast tenth of {'samples' if quick else f'{len(lengths)} rounds'}, of "
        "collectives the "
        f"median; the slowest rank counts; experts of {widths[0]} x {widths[1]}"
        f"{', --quick: do not rely on it' if quick else ''}."
    )
    return measured(replace(found, note=note))


def _of_this_rank(
    timer: Timer, packings: Sequence[str], widths: tuple[int, int], sizes: Sequence[int]
) -> Profile:
    """One round, and what is known behind it; memory is not looked at.

    Args:
        sizes: bytes of the collectives.
    """
    comm = timer.comm
    of_links = timer  # collectives vary by themselves: their medians count
    timer = replace(timer, quantile=FAST)
    dtype = mx.bfloat16 if uses_metal() else mx.float32
    experts: dict[str, MatrixCost] = {}
    dense: dict[str, MatrixCost] = {}
    for name in packings:
        experts |= expert_costs(timer, *widths, PACKINGS[name], dtype)
        if name != "plain":
            key, cost = dense_cost(timer, widths[0], PACKINGS[name], dtype)
            dense[key] = cost
    # What routers and norms are.
    plain, cost = dense_cost(timer, widths[0], PACKINGS["plain"], dtype)
    dense[plain] = cost
    values = machine_times(timer) | layer_times(timer, widths[0], dtype)
    # A timed call waits for the device, that of a block in a model does not.
    own = [c for key, c in experts.items() if key.startswith(f"{OWN_BLOCK}|")]
    call = max(cost.call_seconds for cost in own) - values["sync_seconds"]
    per_weight = dense[plain].seconds[0]
    values |= fixed_times(timer, dtype, per_weight, max(0.0, call))
    values |= loop_times(timer, dtype) | rates(experts, dense)
    return Profile(
        name=f"{comm.size} x {chip()}, {comm.transport}",
        links=links(of_links, sizes),
        experts=experts,
        dense=dense,
        memory_bytes=1.0,
        **values,  # type: ignore[arg-type]
    )


def measured(profile: Profile) -> Profile:
    """The profile with the same source for every number."""
    content = to_json(profile)

    def mark(part: Any) -> None:
        if isinstance(part, dict) and "value" in part:
            part["source"] = "measured by mlx_ep.calibrate"
        elif isinstance(part, dict):
            for inner in part.values():
                mark(inner)

    mark(content)
    return from_json(content)


def rates(
    experts: Mapping[str, MatrixCost], dense: Mapping[str, MatrixCost]
) -> dict[str, float]:
    """The limits that hold where a packing was not measured: the best that was."""

    def best(costs: Mapping[str, MatrixCost], few: bool) -> float:
        at = 0 if few else -1
        return max(2 * c.rows[at] / max(c.seconds[at], 1e-15) for c in costs.values())

    gathered = {k: c for k, c in experts.items() if k.startswith("gather|")} or experts
    return {
        "matmul_rate": best(dense, few=False),
        "expert_rate": best(experts, few=False),
        "unsorted_rate": best(gathered, few=True),
    }


def links(timer: Timer, sizes: Sequence[int]) -> dict[str, Link]:
    """The link of this cluster, by the name of its transport; none for one rank."""
    comm = timer.comm
    if comm.size == 1:
        return {}
    tables = collective_tables(timer, sizes)
    summed = tables["all_reduce"]
    is_ring = comm.transport in ("ring", "jaccl-ring")
    others = comm.size - 1
    volume = 2 * others / comm.size if is_ring else 1.0
    steps = 2 * others if is_ring else 1
    rise = max(1e-9, summed.seconds[-1] - summed.seconds[0])
    return {
        comm.transport: Link(
            transport=comm.transport,
            topology="ring" if is_ring else "mesh",
            latency=summed.seconds[0] / steps,
            bandwidth=volume * (summed.bytes[-1] - summed.bytes[0]) / rise,
            crossing_seconds=crossing_seconds(timer, summed.seconds[0]),
            tables=tables,
        )
    }


def chip() -> str:
    """What this rank computes with."""
    return str(mx.device_info().get("device_name", platform.machine()))


def _bundle_model(args: argparse.Namespace, comm: Comm) -> ModelSizes | None:
    """The model of ``--bundle``; None: a profile is asked for.

    Raises:
        ValueError: flags do not go together, or the model is not known.
    """
    if args.bundle is None:
        for name in ("model", "model_name", "hardware"):
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} goes with --bundle.")
        return None
    if args.model is None or comm.size > 1 or args.output is not None:
        raise ValueError(
            "--bundle needs --model and one rank, and goes without --output; got "
            f"--model {args.model}, {comm.size} ranks and --output {args.output}."
        )
    if args.bundle.is_file():
        raise ValueError(f"--bundle must be a folder; {args.bundle} is a file.")
    path = find_model(args.model, None, download="ranges")
    folder = Path(args.model).expanduser()
    name = args.model_name or (folder.name if folder.exists() else args.model)
    sizes = read_model(name, path / "config.json")
    if sizes.latents:
        raise ValueError(
            "--bundle needs a model with grouped-query attention: a bundle has no "
            f"kernels of latents, which {name} has. Measure a profile."
        )
    return sizes


def main() -> None:
    def body(args: argparse.Namespace, comm: Comm) -> None:
        with cli.usage_errors():
            packings = chosen_packings(args.packings, args.quick)
            widths = chosen_widths(args.widths, args.quick, packings)
            if (file := args.output) is not None:
                cli.on_rank_0(
                    lambda: cli.check_output("--output", file), comm, "--output"
                )
            sizes = _bundle_model(args, comm)
            if args.pin:
                pin_ranks(comm)
        if sizes is not None:
            timer = Timer(comm, seconds=0.05, longest=0.2, most=9)
            if args.quick:
                timer = Timer(comm, seconds=0.01, longest=0.02, most=3)
            dtype = "bfloat16" if uses_metal() else "float32"
            hardware = args.hardware or "-".join(chip().split())
            made = write_bundle(args.bundle, timer, sizes, dtype, hardware, args.quick)
            print(f"written to {made}", flush=True)
            return
        profile = calibrate(comm, packings, widths, args.quick)
        chips = gather_objects(comm, chip())
        if comm.rank == 0:
            file = args.output
            if file is None:
                file = store_profile(
                    profile, cache_folder(), comm.transport, chips, quick=args.quick
                )
            else:
                with cli.whole_file(file) as part:
                    write_profile(profile, part)
            print(profile_table(profile))
            for line in implausible(profile):
                print(f"IMPLAUSIBLE: {line}")
            print(f"\n{profile.note}\nwritten to {file}", flush=True)

    cli.run(make_parser(), body)


if __name__ == "__main__":
    main()
