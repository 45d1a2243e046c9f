"""How long things may take before the run ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

VARIABLE = "MLX_EP_LIMITS"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds; `inf` is no limit. They count while the rank runs, not while it pauses.

    MLX_EP_LIMITS changes them for a run: ``MLX_EP_LIMITS=decode=120,loading=3600``.

    Attributes:
        starting: until all ranks are connected, from the start of the first.
        loading: between two signs of progress while weights are fetched and read.
        warmup: for one check of the warm-up, in which kernels are compiled.
        prefill: for one chunk of a prompt; the first compiles kernels.
        decode: for one step.
        batch: for one step of many sequences, which may hold a chunk of a prompt.
        interpreter: without a sign of the Python interpreter, in steps. Something
            holds its lock then; `mx.save` does, while it writes.
        stopped: a rank may be stopped while others run (SIGSTOP, a debugger). Where all
            ranks are (Ctrl-Z), the run waits.
        silence: without a word of a rank's watch: its host or its network is gone. On
            the host of rank 0, where neither can be, at least 60.
    """

    starting: float = 60.0
    loading: float = 600.0
    warmup: float = 300.0
    prefill: float = 300.0
    decode: float = 60.0
    batch: float = 300.0
    interpreter: float = 30.0
    stopped: float = 4.0
    silence: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            least = 1.0 if field.name == "silence" else 0.0
            if not seconds > least:
                raise ValueError(
                    f"the limit {field.name} must be above {least:g} s, got {seconds:g}"
                )

    def of(self, phase: str) -> float:
        """The limit of a phase; none for one without a limit, such as waiting."""
        return getattr(self, phase) if phase in _PHASES else math.inf

    def changed_by(self, environ: Mapping[str, str]) -> Limits:
        """These limits with what MLX_EP_LIMITS says.

        Raises:
            ValueError: it is not name=seconds between commas.
        """
        changes = {}
        for item in environ.get(VARIABLE, "").split(","):
            if not item.strip():
                continue
            name, _, text = item.strip().partition("=")
            try:
                seconds = float(text)
            except ValueError:
                seconds = math.nan
            names = [field.name for field in fields(self)]
            if name not in names or math.isnan(seconds):
                raise ValueError(
                    f"{VARIABLE} must be name=seconds between commas, names out of "
                    f"{', '.join(names)}; got {item.strip()!r}"
                )
            changes[name] = seconds
        return replace(self, **changes)


_PHASES = ("starting", "loading", "warmup", "prefill", "decode", "batch")
