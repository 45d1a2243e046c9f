"""One launch: inputs and grid -> outputs, findings, and bytes moved per buffer."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import build
from .lines import source_line
from .translate import check_rules, translate


@dataclass(frozen=True)
class Traffic:
    """Bytes of one device buffer that a launch moved.

    Attributes:
        size: bytes of the buffer.
        read: bytes read; a byte read twice counts twice.
        distinct: bytes read at least once.
        written: bytes written.
        unwritten: bytes of an output that nothing wrote (and no init_value set).
    """

    size: int
    read: int
    distinct: int
    written: int
    unwritten: int


@dataclass(frozen=True)
class Finding:
    """Something wrong with a kernel: the kind, what, and where in its source."""

    kind: str
    message: str
    line: str
    thread: str


@dataclass
class Launch:
    """What a launch did.

    Attributes:
        name: the kernel function.
        source: its text, as MLX generates it.
        outputs: the output arrays; empty where the run was stopped.
        findings: what the checks found; empty for a correct kernel.
        traffic: by buffer name.
        statistics: counts of barriers and SIMD-group operations,
            ``threadgroup_bytes``, and ``divergent_simd_operations`` where there were
            any.
        warnings: the compiler's.
    """

    name: str
    source: str
    outputs: list[mx.array] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    statistics: dict[str, int] = field(default_factory=dict)
    warnings: str = ""


class KernelError(AssertionError):
    """The checks found something; `launch` holds it."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        lines = [
            f"{f.kind}: {f.message}  [{f.line}, thread {f.thread}]"
            for f in launch.findings
        ]
        super().__init__(f"{launch.name}\n" + "\n".join(lines))


def execute(
    function: str,
    source: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[Sequence[int], mx.Dtype]],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    *,
    init_value: float | None = None,
    seed: int = 0,
    timeout: int = 60,
) -> Launch:
    """Compiles and runs a kernel.

    Args:
        function: the kernel function's name.
        source: its text, as MLX generates it.
        inputs: by parameter name.
        outputs: shapes and dtypes by parameter name.
        grid: threads per axis.
        threadgroup: threads per group and axis.
        init_value: what the outputs hold before; None for nothing.
        seed: order of threads and groups; 0 ascending, 1 descending, else shuffled.
        timeout: seconds until the kernel counts as endless.

    Raises:
        KernelError: the checks found something.
        CompileError: the source is not accepted.
        ValueError: grid or threadgroup is not a legal size.
    """
    if min(*grid, *threadgroup) < 1 or np.prod(threadgroup) > 1024:
        raise ValueError(
            "A grid needs at least 1 thread per axis and a threadgroup 1 to 1024 "
            f"threads; got grid {tuple(grid)}, threadgroup {tuple(threadgroup)}."
        )
    check_rules(source)
    text, names = translate(function, source)
    module, warnings = build.kernel(function[:60], text)
    buffers, data = _buffers(names, inputs, outputs, init_value)
    job = [
        f"so {module}",
        "grid {} {} {}".format(*grid),
        "threadgroup {} {} {}".format(*threadgroup),
        f"seed {seed}",
        f"timeout {timeout}",
        f"buffers {len(buffers)}",
        *buffers,
    ]
    with tempfile.TemporaryDirectory(prefix="mslhost-") as folder:
        paths = [Path(folder) / name for name in ("job", "inputs", "outputs")]
        paths[0].write_text("\n".join(job) + "\n")
        paths[1].write_bytes(data)
        command = [str(build.runner()), *map(str, paths)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout + 30
        )
        produced = paths[2].read_bytes() if paths[2].exists() else b""
    launch = Launch(function, source, warnings=warnings)
    _read_report(launch, done.stdout, module)
    if done.returncode not in (0, 2, 3):
        what = f"exit {done.returncode}: {done.stdout[-300:]} {done.stderr[-500:]}"
        launch.findings.append(Finding("runner", what, "", ""))
    if launch.findings:
        raise KernelError(launch)
    launch.outputs = _arrays(produced, outputs)
    return launch


def as_bytes(array: mx.array) -> bytes:
    """The row-contiguous bytes of an array of any dtype."""
    if array.size == 0:
        return b""
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def _buffers(
    names: Sequence[str],
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[Sequence[int], mx.Dtype]],
    init_value: float | None,
) -> tuple[list[str], bytes]:
    """The job's buffer lines and the bytes that go with them."""
    lines, data = [], []
    for name in names:
        if name in inputs:
            kind, size, content = "in", inputs[name].dtype.size, as_bytes(inputs[name])
        elif name in outputs:
            shape, dtype = outputs[name]
            kind, size = "out", dtype.size
            content = bytes(int(np.prod(shape)) * size)
            if init_value is not None:
                kind = "outinit"
                content = as_bytes(mx.full(tuple(shape), init_value, dtype=dtype))
        else:  # <input>_shape, <input>_strides or <input>_ndim
            base, what = name.rsplit("_", 1)
            array = inputs[base]
            strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
            values = {"shape": array.shape, "strides": strides, "ndim": array.ndim}
            of = np.array(values[what], np.int64 if what == "strides" else np.int32)
            kind, size, content = "in", of.itemsize, of.tobytes()
        lines.append(f"buffer {name} {kind} {size} {len(content)}")
        if kind != "out":
            data.append(content)
    return lines, b"".join(data)


def _arrays(
    data: bytes, outputs: dict[str, tuple[Sequence[int], mx.Dtype]]
) -> list[mx.array]:
    arrays, offset = [], 0
    for shape, dtype in outputs.values():
        count = int(np.prod(shape)) * dtype.size
        raw = mx.array(np.frombuffer(data, np.uint8, count, offset))
        arrays.append(raw.view(dtype).reshape(tuple(shape)))
        offset += count
    return arrays


def _read_report(launch: Launch, report: str, module: Path) -> None:
    for line in report.splitlines():
        kind, *fields = line.split("|")
        values = dict(item.split("=", 1) for item in fields if "=" in item)
        if kind == "STAT":
            launch.statistics.update({k: int(v) for k, v in values.items()})
        elif kind == "BUFFER":
            name = values.pop("name")
            launch.traffic[name] = Traffic(**{k: int(v) for k, v in values.items()})
        elif kind == "FINDING":
            launch.findings.append(_finding(values, module))


def _finding(values: dict[str, str], module: Path) -> Finding:
    def line_of(hexadecimal: str) -> str:
        address = int(hexadecimal, 16)
        return source_line(module, address) if address else ""

    message = re.sub(
        r"other pc ([0-9a-f]+)", lambda m: f"at {line_of(m[1])}", values["msg"]
    )
    where = line_of(values["pc"])
    return Finding(values["kind"], message, where, values.get("thread", ""))
