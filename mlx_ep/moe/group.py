"""What the MoE layers of one model share, and the way of tokens through one of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
from jaxtyping import Float, Float32, Shaped

from mlx_ep.comm import Comm
from mlx_ep.config import EPConfig
from mlx_ep.exchange import (
    STRATEGIES,
    CountedComm,
    Gathered,
    Strategy,
    agree_tokens,
    check_tokens,
)
from mlx_ep.experts import Runner, run_experts, run_slots
from mlx_ep.metrics import Counters, StageTimings
from mlx_ep.placement import Placement
from mlx_ep.rows import limit_to_capacity
from mlx_ep.types import Routing, Rows, TokenCounts, to_host


@dataclass
class Step:
    """What holds for one step (one forward pass) of all layers.

    Attributes:
        tokens: T of every rank, where the caller has agreed on it.
        dropped_pairs: (token, expert) pairs of this rank beyond the capacity, so far.
    """

    tokens: TokenCounts | None = None
    dropped_pairs: int = 0


@dataclass(frozen=True)
class ExpertGroup:
    """What the MoE layers of one model share: ranks, placement, strategy, counters.

    Attributes:
        share_routing: send rank 0's routing to all ranks before it is used; only
            where ranks hold the same tokens.
        capacity: most pairs of one expert and this rank's tokens; None: no limit.
        sum_dtype: what sums travel back in where they are added at home; None: the
            dtype of the tokens.
        step: what the caller has agreed on for this step.
        timings: of each stage; off until asked for:
            ``with group.timings.measure() as timings: ...``.
    """

    comm: Comm
    placement: Placement
    strategy: Strategy
    counters: Counters
    share_routing: bool = False
    capacity: int | None = None
    sum_dtype: mx.Dtype | None = None
    step: Step = field(default_factory=Step)
    timings: StageTimings = field(default_factory=StageTimings)

    @classmethod
    def from_config(
        cls,
        comm: Comm,
        placement: Placement,
        config: EPConfig,
        share_routing: bool = False,
    ) -> ExpertGroup:
        """The group that a configuration describes, with counters of its own."""
        return cls(
            comm,
            placement,
            STRATEGIES.create(config),
            Counters(),
            share_routing,
            capacity=config.capacity,
            sum_dtype=mx.float32 if config.sums == "float32" else None,
        )

    @cached_property
    def counted(self) -> CountedComm:
        """`comm`, counting into `counters`."""
        return CountedComm(self.comm, self.counters)

    @contextmanager
    def agreed(self, num_tokens: int) -> Iterator[TokenCounts]:
        """Agree on the ranks' token counts once, for all layers called inside.

        Every rank enters it once per step, with the tokens it has (also 0).
        """
        before = self.step.tokens
        self.step.tokens = agree_tokens(num_tokens, self.counted)
        try:
            yield self.step.tokens
        finally:
            self.step.tokens = before

    def weighted_sum(
        self,
        x: Float[mx.array, "T D"],
        routing: Routing,
        runner: Runner,
        extra: Float[mx.array, "T D"] | None = None,
    ) -> Float32[mx.array, "T D"]:
        """``sum_k gate_k * expert_k(x)`` of every token, over the experts of all ranks.

        Partial sums accumulate in float32: on a rank in slot order, over ranks in
        rank order, or in the order of the transport where it reduces (`replicated`,
        `gathered`). Long inputs go in rounds, where the strategy limits them.

        Args:
            extra: what this rank has of another sum over the ranks, such as its part of
                the shared experts; that sum is added. Only with strategy `replicated`,
                where it joins the one collective of the layer.
        """
        routing = self._routed(x, routing)
        limit, tokens = self.strategy.round_tokens, self._token_counts(x.shape[0])
        if tokens is None:
            output = self._one_round(x, routing, runner, None, extra)
            self.timings.end()
            return output
        assert extra is None, "other strategies add the tokens of different ranks"
        outputs = []
        for index in range(rounds := tokens.num_rounds(limit)):
            part = slice(None) if limit is None else _slice(index, limit)
            output = self._one_round(
                x[part],
                Routing(routing.expert_ids[part], routing.gates[part]),
                runner,
                tokens.of_round(index, limit),
            )
            outputs.append(output)
            # Peers wait for this rank's part, whether or not it uses the result.
            mx.async_eval(output)
            if rounds > 1:
                # sync: the buffers of a round are freed before the next one starts.
                mx.eval(output)
        self.timings.end()
        return outputs[0] if rounds == 1 else mx.concatenate(outputs)

    def _one_round(
        self,
        x: mx.array,
        routing: Routing,
        runner: Runner,
        tokens: TokenCounts | None,
        extra: mx.array | None = None,
    ) -> mx.array:
        strategy, comm, lap = self.strategy, self.counted, self.timings.lap
        plan = lap("assign", strategy.plan(routing, self.placement, comm, tokens))
        rows = lap("dispatch", strategy.dispatch(x, plan, comm))
        partial = run_experts(rows, runner, self.counters)
        partial = lap("experts", partial if extra is None else partial + extra)
        self.timings.wait(self.comm.barrier)
        sum_dtype = self.sum_dtype or x.dtype
        return lap("combine", strategy.combine(partial, plan, comm, sum_dtype))

    def _routed(self, x: mx.array, routing: Routing) -> Routing:
        """The routing as it is used, and its time."""
        self.timings.begin(x)
        routing = self.timings.lap("route", routing)
        if self.strategy.is_sharded or self.share_routing:
            self.timings.wait(self.comm.barrier)  # an exchange is next
        return self.timings.lap("route", self._limited(self._agreed(routing)))

    def slot_outputs(
        self, x: Float[mx.array, "T D"], routing: Routing, runner: Runner
    ) -> Float[mx.array, "T K D"]:
        """``expert_k(x)`` of every token and k, unweighted, in the dtype of x.

        Exactly one rank contributes each ``[t, k]``, the others add zeros: the
        result is bit-identical on any number of ranks. Moves K times the bytes of
        `weighted_sum`. Where ranks hold tokens of their own, these are gathered.
        """
        self.timings.begin(x)
        lap = self.timings.lap
        routing = lap("route", routing)
        if not self.strategy.is_sharded:
            slot_ids = self.placement.local_slots(routing.expert_ids, self.comm.rank)
            rows = Rows(x, lap("assign", slot_ids), routing.gates)
            outputs = lap("experts", run_slots(rows, runner, self.counters))
            self.timings.wait(self.comm.barrier)
            total = lap("combine", self.counted.all_reduce(outputs))
            self.timings.end()
            return total
        gathered = Gathered()
        self.timings.wait(self.comm.barrier)
        tokens = self.step.tokens or agree_tokens(x.shape[0], self.counted)
        plan = lap(
            "assign", gathered.plan(routing, self.placement, self.counted, tokens)
        )
        rows = lap("dispatch", gathered.dispatch(x, plan, self.counted))
        outputs = lap("experts", run_slots(rows, runner, self.counters))
        self.timings.wait(self.comm.barrier)
        flat = outputs.flatten(1)
        total = lap("combine", gathered.combine(flat, plan, self.counted))
        self.timings.end()
        mx.async_eval(total)
        return total.reshape(x.shape[0], *outputs.shape[1:])

    def local_slot_outputs(
        self, x: Float[mx.array, "T D"], routing: Routing, runner: Runner
    ) -> Float[mx.array, "T K D"]:
        """``expert_k(x)`` of this rank's experts, exact zeros for the others.

        For ranks that hold the same tokens. What is made of it on each rank has to go
        through `sum_parts`.
        """
        self.timings.begin(x)
        lap = self.timings.lap
        ids = lap("route", self._limited(routing)).expert_ids
        slot_ids = lap("assign", self.placement.local_slots(ids, self.comm.rank))
        rows = Rows(x, slot_ids, routing.gates)
        return lap("experts", run_slots(rows, runner, self.counters))

    def sum_parts(self, part: Shaped[mx.array, ...]) -> Shaped[mx.array, ...]:
        """The sum of the ranks' parts; ends the layer that `local_slot_outputs` began.

        Args:
            part: of the same shape and dtype on every rank.
        """
        self.timings.wait(self.comm.barrier)
        total = self.timings.lap("combine", self.counted.all_reduce(part))
        self.timings.end()
        return total

    def _token_counts(self, num_tokens: int) -> TokenCounts | None:
        if self.step.tokens is None and self.strategy.needs_tokens:
            return agree_tokens(num_tokens, self.counted)
        if self.step.tokens is None or not self.strategy.is_sharded:
            return None
        # Here and not in each round, where some ranks would find it and some not.
        check_tokens(self.step.tokens, num_tokens, self.comm)
        return self.step.tokens

    def _agreed(self, routing: Routing) -> Routing:
        """Rank 0's routing, where ranks may have rounded to different experts."""
        if not self.share_routing or self.strategy.is_sharded:
            return routing
        # Ids are below 2^24, which float32 holds exactly: one collective for both.
        ids = routing.expert_ids.astype(mx.float32)
        both = self.counted.broadcast(mx.stack([ids, routing.gates]))
        return Routing(both[0].astype(mx.int32), both[1])

    def _limited(self, routing: Routing) -> Routing:
        """The routing within the capacity; what is dropped is counted and warned of."""
        if self.capacity is None:
            return routing
        # sync: which pairs are dropped is counted here and has to be reported.
        ids, dropped = limit_to_capacity(to_host(routing.expert_ids), self.capacity)
        if dropped and not self.step.dropped_pairs:
            warnings.warn(
                f"rank {self.comm.rank} drops {dropped} of {ids.size} (token, expert) "
                f"pairs beyond capacity={self.capacity}; this is said once, "
                "ExpertGroup.step.dropped_pairs has the count.",
                stacklevel=3,
            )
        self.step.dropped_pairs += dropped
        return Routing(mx.array(ids), routing.gates)


def _slice(index: int, length: int) -> slice:
    return slice(index * length, (index + 1) * length)
