"""What a step takes by a bundle of measured kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_ep.simulate.cluster import Cluster, Instance
from mlx_ep.simulate.links import Levels, gather_ns, reduce_ns, send_ns
from mlx_ep.simulate.routing import ExpertRouting
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.times.attention import chunk_equivalent
from mlx_ep.simulate.times.bundle import (
    ATTENTION_LAYERS,
    DENSE_MLP_LAYERS,
    ONCE,
    Bundle,
)
from mlx_ep.simulate.times.exchanges import exchange_ns
from mlx_ep.simulate.times.tables import sum_of_lines

_DUMMY = StepBatch(decodes=[1])


@dataclass(frozen=True)
class _Member:
    """One instance's part of a step, us.

    Attributes:
        tokens: that its kernels get; `real` of them are of requests.
        layer: ``[steps]`` of a layer without its feed-forward part.
        mlp: of a feed-forward part without experts, with its sum over the devices.
        first, last: before and behind the layers.
    """

    tokens: int
    real: int
    layer: np.ndarray
    mlp: float | int
    first: float | int
    last: float | int


class BundleTimes:
    """Steps of a group of instances that share a bundle.

    Args:
        routing: of the experts; None: the model has none.
        exchange: how tokens meet the experts of other ranks, see
            `mlx_ep.simulate.times.exchanges`.
    """

    def __init__(
        self,
        cluster: Cluster,
        group: Sequence[Instance],
        bundle: Bundle,
        routing: ExpertRouting | None,
        exchange: str = "allgather",
    ) -> None:
        first = group[0]
        self._first, self._group = first, list(group)
        self._model, self._bundle = first.model, bundle
        self._routing, self._exchange = routing, exchange
        self._tp: Levels = [(first.tp, cluster.devices)]
        self._ep: Levels = cluster.levels_of(group)
        self._is_spread = first.ep > first.tp
        self._pipe = cluster.devices
        self._graphs = np.array(first.settings.graph_sizes, np.int64)  # on host
        dense = bundle.dense
        per_layer = [(2.0, dense["layernorm"])]
        per_layer += [(1.0, dense[n]) for n in ATTENTION_LAYERS if n in dense]
        self._layer = sum_of_lines(per_layer)
        has_mlp = all(name in dense for name in DENSE_MLP_LAYERS)
        self._mlp = (
            sum_of_lines([(1.0, dense[n]) for n in DENSE_MLP_LAYERS])
            if has_mlp
            else None
        )
        if self._mlp is None and self._model.num_moe_layers < self._model.num_layers:
            raise ValueError(
                f"{bundle.folder / 'dense.csv'}: has no gate_up_proj, which the layers "
                "without experts need."
            )
        self._expert_cache: dict[tuple[int, int], np.ndarray] = {}

    def stage_ns(
        self, batches: Sequence[StepBatch], steps: int, first_step: int
    ) -> np.ndarray:
        """See `mlx_ep.simulate.group.StepTimes`."""
        members = self._members(batches, steps)
        moe = self._moe_layers(members, steps, first_step)
        if self._is_spread:  # all wait for one another in every layer
            layer = np.max([member.layer for member in members], axis=0)
            mlp = max(member.mlp for member in members)
            first = max(member.first for member in members)
            last = max(member.last for member in members)
            return self._stages(layer, mlp, first, last, moe, members)
        each = [
            self._stages(m.layer, m.mlp, m.first, m.last, moe, [m]) for m in members
        ]
        return np.asarray(np.max(each, axis=0))  # on host

    def _stages(
        self,
        layer: np.ndarray,
        mlp: float | int,
        first: float | int,
        last: float | int,
        moe: np.ndarray,
        members: Sequence[_Member],
    ) -> np.ndarray:
        model, count = self._model, self._first.pp
        dense = model.num_layers - model.num_moe_layers
        each = model.num_layers * layer + dense * mlp + model.num_moe_layers * moe
        stages = np.empty((count, len(layer)))
        tokens = max(member.tokens for member in members)
        passed = send_ns(self._pipe, tokens * self._row_bytes) / 1e3
        for stage, layers in enumerate(_spread(model.num_layers, count)):
            stages[stage] = each * (layers / model.num_layers)
            if stage < count - 1:
                stages[stage] += passed
        stages[0] += first
        stages[-1] += last
        return np.rint(stages * 1e3).astype(np.int64)

    @property
    def _row_bytes(self) -> int:
        return self._model.width * self._first.settings.itemsize

    def _members(self, batches: Sequence[StepBatch], steps: int) -> list[_Member]:
        filled = [batch if batch.num_tokens else _DUMMY for batch in batches]
        padded = self._padded([batch.num_tokens for batch in filled])
        return [
            self._member(batch, tokens, steps) for batch, tokens in zip(filled, padded)
        ]

    def _padded(self, tokens: Sequence[int]) -> list[int]:
        """Up to the size of a graph where all have one, and then all to the longest."""
        longest = max(tokens)
        if not len(self._graphs) or longest > self._graphs[-1]:
            return list(tokens)
        size = int(self._graphs[np.searchsorted(self._graphs, longest)])
        return [size] * len(tokens)

    def _member(self, batch: StepBatch, tokens: int, steps: int) -> _Member:
        bundle, model = self._bundle, self._model
        sequences = len(batch.prefills) + len(batch.decodes)
        layer = self._layer.at(tokens) + self._attention(batch, steps)
        mlp = 0.0 if self._mlp is None else self._mlp.at(tokens)
        first = bundle.dense[ONCE[0]].at(tokens)
        last = bundle.dense[ONCE[1]].at(tokens)
        last += sum(line.at(sequences) for line in bundle.sequences.values())
        if self._first.tp > 1:
            summed = reduce_ns(self._tp, tokens * self._row_bytes) / 1e3
            # The embedding is split by its words and the logits likewise.
            layer, mlp, first = layer + summed, mlp + summed, first + summed
            rows = sequences * model.vocabulary * self._first.settings.itemsize
            last += gather_ns(self._tp, rows / self._first.tp) / 1e3
        return _Member(tokens, batch.num_tokens, layer, mlp, first, last)

    def _attention(self, batch: StepBatch, steps: int) -> np.ndarray:
        """``[steps]`` us of one layer."""
        table, count = self._bundle.attention, len(batch.decodes)
        chunk, before = chunk_equivalent(batch.prefills)
        if not count:
            return table(chunk, before, 0, np.zeros(steps))
        keys, later = batch.decodes, np.arange(steps)
        even = table(chunk, before, count, sum(keys) / count + later)
        longest, shortest = max(keys), min(keys)
        if longest == shortest:
            return even
        middle = (longest + shortest) / 2
        share = sum(seen > middle for seen in keys) / count
        alpha = self._bundle.skew.alpha(
            chunk, count, share, longest, before, self._first.settings.graphs
        )
        if not alpha:
            return even
        return even + alpha * (table(chunk, before, count, longest + later) - even)

    def _moe_layers(
        self, members: Sequence[_Member], steps: int, first_step: int
    ) -> np.ndarray:
        """``[steps]`` us of the feed-forward part of a layer with experts."""
        if self._routing is None:
            return np.zeros(steps)
        if not self._is_spread:
            # Members of a group that keep to themselves: the longest counts.
            found = [self._moe_alone([m], steps, first_step) for m in members]
            return np.asarray(np.max(found, axis=0))  # on host
        return self._moe_alone(members, steps, first_step)

    def _moe_alone(
        self, members: Sequence[_Member], steps: int, first_step: int
    ) -> np.ndarray:
        first = self._first
        held = [member.tokens for member in members]
        experts = self._experts(sum(held), sum(member.real for member in members))
        if self._routing is not None and self._routing.is_sampled:
            experts = experts[np.arange(first_step, first_step + steps) % len(experts)]
        else:
            experts = np.full(steps, experts.mean())
        if first.ep > 1:
            moved = exchange_ns(
                self._exchange, self._ep, held, first.ep, self._model, first.settings
            )
            return experts + moved / 1e3
        if first.tp > 1:
            experts = experts + reduce_ns(self._tp, held[0] * self._row_bytes) / 1e3
        return experts

    def _experts(self, tokens: int, real: int) -> np.ndarray:
        """us of the busiest rank, in some layers or draws.

        A rank's kernels get the rows of all ranks. Those of experts that lie elsewhere
        skip the matrices, but not the activation and the sums: rows count half way
        between all of them and those that stay.

        Args:
            tokens: that the ranks exchange; `real` of them choose experts.
        """
        key = (tokens, real)
        if key not in self._expert_cache:
            assert self._routing is not None and self._bundle.experts is not None
            pairs, distinct = self._routing.loads(real)
            rows = (tokens + pairs / self._model.top_k) / 2
            if self._first.ep == 1:
                rows = np.full_like(pairs, tokens)
            times = self._bundle.experts(np.maximum(rows, 1), distinct)
            self._expert_cache[key] = times.max(axis=1)
        return self._expert_cache[key]


def _spread(layers: int, stages: int) -> list[int]:
    """Layers of each stage, as evenly as it goes; the last ones have one more."""
    each, more = divmod(layers, stages)
    return [each + (stage >= stages - more) for stage in range(stages)]
