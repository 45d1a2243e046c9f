"""What the MoE layers of one model share, and the way of tokens through one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Float32, Shaped

from mlx_ep.comm import Comm, note_layer
from mlx_ep.comm.control.progress import LayerStage
from mlx_ep.config import EPConfig
from mlx_ep.exchange import (
    STRATEGIES,
    CountedComm,
    ExchangeRequest,
    Gathered,
    Replicated,
    Strategy,
    agree_tokens,
    check_tokens,
    sends_nothing,
)
from mlx_ep.experts import Runner, run_experts, run_slots
from mlx_ep.metrics import Counters, StageTimings
from mlx_ep.moe.bare import BareLayer
from mlx_ep.moe.overlap import Operation, Overlap
from mlx_ep.moe.step import Step, rank_0_routing
from mlx_ep.placement import Placement, check_everywhere
from mlx_ep.rows import Mover, serving_local_slots, uses_metal
from mlx_ep.types import DispatchDtype, Routing, Rows, TokenCounts

# A call with more of them is one of a prompt; the default of `low_latency_tokens`.
MOST_DECODE_TOKENS = 64

_UNTIMED = StageTimings()


@dataclass(frozen=True)
class ExpertGroup:
    """What the MoE layers of one model share: ranks, placement, strategy, counters.

    Attributes:
        share_routing: send rank 0's routing to all ranks before it is used; only
            where ranks hold the same tokens.
        capacity: most pairs of one expert and this rank's tokens; None: no limit.
        sum_dtype: what sums travel back in where they are added at home; None: the
            dtype of the tokens.
        dispatch_dtype: what rows travel in between ranks with tokens of their own.
        overlap: what is started while a pass is built, and in which order.
        step: what the caller has agreed on for this step.
        timings: of each stage; off until asked for:
            ``with group.timings.measure() as timings: ...``.
        eval_layers: evaluate prompts after every so many layers; 0: never.
        check_nan: look for NaN in what comes and goes.
        observe: is given the routed ids of each call; see `RoutingRecorder.observer`.
        levels_rows: among copies of experts, see `serving_slots`; alike on all ranks.
    """

    comm: Comm
    placement: Placement
    strategy: Strategy
    counters: Counters
    share_routing: bool = False
    capacity: int | None = None
    sum_dtype: mx.Dtype | None = None
    dispatch_dtype: DispatchDtype = "model"
    overlap: Overlap = field(default_factory=Overlap)
    step: Step = field(default_factory=Step)
    timings: StageTimings = field(default_factory=StageTimings)
    eval_layers: int = 0
    check_nan: bool = False
    observe: Callable[[mx.array], None] | None = None
    levels_rows: bool = False

    @classmethod
    def from_config(
        cls,
        comm: Comm,
        placement: Placement,
        config: EPConfig,
        share_routing: bool = False,
        mover: Mover | None = None,
    ) -> ExpertGroup:
        """What a configuration describes; `mover`: see `StrategyTable.create`."""
        if config.strategy == "local":
            check_everywhere(placement)
        return cls(
            comm,
            placement,
            STRATEGIES.create(config, mover),
            Counters(),
            share_routing,
            capacity=config.capacity,
            sum_dtype=mx.float32 if config.sums == "float32" else None,
            dispatch_dtype=config.dispatch_dtype,
            eval_layers=config.eval_layers or 0,
            check_nan=config.check_nan,
            overlap=Overlap.of(config),
        )

    @cached_property
    def counted(self) -> CountedComm:
        """`comm`, counting into `counters`."""
        return CountedComm(self.comm, self.counters)

    @cached_property
    def may_be_apart(self) -> bool:
        """Whether no rank has to wait for another in these layers."""
        return sends_nothing(self.strategy, self.placement)

    @property
    def is_apart(self) -> bool:
        """Whether no rank waits for another in these layers in this pass."""
        return self.may_be_apart and not self.step.is_shared

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

    @cached_property
    def _bare(self) -> BareLayer | None:
        """None: something in a layer needs its stages even where nobody times them."""
        changes_routing = self.share_routing or self.capacity is not None
        is_watched = self.check_nan or self.observe is not None
        has_all, is_apart = self.has_all, self.may_be_apart
        is_plain = type(self.strategy) is Replicated or (is_apart and has_all)
        if changes_routing or is_watched or self.eval_layers or not is_plain:
            return None
        placement, levels = self.placement, self.levels_rows
        return BareLayer(placement, self.counted, has_all, is_apart, levels)

    @property
    def _without_stages(self) -> BareLayer | None:
        """None: somebody looks at the stages of this call, or stops between them."""
        is_cut = self.timings.enabled or self.overlap.turns is not None
        return None if is_cut or self.step.is_shared else self._bare

    @cached_property
    def has_all(self) -> bool:
        """Whether this rank serves every expert, in the slot of its number."""
        # Apart from the others it serves its own tokens by its own copies.
        served = self.placement if self.may_be_apart else self.placement.slots
        return served.has_all_in_order(self.comm.rank)

    def keeps_axes(self, num_tokens: int) -> bool:
        """Whether `weighted_sum` of a `CompleteRouting` keeps its leading axes."""
        if self._without_stages is None:
            return False
        return self.has_all or (num_tokens == 1 and not uses_metal())

    def weighted_sum(
        self,
        x: Float[mx.array, "... D"],
        routing: Routing,
        runner: Runner,
        extra: Float[mx.array, "T D"] | None = None,
    ) -> Float32[mx.array, "... D"]:
        """``sum_k gate_k * expert_k(x)`` of every token, over the experts of all ranks.

        Partial sums accumulate in float32: on a rank in slot order, over ranks in
        rank order, or in the order of the transport where it reduces (`replicated`,
        `gathered`). Long inputs go in rounds, where the strategy limits them.

        Args:
            x: [T, D], or what `keeps_axes` says.
            extra: what this rank has of another sum over the ranks, such as its part of
                the shared experts; that sum is added. Only with strategy `replicated`,
                where it joins the one collective of the layer.
        """
        if (bare := self._without_stages) is not None:
            total = bare.weighted_sum(x, routing, runner, extra, self.step.layer)
            if self.overlap.mode != "none":
                # What the block computes next runs while it is under way.
                mx.async_eval(total)
            return total
        assert extra is None or not self.strategy.is_sharded  # ranks' tokens differ

        def experts(rows: Rows) -> mx.array:
            partial = run_experts(rows, runner, self.counters)
            return partial if extra is None else partial + extra

        return self._layer(x, routing, self.strategy, self._used, experts)

    def slot_outputs(
        self, x: Float[mx.array, "T D"], routing: Routing, runner: Runner
    ) -> Float[mx.array, "T K D"]:
        """``expert_k(x)`` of every token and k, unweighted, in the dtype of x.

        Exactly one rank contributes each ``[t, k]``, the others add zeros: the
        result is bit-identical on any number of ranks. Moves K times the bytes of
        `weighted_sum`. Where ranks hold tokens of their own, these are gathered.
        """
        strategy: Strategy = Gathered() if self.strategy.is_sharded else Replicated()
        if self.is_apart:
            strategy = self.strategy
        num_tokens, top_k = routing.gates.shape

        def experts(rows: Rows) -> mx.array:
            return run_slots(rows, runner, self.counters).flatten(1)

        flat = self._layer(x, routing, strategy, self._limited, experts)
        return flat.reshape(num_tokens, top_k, x.shape[1])

    def _layer(
        self,
        x: Float[mx.array, "T D"],
        routing: Routing,
        strategy: Strategy,
        used: Callable[[Routing], Routing],
        experts: Callable[[Rows], mx.array],
    ) -> mx.array:
        """One layer: from tokens and routing to what the experts made of them.

        Args:
            used: the routing as it is used, from what the router decided.
            experts: what this rank computes of its rows, one line each.
        """
        self._check_numbers(x, "what comes to its experts")
        timings, before = self._timings, self.overlap.seconds_to_hide(self.timings)
        timings.begin(x)
        stage, barrier = self._stage, self.comm.barrier
        is_next = strategy.is_sharded or self.share_routing
        is_awaited = strategy.is_sharded and not self.is_apart
        routing = stage("route", used, routing, barrier=barrier if is_next else None)
        if self.observe is not None:
            self.observe(routing.expert_ids)
        outputs = []
        rounds = self._rounds(x, routing, strategy)
        for x_part, request in rounds:
            exchange = stage("assign", strategy.exchange, request)
            rows = stage("dispatch", exchange.dispatch, x_part)
            if strategy.is_sharded and self.overlap.turns is not None:
                moved = (rows.x, rows.slot_ids)
                self._take_turn("dispatch", x_part.shape[0], x_part, *moved)
            partial = stage("experts", experts, rows)
            self._check_numbers(partial, "what this rank's experts give")
            output = stage("combine", exchange.combine, partial, barrier=barrier)
            outputs.append(output)
            if self.overlap.turns is not None:
                self._take_turn("combine", x_part.shape[0], partial, output)
            elif is_awaited or self.overlap.mode != "none":
                # Peers wait for this rank's part, whether or not it uses the result;
                # and what the block computes next runs while it is under way.
                mx.async_eval(output)
            if len(rounds) > 1:
                # sync: the buffers of a round are freed before the next one starts.
                mx.eval(output)
        total = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        if self.timings.enabled and self.overlap.wanted != "none":
            seconds = self.overlap.seconds_to_hide(self.timings) - before
            alone = seconds if timings is self.timings else None
            self.overlap.measure_hidden(x.shape[0], total, alone)
        self._end(total)
        return total

    @property
    def _timings(self) -> StageTimings:
        """Those of stages; where what is hidden is timed too, of every second pass."""
        is_exposed = self.overlap.mode == "two" or (
            self.overlap.mode == "single" and self.step.number % 2 == 1
        )
        return _UNTIMED if is_exposed else self.timings

    def _take_turn(
        self, name: str, tokens: int, computed: mx.array, *results: mx.array
    ) -> None:
        """Start what a layer of a micro-batch exchanges; the other one goes on."""
        assert self.overlap.turns is not None
        layer = self.step.layer
        self.overlap.turns.take(Operation(name, layer, tokens, computed, results))

    def _stage(
        self,
        name: LayerStage,
        function: Callable[..., Any],
        *args: object,
        barrier: Callable[[], None] | None = None,
    ) -> Any:
        """A stage of a layer, known to the other ranks and timed."""
        note_layer(self.step.layer, name)
        timings = self._timings
        if not timings.enabled:
            return function(*args)
        return timings.run(name, function, *args, barrier=barrier)

    def _end(self, output: mx.array) -> None:
        """The layer is built; a prompt is evaluated at the boundary of a group."""
        self._timings.end()
        note_layer(self.step.layer, "evaluating up to here")
        self._check_numbers(output, "what the experts of all ranks give")
        is_prompt = output.size > MOST_DECODE_TOKENS * output.shape[-1]
        if self.eval_layers and is_prompt and self.step.calls % self.eval_layers == 0:
            # sync: Metal ends a command buffer that waits for a slow rank for 5 s.
            mx.eval(output)

    def _check_numbers(self, array: mx.array, what: str) -> None:
        """Raises FloatingPointError where NaN is among them, and that was asked."""
        # sync: only with `check_nan`.
        if self.check_nan and bool(mx.isnan(array).any().item()):
            raise FloatingPointError(
                f"NaN on rank {self.comm.rank}, layer {self.step.layer}: in {what}"
            )

    def _rounds(
        self, x: Float[mx.array, "T D"], routing: Routing, strategy: Strategy
    ) -> list[tuple[mx.array, ExchangeRequest]]:
        """The tokens of each round, and what its exchange is asked for."""
        tokens, limit = self._token_counts(x.shape[0], strategy), strategy.round_tokens
        whole = ExchangeRequest(
            routing,
            self.placement,
            self.counted,
            self.sum_dtype or x.dtype,
            tokens,
            self.levels_rows,
            self.dispatch_dtype,
            self.step.is_shared,
        )
        if tokens is None or limit is None or tokens.num_rounds(limit) == 1:
            return [(x, whole)]
        rounds = []
        for index in range(tokens.num_rounds(limit)):
            part = slice(index * limit, (index + 1) * limit)
            own = Routing(routing.expert_ids[part], routing.gates[part])
            counts = tokens.of_round(index, limit)
            rounds.append((x[part], whole._replace(routing=own, tokens=counts)))
        return rounds

    def local_slot_outputs(
        self, x: Float[mx.array, "T D"], routing: Routing, runner: Runner
    ) -> Float[mx.array, "T K D"]:
        """``expert_k(x)`` of this rank's experts, exact zeros for the others.

        For ranks that hold the same tokens. What is made of it on each rank has to go
        through `sum_parts`.
        """
        self._check_numbers(x, "what comes to its experts")
        self._timings.begin(x)
        stage = self._stage
        ids, gates = stage("route", self._limited, routing)
        if self.observe is not None:
            self.observe(ids)
        slot_ids = stage("assign", self._own_slots, ids)
        rows = Rows(x, slot_ids, gates)
        outputs: mx.array = stage("experts", run_slots, rows, runner, self.counters)
        self._check_numbers(outputs, "what this rank's experts give")
        return outputs

    def _own_slots(self, expert_ids: mx.array) -> mx.array:
        rank, levels = self.comm.rank, self.levels_rows
        return serving_local_slots(expert_ids, self.placement, rank, levels)

    def sum_parts(self, part: Shaped[mx.array, ...]) -> Shaped[mx.array, ...]:
        """The sum of the ranks' parts; ends the layer that `local_slot_outputs` began.

        Args:
            part: of the same shape and dtype on every rank.
        """
        all_reduce, barrier = self.counted.all_reduce, self.comm.barrier
        total: mx.array = self._stage("combine", all_reduce, part, barrier=barrier)
        if self.overlap.turns is not None:
            self._take_turn("combine", part.shape[0], part, total)
        self._end(total)
        return total

    def _token_counts(self, num_tokens: int, strategy: Strategy) -> TokenCounts | None:
        if self.is_apart:
            return None
        if self.step.tokens is None and strategy.needs_tokens:
            return agree_tokens(num_tokens, self.counted)
        if self.step.tokens is None or not strategy.is_sharded:
            return None
        # Here and not in each round, where some ranks would find it and some not.
        check_tokens(self.step.tokens, num_tokens, self.comm)
        return self.step.tokens

    def _used(self, routing: Routing) -> Routing:
        is_agreed = self.share_routing and not self.strategy.is_sharded
        agreed = rank_0_routing(routing, self.counted) if is_agreed else routing
        return agreed if self.capacity is None else self._limited(agreed)

    def _limited(self, routing: Routing) -> Routing:
        """The routing within the capacity; what is dropped is counted and warned of."""
        if self.capacity is None:
            return routing
        return self.step.limited(routing, self.capacity, self.comm.rank)
