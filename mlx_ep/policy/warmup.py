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

from mlx_ep.metrics import Counters
from mlx_ep.runners import (
    RUNNERS,
    ExpertRunner,
    ExpertWeights,
    Matrices,
    Option,
    expert_weights,
)
from mlx_ep.types import Rows

Call = Callable[[], np.ndarray]

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
    num_slots = min(
        weights.num_slots, top_k, max(1, MAX_WEIGHTS // weights.weights_per_slot)
    )
    key = mx.random.key(0)  # the model's own random state stays as it is
    x = mx.random.normal((max(ROWS_PER_SLOT), weights.up.columns), key=key)
    x = x.astype(dtype)
    expected = reference(weights, num_slots, x)
    return {
        option: _measure(option, switch, x, num_slots, expected)
        for option in candidates
    }


def _measure(
    option: Option,
    switch: nn.Module,
    x: mx.array,
    num_slots: int,
    expected: Float32[np.ndarray, "M D"],
) -> Result:
    times: dict[int, float] = {}
    error = 0.0
    with mx.stream(option.stream or mx.default_device()):
        try:
            runner = RUNNERS[option.runner](switch)
            for rows in ROWS_PER_SLOT:
                call = _call(runner, x[:rows], num_slots)
                start = time.perf_counter()
                difference = relative_error(call(), expected[:rows])
                seconds = time.perf_counter() - start
                error = max(error, difference)
                # Not `>`, which is false for NaN.
                if not difference <= TOLERANCE[x.dtype]:
                    return Result(
                        error=difference,
                        left_out=_disagrees(difference, TOLERANCE[x.dtype], rows),
                    )
                times[rows] = _fastest(call, seconds) / num_slots
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


def _call(runner: ExpertRunner, x: mx.array, num_slots: int) -> Call:
    """A call in which every row visits every slot, all with the same gate."""
    shape = (x.shape[0], num_slots)
    slots = mx.broadcast_to(mx.arange(num_slots, dtype=mx.int32), shape)
    rows = Rows(x, mx.contiguous(slots), mx.full(shape, 1 / num_slots))
    # sync: what is timed must not include making its arguments.
    mx.eval(rows)

    def run() -> np.ndarray:
        # sync: this is what is timed.
        return np.array(runner.partial_sum(rows, Counters()))

    return run


def _fastest(call: Call, first: float) -> float:
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
    weights: ExpertWeights, num_slots: int, x: mx.array
) -> Float32[np.ndarray, "M D"]:
    """The mean of the first slots' outputs, in float32: MLX unpacks, NumPy multiplies.

    One matrix is held unpacked at a time.
    """
    with mx.stream(mx.cpu):
        # sync: at warm-up.
        rows = np.array(x.astype(mx.float32))
        total = np.zeros(rows.shape, np.float32)
        for slot in range(num_slots):
            parts = [weights.up] + ([weights.gate] if weights.gate else [])
            hidden = [mx.array(_apply(m, slot, rows)) for m in parts]
            # sync: at warm-up.
            between = np.array(weights.activation(*hidden).astype(mx.float32))
            total += _apply(weights.down, slot, between)
    return total / np.float32(num_slots)


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
    outputs = rows @ np.array(weight.astype(mx.float32)).T
    if matrices.bias is not None:
        # sync: at warm-up.
        outputs += np.array(matrices.bias[slot].astype(mx.float32))
    return outputs
