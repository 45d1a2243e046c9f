"""What runs the experts of a call: the rule without measurements, and the record with.

Pure: numbers in, a choice out, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlx_ep.rows import Backend, Option
from mlx_ep.tune.check import Finding
from mlx_ep.tune.problem import Problem

# Uncalibrated defaults of the specification, not measured here: on a Mac, the CPU runs
# calls of few tokens, the GPU those of many or, in between, of many bytes.
CPU_TOKENS = 64
METAL_TOKENS = 320
METAL_BYTES = 2 << 20
# From how many tokens on `blas` is the faster one on a CPU.
# measured: benchmarks/results/experts_x86-2core_2026-11-21.md
BLAS_TOKENS = 1
# MLX's own ways, which mlx-lm uses: another one has to be predicted to take less than
# this share of their time, or noise at warm-up would make a step slower than mlx-lm's.
MLX_OWN = ("gather", "ops")
CLEARLY_FASTER = 0.95


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


@dataclass(frozen=True)
class Choice:
    """Which option does a problem; the same on every rank.

    Attributes:
        title: the problem, for a person.
        possible: the options that every rank has, that are right on all of them and
            that the configuration allows.
        left_out: the others, with the reason.
        measured: of the first rank that has any; empty unless of all possible.
        wrong: those that are left out because a check failed.
        forced: the configuration or MLX_EP_BACKEND has limited what is possible.
        problem: whose sizes and whose rule hold.
    """

    title: str
    possible: tuple[Option, ...]
    left_out: Mapping[Option, str]
    measured: Mapping[Option, Finding]
    wrong: tuple[Option, ...]
    forced: bool
    problem: Problem = field(repr=False, compare=False)
    _chosen: dict[int, Option] = field(default_factory=dict, repr=False, compare=False)

    def choose(self, num_tokens: int) -> Option:
        """What does a call of so many tokens (or received rows)."""
        if num_tokens not in self._chosen:
            self._chosen[num_tokens] = self._choose(num_tokens)
        return self._chosen[num_tokens]

    def _choose(self, num_tokens: int) -> Option:
        if not self.measured:
            return self.problem.default(num_tokens, self.possible)

        def seconds(option: Option) -> float:
            return self.predicted(option, num_tokens)

        # `min` takes the first of equals, and `possible` has one order on all ranks.
        best = min(self.possible, key=seconds)
        own = [option for option in self.possible if option.runner in MLX_OWN]
        if not own:
            return best
        plain = min(own, key=seconds)
        return best if seconds(best) < CLEARLY_FASTER * seconds(plain) else plain

    def predicted(self, option: Option, num_tokens: int) -> float:
        """Seconds of a call."""
        count, size = self.problem.parts(num_tokens)
        return count * self.measured[option].of_size(size) if count else 0.0

    def crossover(self, option: Option, other: Option) -> int | None:
        """The fewest rows (a power of two up to 4096) from which `option` is faster."""
        faster_from = None
        for rows in (1 << i for i in reversed(range(13))):
            if self.predicted(option, rows) > self.predicted(other, rows):
                break
            faster_from = rows
        return faster_from
