"""Runner `blas`: rows grouped by expert, multiplied by NumPy's BLAS on the CPU.

MLX's CPU build multiplies with 3 to 4 GFLOP/s on one x86 core, NumPy's BLAS with 75 to
100. Per expert: its rows are collected, its matrices unpacked to float32 in blocks that
stay in the cache, and each block multiplied as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Float32, Int32
from mlx_lm.models.switch_layers import SwiGLU

from mlx_ep.experts.base import ExpertWeights, Matrices, expert_weights
from mlx_ep.experts.run import local_pairs
from mlx_ep.experts.unpack import BLOCK_BYTES, host_view, to_float32, unpacker
from mlx_ep.metrics import Counters
from mlx_ep.rows import Backend
from mlx_ep.types import Rows, view_on_host

# Most bytes of temporaries, the block included; not the rows that come and go.
SCRATCH_BYTES = 64 << 20


class BlasRunner:
    """All arithmetic is float32, whatever the dtypes of rows and weights."""

    def __init__(self, switch: nn.Module) -> None:
        weights = expert_weights(switch)
        assert weights is not None
        self.experts = _HostExperts(weights)

    @staticmethod
    def why_not(switch: nn.Module, backend: Backend) -> str:
        """See `RunnerType`."""
        if expert_weights(switch) is None:
            return f"{type(switch).__name__} is of a form that it does not know"
        return ""

    def partial_sum(self, rows: Rows, counters: Counters) -> Float32[mx.array, "M D"]:
        """See `ExpertRunner`; sums in slot order. One host sync."""
        x = rows.x.astype(mx.float32)
        # sync: all that the host reads, at once.
        mx.eval(x, rows.slot_ids, rows.gates)
        pairs = local_pairs(rows.slot_ids, counters)
        chosen = pairs.position.reshape(-1)
        # sync: evaluated above.
        host_x, host_gates = view_on_host(x), view_on_host(rows.gates).reshape(-1)
        gates = np.empty(len(pairs.rows) + 1, np.float32)
        gates[chosen] = host_gates  # the last one takes those of foreign slots
        total = np.zeros(host_x.shape, np.float32)
        scratch = self.experts.scratch()
        for slot, part in self.experts.parts(pairs.slots):
            visitors = pairs.rows[part]
            outputs = self.experts.run(slot, host_x[visitors], scratch)
            outputs *= gates[part, None]
            if (visitors[1:] == visitors[:-1]).any():  # a row that visits it twice
                np.add.at(total, visitors, outputs)
            else:
                total[visitors] += outputs
        return mx.array(total)

    def slot_outputs(
        self, rows: Float[mx.array, "N D"], slots: Int32[mx.array, " N"]
    ) -> Float[mx.array, "N D"]:
        """See `ExpertRunner`; in the dtype of the rows. One host sync."""
        x = rows.astype(mx.float32)
        # sync: all that the host reads, at once.
        mx.eval(x, slots)
        # sync: evaluated above.
        host_x, host_slots = view_on_host(x), view_on_host(slots)
        outputs = np.empty(host_x.shape, np.float32)
        scratch = self.experts.scratch()
        for slot, part in self.experts.parts(host_slots):
            outputs[part] = self.experts.run(slot, host_x[part], scratch)
        return mx.array(outputs).astype(rows.dtype)


class _HostExperts:
    """The experts of a switch for NumPy."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.gate = None if weights.gate is None else HostMatrices(weights.gate)
        self.up = HostMatrices(weights.up)
        self.down = HostMatrices(weights.down)
        self.activation = weights.activation
        # Of one row: x and the reordered x, output, and what is between them.
        width = 4 * weights.up.columns + 5 * weights.up.rows
        block = max(m.block_bytes for m in (self.up, self.down))
        self.block_numbers = block // 4
        self.max_rows = max(1, (SCRATCH_BYTES - block) // (4 * width))

    def parts(self, slots: Int32[np.ndarray, " N"]) -> Iterator[tuple[int, slice]]:
        """The pairs of each slot, in parts of at most `max_rows`; slots ascending."""
        bounds = np.flatnonzero(np.diff(slots)) + 1
        # on host: NumPy's own.
        starts = [0, *bounds.tolist()]
        stops = [*bounds.tolist(), len(slots)]
        for start, stop in zip(starts, stops, strict=True):
            for first in range(start, stop, self.max_rows):
                yield int(slots[start]), slice(first, min(first + self.max_rows, stop))

    def scratch(self) -> Float32[np.ndarray, " n"]:
        """Room for a block, for the length of a call: layers are many."""
        return np.empty(self.block_numbers, np.float32)

    def run(
        self,
        slot: int,
        rows: Float32[np.ndarray, "m D"],
        scratch: Float32[np.ndarray, " n"],
    ) -> Float32[np.ndarray, "m D"]:
        """One expert. Inside, rows are columns: BLAS is then up to twice as fast."""
        x = np.ascontiguousarray(rows.T)
        up = self.up.multiply(slot, x, scratch)
        gate = None if self.gate is None else self.gate.multiply(slot, x, scratch)
        hidden = self._activate(up, gate)
        return self.down.multiply(slot, hidden, scratch).T

    def _activate(self, up: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
        if gate is not None and type(self.activation) is SwiGLU:
            with np.errstate(over="ignore"):  # exp(88) is inf, and 1 / inf is 0
                up *= gate
                np.negative(gate, out=gate)
                np.exp(gate, out=gate)
                gate += 1.0
                up /= gate
            return up
        with mx.stream(mx.cpu):
            arguments = [mx.array(a.T) for a in (up, gate) if a is not None]
            hidden = self.activation(*arguments).astype(mx.float32)
            # sync: on the CPU, of what was just computed there.
            return np.ascontiguousarray(view_on_host(hidden).T)


class HostMatrices:
    """The matrices of one projection."""

    def __init__(self, matrices: Matrices) -> None:
        self.rows = matrices.rows
        self.unpacker = unpacker(matrices)
        row_bytes = 4 * matrices.columns
        self.block_rows = min(self.rows, max(1, BLOCK_BYTES // row_bytes))
        self.block_bytes = self.block_rows * row_bytes
        self.bias: np.ndarray | None = None
        if matrices.bias is not None:
            view = host_view(matrices.bias)
            out = np.empty(view.shape, np.float32)
            self.bias = to_float32(view, matrices.bias.dtype, out)

    def multiply(
        self,
        slot: int,
        x: Float32[np.ndarray, "C m"],
        scratch: Float32[np.ndarray, " n"],
    ) -> Float32[np.ndarray, "rows m"]:
        """``weight[slot] @ x + bias[slot]``."""
        columns = self.unpacker.columns(x)
        out = np.empty((self.rows, x.shape[1]), np.float32)
        for start in range(0, self.rows, self.block_rows):
            rows = slice(start, min(start + self.block_rows, self.rows))
            shape = (rows.stop - start, len(x))
            space = scratch[: shape[0] * shape[1]].reshape(shape)
            np.matmul(self.unpacker.block(slot, rows, space), columns, out=out[rows])
        offsets = self.unpacker.offsets(slot, x)
        if offsets is not None:
            out += offsets
        if self.bias is not None:
            out += self.bias[slot, :, None]
        return out
