"""What runs the experts of a call: the rule without measurements, and the record with.

Pure: numbers in, a choice out, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlx_ep.comm import Transport
from mlx_ep.config import EPConfig
from mlx_ep.exchange.auto import Auto
from mlx_ep.rows import Backend, Option
from mlx_ep.types import TokenCounts

# Uncalibrated defaults of the specification, not measured here: on a Mac, the CPU runs
# calls of few tokens, the GPU those of many or, in between, of many bytes.
CPU_TOKENS = 64
METAL_TOKENS = 320
METAL_BYTES = 2 << 20
# From how many tokens on `blas` is the faster one on a CPU.
# measured: benchmarks/results/experts_x86-2core_2026-11-21.md
BLAS_TOKENS = 1


def default_backend(num_tokens: int, row_bytes: int) -> Backend:
    """CPU or Metal, where there is Metal, for a call of so many rows of so many bytes.

    >>> [default_backend(tokens, 8192) for tokens in (64, 255, 256, 320)]
    ['cpu', 'cpu', 'metal', 'metal']
    """
    if num_tokens <= CPU_TOKENS:
        return "cpu"
    if num_tokens >= METAL_TOKENS:
        return "metal"
    return "metal" if num_tokens * row_bytes >= METAL_BYTES else "cpu"


def default_option(
    num_tokens: int, row_bytes: int, possible: Sequence[Option]
) -> Option:
    """What runs a call as long as nothing has been measured.

    The kernels of this package are not taken unmeasured, save where nothing else can.
    """
    by_name = {str(option): option for option in possible}
    cpu_first = ["blas on cpu", "gather on cpu"]
    if num_tokens < BLAS_TOKENS:
        cpu_first.reverse()
    order = [*cpu_first, "gather on metal"]
    if default_backend(num_tokens, row_bytes) == "metal":
        order = ["gather on metal", *cpu_first]
    return next((by_name[name] for name in order if name in by_name), possible[0])


def default_movement(
    num_tokens: int, row_bytes: int, possible: Sequence[Option]
) -> Option:
    """What moves the rows of a call as long as nothing has been measured.

    MLX's ops on the backend of `default_backend`, where it is possible; the kernels of
    this package only where nothing else can.
    """
    backend = default_backend(num_tokens, row_bytes)
    ops = [option for option in possible if option.runner == "ops"]
    there = [option for option in ops if option.backend == backend]
    return (there or ops or list(possible))[0]


def default_strategy(
    tokens: TokenCounts, top_k: int, transport: Transport, config: EPConfig
) -> str:
    """The strategy that `auto` takes; the name of its class in `mlx_ep.exchange`."""
    return type(Auto(config).choose(tokens, top_k, transport)).__name__


@dataclass(frozen=True)
class Measured:
    """What an option takes for one slot, by the rows that visit it.

    Attributes:
        rows: rows per slot, ascending.
        seconds: for one slot with so many rows, its share of a call.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def per_slot(self, rows: float | int) -> float:
        """Between measurements and beyond them, on the straight line of the nearest."""
        if len(self.rows) == 1:
            return self.seconds[0] * max(1.0, rows / self.rows[0])
        last = len(self.rows) - 1
        upper = next((i for i in range(1, last) if self.rows[i] >= rows), last)
        (x0, x1), (y0, y1) = (
            v[upper - 1 : upper + 1] for v in (self.rows, self.seconds)
        )
        # Noise must not make more rows cheaper.
        slope = max(0.0, (y1 - y0) / (x1 - x0))
        return max(y0 + slope * (rows - x0), self.seconds[0])


@dataclass(frozen=True)
class ExpertsPolicy:
    """Which option runs the experts of one shape; the same on every rank.

    Attributes:
        name: the shape, for a person.
        num_experts: E, of all ranks.
        num_ranks: P.
        row_bytes: of one row.
        possible: the options that every rank has, and that are right.
        left_out: the others, with the reason.
        measured: times of rank 0; none: nothing was measured.
        forced: chosen by the configuration or MLX_EP_BACKEND.
    """

    name: str
    num_experts: int
    num_ranks: int
    row_bytes: int
    possible: tuple[Option, ...]
    left_out: Mapping[Option, str]
    measured: Mapping[Option, Measured] = field(default_factory=dict)
    forced: bool = False
    _chosen: dict[tuple[int, int], Option] = field(
        default_factory=dict, repr=False, compare=False
    )

    def choose(self, num_rows: int, top_k: int) -> Option:
        """What runs a call of M rows with K choices each."""
        key = (num_rows, top_k)
        if key not in self._chosen:
            self._chosen[key] = self._choose(num_rows, top_k)
        return self._chosen[key]

    def _choose(self, num_rows: int, top_k: int) -> Option:
        if not self.measured:
            return default_option(num_rows, self.row_bytes, self.possible)
        # `min` takes the first of equals, and `possible` has one order on all ranks.
        candidates = [o for o in self.possible if o in self.measured]
        return min(candidates, key=lambda o: self.predicted(o, num_rows, top_k))

    def predicted(self, option: Option, num_rows: int, top_k: int) -> float:
        """Seconds of a call on a rank with E/P experts, all equally often chosen."""
        slots = self.num_experts / self.num_ranks
        share = min(1.0, top_k / self.num_experts)
        visited = slots * (1 - (1 - share) ** num_rows)
        if not visited:
            return 0.0
        rows = num_rows * top_k / self.num_ranks / visited
        return visited * self.measured[option].per_slot(rows)

    def crossover(self, top_k: int, option: Option, other: Option) -> int | None:
        """The fewest rows (a power of two up to 4096) from which `option` is faster."""
        faster_from = None
        for rows in (1 << i for i in reversed(range(13))):
            if self.predicted(option, rows, top_k) > self.predicted(other, rows, top_k):
                break
            faster_from = rows
        return faster_from
