"""Planning, packing and summing rows, as a `Problem` for each job.

With the width, dtype, K and placement of a layer and a few numbers of tokens, as one
rank does it between others; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import mlx.core as mx
import numpy as np

from mlx_ep.kernels import RowFormat, format_words
from mlx_ep.placement import Placement
from mlx_ep.rows import (
    MOVEMENTS,
    Job,
    Movement,
    Option,
    movement_options,
    row_format,
)
from mlx_ep.tune.choose import default_movement
from mlx_ep.tune.problem import Solver
from mlx_ep.types import DispatchDtype, TokenCounts, dtype_name, to_host

TOKENS = (1, 64, 512)
MAX_BYTES = 256 << 20  # of the rows of a case: with wide rows there are fewer tokens

JOB_TITLES: dict[Job, str] = {
    "rows": "an all-to-all's rows: plan, pack, sum",
    "ranks": "sums of all ranks",
    "pairs": "sums of this rank's pairs (runner gather)",
    "format": "rows in 8 bits a value and back",
}

Run = Callable[[Movement], list[mx.array]]
Expected = list[np.ndarray]


@dataclass(frozen=True)
class MovementShape:
    """The rows of some layers, and who needs them.

    Attributes:
        width: D.
        dtype: of the rows.
        top_k: K.
        placement: of the experts.
        rank: this one.
        exchanges: whether rows are packed and added for other ranks.
        dispatch_dtype: what rows travel in.
    """

    width: int
    dtype: mx.Dtype
    top_k: int
    placement: Placement
    rank: int
    exchanges: bool
    dispatch_dtype: DispatchDtype = "model"

    @property
    def format(self) -> RowFormat | None:
        """That rows are brought into, where they travel in 8 bits a value."""
        has_others = self.placement.num_ranks > 1
        return row_format(self.dispatch_dtype) if has_others else None

    @property
    def jobs(self) -> tuple[Job, ...]:
        """What a movement can be asked for."""
        needed = {"pairs": True, "rows": self.exchanges, "ranks": self.exchanges}
        needed["format"] = self.format is not None
        return tuple(job for job in get_args(Job) if needed[job])

    @property
    def narrowest(self) -> int:
        """The fewest numbers in a row of anything that is moved."""
        words = [format_words(self.width)] * (self.format is not None)
        return min([self.width, *words])

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.size

    @property
    def name(self) -> str:
        """For a person."""
        ranks = f", {self.placement.num_ranks} ranks" if self.exchanges else ""
        return f"{self.width} {dtype_name(self.dtype)}, top {self.top_k}{ranks}"


@dataclass(frozen=True)
class MovementProblem:
    """A `Problem`: one job of moving rows. A call is one part, of its tokens.

    Attributes:
        shape: of the rows.
        job: what is done with them.
    """

    shape: MovementShape
    job: Job
    unit: str = "token"
    part: str = "call"
    runner: str = "auto"
    # Of the largest number: float32 sums of few terms. Copies and plans are exact.
    tolerance: float = 1e-5
    case_parts: int = 1
    is_held: bool = True

    @property
    def title(self) -> str:
        return f"Movement of {self.shape.name}; {JOB_TITLES[self.job]}"

    @property
    def task(self) -> str:
        return f"move the rows of {self.shape.name}"

    @property
    def key(self) -> Mapping[str, Any]:
        return {
            "movement": self.shape.name,
            "job": self.job,
            "experts": self.shape.placement.num_experts,
            "placement": self.shape.placement.digest,
            "rank": self.shape.rank,
        } | ({"form": self.shape.format} if self.job == "format" else {})

    def options(self) -> Mapping[Option, str]:
        """See `Problem`."""
        return movement_options(self.shape.narrowest, self.shape.placement)

    def is_worth_checking(self, possible: Sequence[Option]) -> bool:
        """Not where there is no choice, as without Metal."""
        return len(possible) > 1

    def reference(self) -> Mapping[int, list[np.ndarray]]:
        """By tokens."""
        return {size: expected for size, (_, expected) in self._cases.items()}

    def solver(self, option: Option) -> Solver:
        """See `Problem`."""
        movement = MOVEMENTS[option.runner]()
        return lambda size: self._cases[size][0](movement)

    def case_calls(self, size: int) -> int:
        """See `Problem`."""
        return 1

    def parts(self, num_tokens: int) -> tuple[float, float]:
        """See `Problem`."""
        return 1.0, float(num_tokens)

    def default(self, num_tokens: int, possible: Sequence[Option]) -> Option:
        """See `default_movement`."""
        return default_movement(num_tokens, self.shape.row_bytes, possible)

    @cached_property
    def _cases(self) -> dict[int, tuple[Run, Expected]]:
        shape = self.shape
        most = max(shape.placement.num_ranks, shape.top_k) * 4 * shape.width
        sizes = [size for size in TOKENS if size * most <= MAX_BYTES] or TOKENS[:1]
        return {size: _CASES[self.job](shape, size) for size in sizes}


def _rows(shape: MovementShape, most: int) -> tuple[Run, Expected]:
    """One all-to-all: its plan, the packed rows, and the sums with what comes back."""
    placement, rank = shape.placement, shape.rank
    num_ranks = placement.num_ranks
    # Odd ranks have a token less: padding must not travel.
    tokens = TokenCounts(tuple(most - r % 2 for r in range(num_ranks)))
    ids = np.full((num_ranks, most, shape.top_k), -1, np.int32)
    for home, count in enumerate(tokens.per_rank):
        ids[home, :count] = _choices(shape, count, seed=home)
    if most > 1:
        ids[:, 0, -1] = -1  # a choice of no expert
    visits = [np.isin(ids, held).any(axis=2) for held in placement.rank_experts]
    needed = np.stack(visits, axis=2)  # [home, token, rank]
    leaving, arriving = needed[rank].copy(), needed[:, :, rank].copy()
    leaving[:, rank], arriving[rank] = False, False
    num_sent, num_tokens = int(leaving.sum()), tokens.per_rank[rank]
    x = _normal((num_tokens, shape.width), 1).astype(shape.dtype)
    own = _normal((num_tokens, shape.width), 2)
    back = _normal((num_sent, shape.width), 3).astype(shape.dtype)
    everyone = mx.array(ids.reshape(-1, shape.top_k))
    # sync: what is timed must not include making its arguments.
    mx.eval(x, own, back)

    def run(movement: Movement) -> list[mx.array]:
        plan = movement.plan_rows(everyone, placement, rank, tokens)
        counts = mx.array([*plan.send_counts, *plan.recv_counts])
        packed = movement.pack(x, plan, num_sent)
        return [counts, plan.arriving, packed, movement.add_rows(own, back, plan, rank)]

    by_rank = np.argwhere(leaving.T)  # (rank, token), rank-major
    # sync: at warm-up.
    host_x, sums = to_host(x.astype(mx.float32)), to_host(own)
    np.add.at(sums, by_rank[:, 1], to_host(back.astype(mx.float32)))
    counts = np.concatenate([leaving.sum(axis=0), arriving.sum(axis=1)])
    lines = np.flatnonzero(arriving.reshape(-1))
    return run, [counts, lines, host_x[by_rank[:, 1]], sums]


def _ranks(shape: MovementShape, num_tokens: int) -> tuple[Run, Expected]:
    """Sums of all ranks for every token."""
    num_ranks, rank = shape.placement.num_ranks, shape.rank
    partial = _normal((num_ranks * num_tokens, shape.width), 4)
    chunks = 1 if num_ranks == 2 else num_ranks
    back = _normal((chunks * num_tokens, shape.width), 5).astype(shape.dtype)
    # sync: what is timed must not include making its arguments.
    mx.eval(partial, back)
    # sync: at warm-up.
    by_rank = to_host(back.astype(mx.float32)).reshape(chunks, num_tokens, -1)
    if num_ranks != 2:
        by_rank = np.delete(by_rank, rank, axis=0)  # it did not travel
    # sync: at warm-up.
    own = to_host(partial).reshape(num_ranks, num_tokens, -1)[rank]

    def run(movement: Movement) -> list[mx.array]:
        return [movement.add_ranks(partial, back, rank, num_ranks)]

    return run, [own + by_rank.sum(axis=0)]


def _pairs(shape: MovementShape, num_tokens: int) -> tuple[Run, Expected]:
    """Sums of the outputs of a rank's pairs, of which each token has K or fewer."""
    random = np.random.default_rng(num_tokens)
    ids = random.permutation(num_tokens * shape.top_k).astype(np.int32)
    ids = ids.reshape(num_tokens, shape.top_k)
    foreign = random.random(ids.shape) < 0.25
    gates = np.where(foreign, 0.0, random.random(ids.shape)).astype(np.float32)
    outputs = _normal((ids.size, shape.width), 6).astype(shape.dtype)
    pair_ids, pair_gates = mx.array(np.where(foreign, -1, ids)), mx.array(gates)
    # sync: what is timed must not include making its arguments.
    mx.eval(outputs)

    def run(movement: Movement) -> list[mx.array]:
        return [movement.sum_pairs(outputs, pair_ids, pair_gates)]

    # sync: at warm-up.
    values = to_host(outputs.astype(mx.float32))
    sums = np.zeros((num_tokens, shape.width), np.float32)
    for choice in range(shape.top_k):
        sums += gates[:, choice, None] * values[ids[:, choice]]
    return run, [sums]


