"""What a simulation gives: a line per request, totals, and what happened over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ep import cli
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.requests import ServedRequest

HEADER = (
    "instance id,request id,model,input,output,arrival,end_time,latency,queuing_delay,"
    "TTFT,TPOT,ITL"
)
NS = 1e9


@dataclass(frozen=True)
class Served:
    """One request, ns.

    Attributes:
        instance: that made its last token; `entry`: its first.
        itl: between each token and the one before.
    """

    instance: int
    entry: int
    index: int
    inputs: int
    outputs: int
    arrival: int
    end: int
    queuing: int
    ttft: int
    itl: np.ndarray

    @property
    def latency(self) -> int:
        return self.end - self.arrival

    @property
    def tpot(self) -> int:
        if self.outputs < 2:
            return 0
        return (self.latency - self.ttft) // (self.outputs - 1)


def served(engine: Simulation) -> Iterator[Served]:
    """Every request, in the order in which they ended."""
    for request in sorted(engine.requests, key=_order):
        times = engine.times_of(request)
        assert len(times) == request.outputs and int(times[-1]) == request.end
        yield Served(
            request.instance,
            request.entry,
            request.index,
            request.asked.input_tokens,
            request.outputs,
            request.arrival,
            request.end,
            request.scheduled - request.arrival,
            int(times[0]) - request.arrival,
            np.diff(times),
        )


def _order(request: ServedRequest) -> tuple[int, int]:
    return request.end, request.index


def write_csv(
    file: Path,
    engine: Simulation,
    model: str,
    each: Callable[[Served], object] = lambda one: None,
) -> None:
    """The CSV of LLMServingSim: its header, its order, whole nanoseconds.

    Args:
        each: is given every request as it is written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        cli.whole_file(file) as part,
        part.open("w", encoding="utf-8", newline="") as out,
    ):
        out.write(HEADER + "\n")
        for one in served(engine):
            each(one)
            # on host
            itl = str(one.itl.tolist())
            quoted = f'"{itl}"' if "," in itl else itl
            out.write(
                f"{one.instance},{one.index},{model},{one.inputs},{one.outputs},"
                f"{one.arrival},{one.end},{one.latency},{one.queuing},{one.ttft},"
                f"{one.tpot},{quoted}\n"
            )


@dataclass(frozen=True)
class Spread:
    """Mean, median and 99th percentile, ms."""

    mean: float | int
    median: float | int
    p99: float | int

    @classmethod
    def of(cls, values: Sequence[float | int] | np.ndarray) -> Spread:
        if not len(values):
            return cls(0.0, 0.0, 0.0)
        milliseconds = np.asarray(values, np.float64) / 1e6  # on host
        return cls(
            float(milliseconds.mean()),
            float(np.median(milliseconds)),
            float(np.percentile(milliseconds, 99)),
        )


class Totals:
    """Sums over requests, added one by one."""

    def __init__(self) -> None:
        self._ttft: dict[int, list[int]] = {}
        self._tpot: dict[int, list[int]] = {}
        self._itl: dict[int, list[np.ndarray]] = {}
        self._latency: list[int] = []
        self.inputs = self.outputs = self.end = 0
        self.start: int | None = None

    def add(self, one: Served) -> None:
        self._ttft.setdefault(one.entry, []).append(one.ttft)
        self._tpot.setdefault(one.instance, []).append(one.tpot)
        self._itl.setdefault(one.instance, []).append(one.itl.astype(np.int64))
        self._latency.append(one.latency)
        self.inputs += one.inputs
        self.outputs += one.outputs
        self.end = max(self.end, one.end)
        self.start = one.arrival if self.start is None else min(self.start, one.arrival)

    def content(self, engine: Simulation) -> dict[str, Any]:
        """As JSON has it: times in ms, rates per second of simulated time."""
        seconds = max(self.end / NS, 1e-9)
        latency = Spread.of(self._latency)
        return {
            "requests": len(self._latency),
            "clocks_ns": self.end,
            "latency_ms": vars(latency),
            "prompt_tokens": self.inputs,
            "generated_tokens": self.outputs,
            "request_throughput": len(self._latency) / seconds,
            "prompt_throughput": self.inputs / seconds,
            "generation_throughput": self.outputs / seconds,
            "total_throughput": (self.inputs + self.outputs) / seconds,
            "preemptions": sum(request.preempted for request in engine.requests),
            "instances": [
                {
                    "instance": instance.index,
                    "requests": len(self._tpot.get(instance.index, [])),
                    "ttft_ms": vars(Spread.of(self._ttft.get(instance.index, []))),
                    "tpot_ms": vars(Spread.of(self._tpot.get(instance.index, []))),
                    "itl_ms": vars(Spread.of(self._all_itl(instance.index))),
                    "kv_tokens": instance.pool.num_tokens,
                    "kv_blocks": instance.pool.num_blocks,
                    "weight_bytes": instance.pool.weight_bytes,
                    "pool": instance.pool.describe(instance.index),
                }
                for instance in engine.cluster.instances
            ],
        }

    def _all_itl(self, instance: int) -> np.ndarray:
        found = self._itl.get(instance, [])
        return np.concatenate(found) if found else np.zeros(0)


