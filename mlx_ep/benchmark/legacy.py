"""How ml-explore/mlx#3158 counted, for comparison: its benchmark, part by part.

Four parts are timed, each by itself, with N tokens on each rank:

- `all_sum` of ``[N, D]``;
- `shard`: one dense SwiGLU of ``D x F/P`` matrices over N tokens;
- `exchange`: dispatch and combine without experts;
- `full`: one dense SwiGLU of ``D x F`` matrices over ``N * K / P`` tokens;

and added up (its benchmarks/python/moe_ep_vs_tp_bench.py):

    tp = K * shard + all_sum        ep = exchange + full
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.benchmark.samples import Budget, Samples, agreed_count, sample, slowest
from mlx_ep.benchmark.shapes import LayerShape
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.exchange import STRATEGIES, moe_combine_exchange, moe_dispatch_exchange
from mlx_ep.placement import Placement
from mlx_ep.types import Routing, TokenCounts

LABEL = "EP/TP as #3158 counts"
LEFT_OUT = (
    f"Column '{LABEL}' is not a measurement of a layer: it adds up parts that were "
    "timed one by one with dense weights, charges TP for the weights of K experts and "
    "EP for those of one (K/P times fewer bytes, 4x at K=8 on 2 ranks), and leaves out "
    "how many experts there are, so that EP reads one expert's weights whatever the "
    "routing, and neither waits for the busier rank."
)


@dataclass(frozen=True)
class Parts:
    """Seconds of each part, for N tokens on each rank."""

    all_sum: float
    shard: float
    exchange: float
    full: float

    def tp(self, top_k: int) -> float:
        return top_k * self.shard + self.all_sum

    def ep(self) -> float:
        return self.exchange + self.full

    def ratio(self, top_k: int) -> float:
        """Their figure: EP over TP.

        >>> Parts(all_sum=1.0, shard=2.0, exchange=3.0, full=4.0).ratio(top_k=8)
        0.4117647058823529
        """
        return self.ep() / self.tp(top_k)


def rows_of_full(num_tokens: int, top_k: int, num_ranks: int) -> int:
    """The tokens that EP's one dense FFN is given."""
    return max(1, num_tokens * top_k // num_ranks)


class LegacyCount:
    """Measures the parts for one shape. Every rank must do the same."""

    def __init__(self, shape: LayerShape, dtype: mx.Dtype, comm: GroupComm) -> None:
        self.shape, self.dtype, self.comm = shape, dtype, comm
        self.placement = Placement.contiguous(shape.num_experts, comm.size)
        self.strategy = STRATEGIES.create(EPConfig(strategy="all_to_all"))
        width, full = shape.width, shape.expert_width
        share = full // comm.size
        self.shard = [self._random(s) for s in _ffn_shapes(width, share)]
        self.full = [self._random(s) for s in _ffn_shapes(width, full)]
        # sync: weights are made before anything is timed.
        mx.eval(self.shard, self.full)

    def measure(self, num_tokens: int, ids: mx.array, budget: Budget) -> Parts:
        """Medians over samples of the slowest rank.

        Args:
            num_tokens: N, on each rank.
            ids: ``[N, K]`` experts of this rank's tokens.
        """
        x = self._random((num_tokens, self.shape.width))
        num_rows = rows_of_full(num_tokens, self.shape.top_k, self.comm.size)
        rows = self._random((num_rows, self.shape.width))
        gates = mx.full(ids.shape, 1 / self.shape.top_k)
        # sync: inputs are made before anything is timed.
        mx.eval(x, rows, gates, ids)
        counts = TokenCounts((num_tokens,) * self.comm.size)

        def exchange() -> None:
            received, handle = moe_dispatch_exchange(
                x,
                Routing(ids, gates),
                self.placement,
                self.comm,
                self.strategy,
                tokens=counts,
            )
            sums = received.x.astype(mx.float32)
            mx.eval(moe_combine_exchange(sums, handle))  # sync: timed

        parts: dict[str, Callable[[], None]] = {
            "all_sum": lambda: mx.eval(self.comm.all_reduce(x)),  # sync: timed
            "shard": partial(_run, x, self.shard),
            "exchange": exchange,
            "full": partial(_run, rows, self.full),
        }
        first = sample(parts, lambda _: None, 1, self.comm)
        count = agreed_count(sum(s[0] for s in first.values()), budget, self.comm)
        found = sample(parts, lambda _: None, count, self.comm)
        medians: dict[str, Samples] = slowest(found, self.comm)
        return Parts(**{name: samples.median for name, samples in medians.items()})

    def _random(self, shape: tuple[int, ...]) -> mx.array:
        return (mx.random.normal(shape) * 0.02).astype(self.dtype)


def to_json(parts: Parts, top_k: int) -> dict[str, Any]:
    """The parts and what follows from them."""
    ratio = parts.ratio(top_k)
    return {**asdict(parts), "tp": parts.tp(top_k), "ep": parts.ep(), "ratio": ratio}


def _ffn_shapes(width: int, expert_width: int) -> list[tuple[int, int]]:
    return [(width, expert_width), (width, expert_width), (expert_width, width)]


def _run(x: mx.array, matrices: list[mx.array]) -> None:
    gate, up, down = matrices
    # sync: this is what is timed.
    mx.eval((nn.silu(x @ gate) * (x @ up)) @ down)