def _format(shape: MovementShape, num_tokens: int) -> tuple[Run, Expected]:
    """Rows in 8 bits a value and back, of numbers that are near one of its own.

    A fifth of the way to the next one at most: a GPU that divides with another last bit
    comes to the same.
    """
    form = shape.format
    assert form is not None
    if form == "int8":
        group, numbers = 128, np.arange(128.0)
    else:
        codes = mx.arange(127).astype(mx.uint8)
        # sync: at warm-up.
        group, numbers = 32, to_host(mx.from_fp8(codes, mx.float32)).astype(float)
    random = np.random.default_rng(num_tokens)
    size = num_tokens, -(-shape.width // group), group
    chosen = random.integers(len(numbers) - 1, size=size)
    below = numbers[chosen] - numbers[np.maximum(chosen - 1, 0)]
    steps = np.where(below > 0, below, numbers[1])
    near = numbers[chosen] + random.uniform(-0.2, 0.2, size) * steps
    expected = numbers[chosen]
    # Each group's largest number gives it the scale that keeps these numbers.
    expected[..., 0] = near[..., 0] = numbers[-1]
    scales = (
        random.choice([-1.0, 1.0], size)
        * 2.0 ** random.integers(-3, 3, size[:2])[..., None]
    )
    rows, values = (
        (a * scales).reshape(num_tokens, -1)[:, : shape.width].astype(np.float32)
        for a in (expected, near)
    )
    x = mx.array(values).astype(shape.dtype)
    # sync: what is timed must not include making its arguments.
    mx.eval(x)

    def run(movement: Movement) -> list[mx.array]:
        words = movement.to_format(x, form)
        return [movement.from_format(words, form, shape.width, shape.dtype)]

    return run, [rows]


_CASES: dict[Job, Callable[[MovementShape, int], tuple[Run, Expected]]] = {
    "rows": _rows,
    "ranks": _ranks,
    "pairs": _pairs,
    "format": _format,
}


def _choices(shape: MovementShape, num_tokens: int, seed: int) -> np.ndarray:
    """K distinct experts a token, or all of them where there are fewer."""
    num_experts = shape.placement.num_experts
    order = np.random.default_rng(seed).random((num_tokens, num_experts)).argsort()
    ids = np.full((num_tokens, shape.top_k), -1, np.int32)
    chosen = order[:, : shape.top_k]
    ids[:, : chosen.shape[1]] = chosen
    return ids


def _normal(shape: tuple[int, ...], seed: int) -> mx.array:
    # With a key: the model's own random state stays as it is.
    return mx.random.normal(shape, key=mx.random.key(seed))
