"""What `mlx_ep.doctor` checks on a machine: kernels, experts, collectives.

Each check compares with something that is computed in another way, and takes the time
of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.comm import Comm
from mlx_ep.kernels import Projection, metal, ops
from mlx_ep.tune import TOLERANCE, ExpertsProblem, Layer, in_turn, measure
from mlx_ep.types import to_host

REPEATS = 5
# Of the largest number. Sums are float32; results of 16 bits are rounded once.
SUM_TOLERANCE = 1e-4
ROUNDING = {mx.float32: 1e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison.

    Attributes:
        what: what was checked, with its shape.
        error: the largest difference, relative to the largest number; NaN: it failed.
        tolerance: the largest that is right.
        seconds: of what was checked.
        plain_seconds: of what it was compared with; None: that says nothing.
        num_bytes: that moved, where a rate is of interest.
        why: what went wrong, where it failed.
        is_ours: whether it is this package that is right or wrong, not MLX.
    """

    what: str
    error: float
    tolerance: float
    seconds: float = 0.0
    plain_seconds: float | None = None
    num_bytes: int = 0
    why: str = ""
    is_ours: bool = True

    @property
    def is_right(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class CheckedLayer:
    """The layer that kernels are checked with; Qwen3-30B-A3B by default.

    Attributes:
        slots: L, few: what counts is how many a token visits.
    """

    width: int = 2048
    expert_width: int = 768
    slots: int = 16
    top_k: int = 8
    tokens: tuple[int, ...] = (1, 8)


# ---------------------------------------------------------------- kernels


def check_kernels(sizes: CheckedLayer = CheckedLayer()) -> Iterator[Check]:
    """Every kernel against its twin in mx ops, on this machine's GPU."""
    for num_tokens in sizes.tokens:
        ids = _slot_ids(num_tokens, sizes)
        yield from _check_plan(ids, sizes)
        for dtype in (mx.bfloat16, mx.float16):
            yield from _check_movement(ids, sizes, dtype)
        for packing in ("bfloat16", "affine 4 bit", "affine 8 bit", "mxfp4"):
            yield from _check_experts(ids, sizes, packing)


def _slot_ids(num_tokens: int, sizes: CheckedLayer) -> mx.array:
    """Distinct slots for every token; its last choice lives elsewhere."""
    random = np.random.default_rng(num_tokens)
    order = np.argsort(random.random((num_tokens, sizes.slots)), axis=1)
    ids = order[:, : sizes.top_k].astype(np.int32)
    ids[:, -1] = -1
    return mx.array(ids)


def _check_plan(ids: mx.array, sizes: CheckedLayer) -> Iterator[Check]:
    slots = mx.arange(sizes.slots, dtype=mx.int32)[:, None]
    # A second replica of each expert, on the other rank.
    experts = mx.concatenate([slots, (slots + sizes.slots // 2) % sizes.slots], axis=1)
    ranks = experts // -(-sizes.slots // 2)

    def run(module: ModuleType) -> list[mx.array]:
        slots = sizes.slots
        return [*module.route_plan(ids, ranks, experts, num_ranks=2, num_slots=slots)]

    yield _compare(f"route_plan {tuple(ids.shape)}", run, 0.0)


def _check_movement(
    ids: mx.array, sizes: CheckedLayer, dtype: mx.Dtype
) -> Iterator[Check]:
    num_tokens, top_k = ids.shape
    key = mx.random.key(1)
    x = mx.random.normal((num_tokens, sizes.width), key=key).astype(dtype)
    order = mx.argsort(mx.random.uniform(shape=(num_tokens,), key=key))
    rows = order.astype(mx.int32)
    count = mx.array([num_tokens], mx.int32)
    shape = f"{tuple(x.shape)} {_name(dtype)}"
    yield _compare(f"pack_rows {shape}", lambda m: [m.pack_rows(x, rows, count)], 0.0)
    own = mx.where(ids >= 0, ids % num_tokens, -1)
    gates = mx.random.uniform(shape=ids.shape, key=key)
    yield _compare(
        f"unpack_sum {shape} x{top_k}",
        lambda m: [m.unpack_sum(x, own, gates)],
        ROUNDING[dtype],
    )
    # As an exchange adds what came back to what stayed: every other choice is local.
    both = mx.where((own >= 0) & (mx.arange(top_k) % 2 == 0), own + num_tokens, own)
    local = mx.random.normal((num_tokens, sizes.width), key=mx.random.key(8))
    yield _compare(
        f"unpack_sum {shape}+float32 x{top_k}",
        lambda m: [m.unpack_sum(x, both, gates, local, dtype=mx.float32)],
        SUM_TOLERANCE,
    )


def _check_experts(ids: mx.array, sizes: CheckedLayer, packing: str) -> Iterator[Check]:
    own = (ids >= 0)[..., None]
    x = mx.random.normal((ids.shape[0], sizes.width), key=mx.random.key(2))
    x = x.astype(mx.bfloat16)
    up_shape = (sizes.slots, sizes.expert_width, sizes.width)
    gate, up = (_projection(packing, up_shape, seed) for seed in (3, 4))
    down_shape = (sizes.slots, sizes.width, sizes.expert_width)
    down = _projection(packing, down_shape, 5)
    hidden = mx.random.normal((*ids.shape, sizes.expert_width), key=mx.random.key(6))
    gates = mx.random.uniform(shape=ids.shape, key=mx.random.key(7))
    what = f"T={ids.shape[0]} {packing}"
    yield _compare(
        f"expert_glu {what}",
        lambda m: [mx.where(own, m.expert_glu(x, ids, gate, up), 0.0)],
        SUM_TOLERANCE,
    )
    yield _compare(
        f"expert_down {what}",
        lambda m: [m.expert_down(hidden, ids, gates, down)],
        SUM_TOLERANCE,
    )


def _projection(packing: str, shape: tuple[int, int, int], seed: int) -> Projection:
    weight = mx.random.normal(shape, key=mx.random.key(seed)) * shape[2] ** -0.5
    weight = weight.astype(mx.bfloat16)
    if packing == "bfloat16":
        return Projection(weight=weight)
    mode, bits = ("mxfp4", 4) if packing == "mxfp4" else ("affine", int(packing[7]))
    group_size = 32 if mode == "mxfp4" else 64
    packed, scales, *offsets = mx.quantize(weight, group_size, bits, mode=mode)
    return Projection(
        weight=packed,
        scales=scales,
        offsets=offsets[0] if offsets else None,
        bits=bits,
        group_size=group_size,
    )


def _compare(
    what: str, run: Callable[[ModuleType], list[mx.array]], tolerance: float
) -> Check:
    """A kernel against its twin."""
    plain_seconds, expected = _timed(lambda: run(ops))
    try:
        seconds, got = _timed(lambda: run(metal))
    except (RuntimeError, ValueError) as failure:
        return Check(
            what=what, error=float("nan"), tolerance=tolerance, why=str(failure)
        )
    error = float(np.max([_difference(*both) for both in zip(got, expected)]))
    return Check(
        what=what,
        error=error,
        tolerance=tolerance,
        seconds=seconds,
        plain_seconds=plain_seconds,
    )


# ---------------------------------------------------------------- experts


def check_experts(sizes: CheckedLayer = CheckedLayer()) -> Iterator[Check]:
    """Every way to run experts that is possible here, against float32."""
    for dtype, bits in ((mx.float32, 4), (mx.bfloat16, 4), (mx.bfloat16, None)):
        switch = SwitchGLU(sizes.width, sizes.expert_width, sizes.slots)
        switch.set_dtype(dtype)
        if bits:
            nn.quantize(switch, 64, bits)
        # sync: the weights are made before anything is timed.
        mx.eval(switch.parameters())
        problem = ExpertsProblem(Layer(switch, dtype, sizes.top_k), sizes.slots, 1)
        possible = [option for option, why in problem.options().items() if not why]
        packing = f"{bits} bit" if bits else "dense"
        for option, found in measure(problem, possible).items():
            yield Check(
                what=f"experts by {option}, {packing}, {_name(dtype)}",
                # A failure has no error, and a wrong one is not 0.
                error=found.error or (float("nan") if found.left_out else 0.0),
                tolerance=TOLERANCE[dtype],
                seconds=found.seconds[0] if found.seconds else 0.0,
                why=found.left_out,
                # MLX's CPU quantized product sums 16-bit rows in 16 bits.
                is_ours=option.runner != "gather",
            )


# ---------------------------------------------------------------- collectives


def check_collectives(comm: Comm, sizes: Sequence[int]) -> Iterator[Check]:
    """Collectives against NumPy. Every rank must call it, and go to its end.

    Args:
        sizes: float32 numbers that each rank contributes, multiples of the ranks.
    """
    for size in sizes:
        parts = [_numbers(rank, size) for rank in range(comm.size)]
        mine = mx.array(parts[comm.rank])
        total = np.stack(parts).sum(axis=0)
        chunk = size // comm.size
        own = slice(comm.rank * chunk, (comm.rank + 1) * chunk)
        cases = {
            "all_reduce": (comm.all_reduce, total),
            "all_gather": (comm.all_gather, np.concatenate(parts)),
            "reduce_scatter": (comm.reduce_scatter, total[own]),
            "all_to_all": (comm.all_to_all, np.concatenate([p[own] for p in parts])),
            "broadcast": (comm.broadcast, parts[0]),
        }
        for name, (collective, expected) in cases.items():
            seconds, (got,) = _timed(partial(_as_list, collective, mine))
            yield Check(
                what=f"{name} of {4 * size} bytes",
                error=_difference(got, mx.array(expected)),
                tolerance=ROUNDING[mx.float32],
                seconds=seconds,
                num_bytes=4 * size,
            )


def _as_list(collective: Callable[[mx.array], mx.array], x: mx.array) -> list[mx.array]:
    return [collective(x)]


def _numbers(rank: int, size: int) -> np.ndarray:
    return np.random.default_rng(rank).normal(size=size).astype(np.float32)


# ---------------------------------------------------------------- common


def _timed(run: Callable[[], list[mx.array]]) -> tuple[float, list[mx.array]]:
    """The fastest of some calls, after one that is not counted, and its result."""
    results: list[list[mx.array]] = []

    def call() -> None:
        results[:] = [run()]
        # sync: what is timed ends here.
        mx.eval(results)

    _, *seconds = in_turn({"": call}, rounds=REPEATS + 1)[""]
    return min(seconds), results[0]


def _difference(got: mx.array, expected: mx.array) -> float:
    if got.shape != expected.shape or not expected.size:
        return float("nan") if got.shape != expected.shape else 0.0
    values, wanted = got.astype(mx.float32), expected.astype(mx.float32)
    scale = mx.maximum(mx.abs(wanted).max(), 1e-30)
    # sync: the verdict.
    return float(to_host(mx.abs(values - wanted).max() / scale))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
