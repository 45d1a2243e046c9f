"""Every way to run the experts of a shape, checked against float32 and timed.

A few slots of the layer's own weights stand for all of them: what counts is how many
rows visit a slot. So it takes a fraction of a second for any number of experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float32

from mlx_ep.experts import (
    RUNNERS,
    ExpertRunner,
    ExpertWeights,
    Matrices,
    expert_weights,
)
from mlx_ep.metrics import Counters
from mlx_ep.rows import Option
from mlx_ep.types import Rows, to_host

Call = Callable[[], np.ndarray]

# Of what is checked and how: results of another version are measured again.
WARMUP_VERSION = 2
ROWS_PER_SLOT = (1, 4, 16, 64)
MAX_WEIGHTS = 20_000_000  # of all slots that are visited
# An option is not timed with more rows where the call would probably take longer.
MAX_SECONDS = 0.1
TIMED_SECONDS = 0.01  # a call is repeated until it has taken so long
# Of the largest output, for rows of this dtype: a few hundred roundings.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}


@dataclass(frozen=True)
class Result:
    """What the warm-up found out about one option.

    Attributes:
        rows, seconds: as in `Measured`.
        error: the largest difference to the reference, relative to the largest output.
        left_out: why it must not be used, or "".
    """

    rows: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    error: float = 0.0
    left_out: str = ""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def measure(
    switch: nn.Module, dtype: mx.Dtype, top_k: int, candidates: Iterable[Option]
) -> dict[Option, Result]:
    """Check and time the options that can run a switch.

    Args:
        switch: with the weights of this rank.
        dtype: of the rows.
        top_k: K.
        candidates: those that are possible in this process.

    Returns:
        A result for each; none where the switch has no slots or is not understood.
    """
    weights = expert_weights(switch)
    if weights is None or not weights.num_slots:
        return {}
    # One choice of each row lives elsewhere, where there is more than one.
    num_slots = min(
        weights.num_slots,
        max(1, top_k - 1),
        max(1, MAX_WEIGHTS // weights.weights_per_slot),
    )
    rows = _rows(max(ROWS_PER_SLOT), weights.up.columns, num_slots, top_k, dtype)
    expected = reference(weights, num_slots, rows)
    return {
        option: _measure(option, switch, rows, num_slots, expected)
        for option in candidates
    }


def _rows(
    num_rows: int, width: int, num_slots: int, top_k: int, dtype: mx.Dtype
) -> Rows:
    """Rows that visit the first slots, each in its own order and with its own gates."""
    key = mx.random.key(0)  # the model's own random state stays as it is
    x = mx.random.normal((num_rows, width), key=key).astype(dtype)
    slots = np.full((num_rows, top_k), -1, np.int32)
    slots[:, :num_slots] = np.arange(num_slots)
    for row in range(num_rows):
        slots[row] = np.roll(slots[row], row)
    gates = mx.random.uniform(0.5, 1.5, slots.shape, key=key) / num_slots
    return Rows(x, mx.array(slots), gates)


def _measure(
    option: Option,
    switch: nn.Module,
    all_rows: Rows,
    num_slots: int,
    expected: Float32[np.ndarray, "M D"],
) -> Result:
    times: dict[int, float] = {}
    error, tolerance = 0.0, TOLERANCE[all_rows.x.dtype]
    with mx.stream(option.stream or mx.default_device()):
        try:
            runner = RUNNERS[option.runner](switch)
            for rows in ROWS_PER_SLOT:
                call = _call(runner, Rows(*(part[:rows] for part in all_rows)))
                start = time.perf_counter()
                difference = relative_error(call(), expected[:rows])
                seconds = time.perf_counter() - start
                error = max(error, difference)
                # Not `>`, which is false for NaN.
                if not difference <= tolerance:
                    return Result(
                        error=difference,
                        left_out=_disagrees(difference, tolerance, rows),
                    )
                times[rows] = fastest(call, seconds) / num_slots
                if _expected(times) * num_slots > MAX_SECONDS:
                    break
        except (RuntimeError, ValueError) as failure:  # MLX's, say of a compiler
            return Result(left_out=f"it failed: {failure}")
    values = list(times.values())
    # More rows are no less work: a smaller time for them says that others were busy.
    seconds_per_slot = tuple(min(values[i:]) for i in range(len(values)))
    return Result(tuple(times), seconds_per_slot, error)


def _expected(times: Mapping[int, float]) -> float:
    """Seconds of one slot with the next number of rows, on the line of the last two."""
    if len(times) == 1:
        return next(iter(times.values()))  # weights are read once for all rows, at best
    (first, early), (last, late) = list(times.items())[-2:]
    return late + (late - early) / (last - first) * 3 * last


def _call(runner: ExpertRunner, rows: Rows) -> Call:
    # sync: what is timed must not include making its arguments.
    mx.eval(rows)

    def run() -> np.ndarray:
        # sync: this is what is timed.
        return to_host(runner.partial_sum(rows, Counters()))

    return run


def fastest(call: Callable[[], object], first: float) -> float:
    """The fastest of two calls and more; of one where the first took very long."""
    seconds, total = first, first if first > 3 * MAX_SECONDS else 0.0
    while total < TIMED_SECONDS:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        seconds, total = min(seconds, took), total + took
    return seconds


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest expected number; NaN stays NaN."""
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(got - expected).max(initial=0.0)) / scale


def _disagrees(difference: float, tolerance: float, rows: int) -> str:
    return (
        f"with {rows} rows per slot it differs from the reference by {difference:.2g} "
        f"of the largest output; {tolerance:.2g} is allowed"
    )


def reference(
    weights: ExpertWeights, num_slots: int, rows: Rows
) -> Float32[np.ndarray, "M D"]:
    """Each row's gate-weighted sum in float32: MLX unpacks, NumPy multiplies.

    One matrix is held unpacked at a time.

    Args:
        num_slots: the first so many slots, each of which every row visits once.
        rows: the rows.
    """
    with mx.stream(mx.cpu):
        # sync: at warm-up.
        x, gates = to_host(rows.x.astype(mx.float32)), to_host(rows.gates)
        # sync: at warm-up.
        slots = to_host(rows.slot_ids)
        total = np.zeros(x.shape, np.float32)
        for slot in range(num_slots):
            parts = [weights.up] + ([weights.gate] if weights.gate else [])
            hidden = [mx.array(_apply(m, slot, x)) for m in parts]
            # sync: at warm-up.
            between = to_host(weights.activation(*hidden).astype(mx.float32))
            gate = np.where(slots == slot, gates, 0).sum(axis=1, keepdims=True)
            total += gate * _apply(weights.down, slot, between)
    return total


def _apply(matrices: Matrices, slot: int, rows: np.ndarray) -> np.ndarray:
    weight = matrices.weight[slot]
    if matrices.scales is not None:
        scales, offsets = matrices.scales[slot], None
        if matrices.offsets is not None:  # MLX rounds to the dtype of the scales
            scales = scales.astype(mx.float32)
            offsets = matrices.offsets[slot].astype(mx.float32)
        scale = matrices.global_scale
        weight = mx.dequantize(
            weight,
            scales,
            offsets,
            group_size=matrices.group_size,
            bits=matrices.bits,
            mode=matrices.mode,
            global_scale=None if scale is None else scale[slot],
            dtype=mx.float32,
        )
    # sync: at warm-up.
    outputs = rows @ to_host(weight.astype(mx.float32)).T
    if matrices.bias is not None:
        # sync: at warm-up.
        outputs += to_host(matrices.bias[slot].astype(mx.float32))
    return outputs