def totals_text(content: dict[str, Any]) -> str:
    """`Totals.content` for a person."""
    lines = [
        "Totals",
        f"  requests                {content['requests']}",
        f"  total clocks (ns)       {content['clocks_ns']}",
        f"  mean latency (ms)       {content['latency_ms']['mean']:.3f}",
        f"  prompt tokens           {content['prompt_tokens']}",
        f"  generated tokens        {content['generated_tokens']}",
        f"  request throughput      {content['request_throughput']:.3f} req/s",
        f"  prompt throughput       {content['prompt_throughput']:.3f} tok/s",
        f"  generation throughput   {content['generation_throughput']:.3f} tok/s",
        f"  total throughput        {content['total_throughput']:.3f} tok/s",
    ]
    if content["preemptions"]:
        lines.append(f"  preemptions             {content['preemptions']}")
    for instance in content["instances"]:
        lines.append(instance["pool"])
        for key, name in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL")):
            found = instance[key]
            lines.append(
                f"  {name} (ms)  mean {found['mean']:.3f}  median "
                f"{found['median']:.3f}  P99 {found['p99']:.3f}"
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class Moment:
    """What happened in an interval of simulated time, over all instances.

    Attributes:
        end: s.
        step: the number of steps so far.
        prompts, outputs: tokens per second.
        memory: bytes of the fullest device.
        pool: part of the KV blocks in use, of the fullest instance.
    """

    end: float | int
    step: int
    running: int
    waiting: int
    prompts: float | int
    outputs: float | int
    memory: float | int
    pool: float | int

    def line(self) -> str:
        return (
            f"[INFO] step={self.step} batch={self.running} "
            f"prompt_t={self.prompts:.0f} tok/s decode_t={self.outputs:.0f} tok/s "
            f"npu_mem={self.memory / 1e9:.1f} GB"
        )


def moments(engine: Simulation, interval: float | int) -> list[Moment]:
    """Intervals of `interval` seconds in which a step ended."""
    logs = [group.log for group in engine.groups]
    last = max((int(log.ends[-1]) for log in logs if log.count), default=0)
    width = max(round(interval * NS), 1)
    count = last // width + 1
    sums = np.zeros((4, count))  # prompts, outputs, steps, and whether anything ended
    states = np.zeros((4, count))  # running, waiting, memory, pool
    for log in logs:
        own = np.full((4, count), np.nan)
        for stretch in log.stretches:
            ends = log.ends[stretch.step : stretch.step + stretch.steps]
            places, steps = np.unique(ends // width, return_counts=True)
            sums[0, places] += stretch.prompts * steps
            sums[1, places] += stretch.outputs * steps
            sums[2, places] += steps
            own[:, places] = np.array(  # on host
                [stretch.running, stretch.waiting, stretch.memory, stretch.pool]
            )[:, None]
        own = np.nan_to_num(own)
        states[:2] += own[:2]
        states[2:] = np.maximum(states[2:], own[2:])
    steps = np.cumsum(sums[2])
    return [
        Moment(
            (place + 1) * width / NS,
            int(steps[place]),
            int(states[0, place]),
            int(states[1, place]),
            float(sums[0, place] * NS / width),
            float(sums[1, place] * NS / width),
            float(states[2, place]),
            float(states[3, place]),
        )
        for place in np.flatnonzero(sums[2]).tolist()  # on host
    ]
