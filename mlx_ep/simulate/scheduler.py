"""What one instance runs in its next step, as vLLM's engine decides it.

One budget of tokens per step. Running requests come first, in the order they were
admitted, then waiting ones in order of arrival; a long prompt is cut into chunks. A
request that finds no block for its next token takes those of the youngest, which is
computed again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_ep.simulate.blocks import BlockPool
from mlx_ep.simulate.requests import ServedRequest
from mlx_ep.simulate.settings import EngineSettings


@dataclass(eq=False)
class StepBatch:
    """What one instance computes in one step.

    Attributes:
        prefills: (chunk, tokens before it) of each request that computes several.
        decodes: the keys that each single token sees, itself included.
        making: requests that get a token, in the order of `scheduled`.
        firsts: of these, those that get their first.
        lasts: of these, those that get their last.
    """

    prefills: list[tuple[int, int]] = field(default_factory=list)
    decodes: list[int] = field(default_factory=list)
    making: list[ServedRequest] = field(default_factory=list)
    firsts: list[ServedRequest] = field(default_factory=list)
    lasts: list[ServedRequest] = field(default_factory=list)

    @property
    def prefill_tokens(self) -> int:
        return sum(chunk for chunk, _ in self.prefills)

    @property
    def num_tokens(self) -> int:
        return self.prefill_tokens + len(self.decodes)

    def make_token(self, request: ServedRequest, step: int) -> None:
        """The request gets its next token at the end of this step."""
        request.made += 1
        request.emit(step)
        self.making.append(request)
        if request.made == 1:
            self.firsts.append(request)
        if request.made >= request.wanted:
            self.lasts.append(request)


class Scheduler:
    """The queues of one instance.

    Args:
        leaves_after_first: the instance only prefills; a request leaves after its first
            token.
    """

    def __init__(
        self, settings: EngineSettings, num_blocks: int, leaves_after_first: bool
    ) -> None:
        self.settings = settings
        self.pool = BlockPool(num_blocks)
        self.waiting: deque[ServedRequest] = deque()
        self.running: list[ServedRequest] = []
        self._leaves_after_first = leaves_after_first
        self._was_preempted = False
        # The first waiting request finds no blocks, and will not before some are freed.
        self._is_blocked = False

    @property
    def load(self) -> int:
        """vLLM's measure of how busy it is."""
        return 4 * len(self.waiting) + len(self.running)

    def add(self, request: ServedRequest) -> None:
        """A request that arrives here."""
        request.wanted = 1 if self._leaves_after_first else request.outputs
        self.waiting.append(request)

    def schedule(
        self, now: int, step: int, busy: frozenset[int], in_flight: Sequence[StepBatch]
    ) -> StepBatch:
        """The batch of a step, with everything counted as if it had run.

        Args:
            now: ns.
            step: its number.
            busy: ids of requests that may not be scheduled again yet.
            in_flight: steps that were scheduled and have not ended.
        """
        batch = StepBatch()
        budget = self.settings.token_budget
        self._was_preempted = self._is_blocked = False
        index = 0
        decodes, making, size = batch.decodes, batch.making, self.settings.block_size
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            index += 1
            if request.made >= request.wanted or id(request) in busy:
                continue
            computed = request.computed
            if request.made and request.total - computed == 1:  # what most steps are
                if computed >= request.room and not self._make_room(
                    request, 1, in_flight
                ):
                    break
                request.computed = computed = computed + 1
                request.total += 1
                request.made += 1
                request.emit(step)
                decodes.append(computed)
                making.append(request)
                if request.made == request.wanted:
                    batch.lasts.append(request)
                if request.names and computed % size == 0:
                    self._name_blocks(request)
                budget -= 1
                continue
            chunk = self._chunk(request, budget)
            if not self._make_room(request, chunk, in_flight):
                break
            self._compute(batch, request, chunk, step)
            budget -= chunk
        if not self._was_preempted:
            self._admit(batch, now, step, budget)
        return batch

    def _chunk(self, request: ServedRequest, budget: int) -> int:
        chunk = request.total - request.computed
        threshold = self.settings.long_prefill_token_threshold
        if 0 < threshold < chunk:
            chunk = threshold
        return min(chunk, budget)

    def _blocks_for(self, request: ServedRequest, tokens: int) -> int:
        size = self.settings.block_size
        return -(-tokens // size) - request.num_blocks

    def _make_room(
        self, request: ServedRequest, chunk: int, in_flight: Sequence[StepBatch]
    ) -> bool:
        """Blocks for a running request; the youngest make room. False: it was it."""
        need = self._blocks_for(request, request.computed + chunk)
        while need > 0 and not self.pool.take(need):
            victim = self.running.pop()
            self._preempt(victim, in_flight)
            if victim is request:
                return False
        self._own(request, need)
        return True

    def _own(self, request: ServedRequest, blocks: int) -> None:
        request.own_blocks += max(blocks, 0)
        request.room = request.num_blocks * self.settings.block_size

    def _preempt(self, request: ServedRequest, in_flight: Sequence[StepBatch]) -> None:
        self.pool.give_back(request.own_blocks, request.shared)
        for batch in in_flight:
            if any(other is request for other in batch.making):
                request.take_back()
                for found in (batch.making, batch.firsts, batch.lasts):
                    found[:] = [other for other in found if other is not request]
        request.own_blocks, request.shared, request.named = 0, [], 0
        request.computed = request.room = 0
        request.total = request.asked.input_tokens + request.made
        request.preempted += 1
        self.waiting.appendleft(request)
        self._was_preempted = True

    def _admit(self, batch: StepBatch, now: int, step: int, budget: int) -> None:
        settings, pool = self.settings, self.pool
        while self.waiting and budget > 0 and len(self.running) < settings.max_num_seqs:
            request = self.waiting[0]
            # At least one token is computed, or there would be nothing to sample from.
            names = request.names[: (request.total - 1) // settings.block_size]
            names = names[: pool.known(names)] if request.computed == 0 else []
            start = len(names) * settings.block_size or request.computed
            chunk = request.total - start
            if 0 < settings.long_prefill_token_threshold < chunk:
                chunk = settings.long_prefill_token_threshold
            if chunk > budget:
                if not settings.enable_chunked_prefill:
                    break
                chunk = budget
            reach = request.total if settings.reserve_full_isl else start + chunk
            held = request.num_blocks or len(names)
            free = pool.num_free - pool.unused_of(names)
            if -(-reach // settings.block_size) - held > free:
                self._is_blocked = not request.names
                break
            self.waiting.popleft()
            if names:
                pool.share(names)
                request.shared = list(names)
                request.named = len(names)
            request.computed = start
            need = self._blocks_for(request, start + chunk)
            taken = pool.take(max(need, 0))
            assert taken
            self._own(request, need)
            self.running.append(request)
            if request.scheduled < 0:
                request.scheduled = now
            self._compute(batch, request, chunk, step)
            budget -= chunk

    def _compute(
        self, batch: StepBatch, request: ServedRequest, chunk: int, step: int
    ) -> None:
        if chunk == 1:
            batch.decodes.append(request.computed + 1)
        else:
            batch.prefills.append((chunk, request.computed))
        request.computed += chunk
        self._name_blocks(request)
        if request.computed < request.total:
            return
        request.total += 1
        batch.make_token(request, step)

    def _name_blocks(self, request: ServedRequest) -> None:
        """Blocks that are full of known tokens can be found by others from now on."""
        full = min(request.computed // self.settings.block_size, len(request.names))
        while request.named < full:
            name = request.names[request.named]
            request.named += 1
            if self.pool.name(name):
                request.own_blocks -= 1
                request.shared.append(name)

    def finish(self, request: ServedRequest) -> None:
        """It has its last token."""
        self.running.remove(request)
        self.pool.give_back(request.own_blocks, request.shared)
        request.own_blocks, request.shared, request.room = 0, [], 0
        self._is_blocked = False

    def steps_alike(self) -> int:
        """For how many steps from now on every running request makes one token, and
        nothing else changes; 0: the next step has to be scheduled by itself.
        """
        if not self.running:
            return 1 << 40 if not self.waiting else 0
        if self.waiting and self._may_admit():
            return 0
        if len(self.running) > self.settings.token_budget:
            return 0
        left = 1 << 40
        for request in self.running:
            if request.total - request.computed != 1 or not request.made:
                return 0
            left = min(left, request.wanted - request.made)
        return self._steps_in_blocks(left) if left > 0 else 0

    def _may_admit(self) -> bool:
        if self._is_blocked or len(self.running) >= self.settings.max_num_seqs:
            return False
        return len(self.running) < self.settings.token_budget

    def _steps_in_blocks(self, steps: int) -> int:
        """At most so many, and no more than there are blocks for."""
        size = self.settings.block_size
        computed = np.array([r.computed for r in self.running], np.int64)  # on host
        blocks = np.array([r.num_blocks for r in self.running], np.int64)  # on host

        def need(count: int) -> int:
            return int((-(-(computed + count) // size) - blocks).sum())

        if need(steps) <= self.pool.num_free:
            return steps
        low, high = 0, steps
        while high - low > 1:
            middle = (low + high) // 2
            if need(middle) <= self.pool.num_free:
                low = middle
            else:
                high = middle
        return low

    def advance(self, steps: int, first_step: int) -> StepBatch:
        """Schedule so many steps that are alike.

        Returns:
            The batch of the last of them.
        """
        last = StepBatch()
        for request in self.running:
            last.decodes.append(request.computed + steps)
            need = self._blocks_for(request, request.computed + steps)
            if need > 0:
                taken = self.pool.take(need)
                assert taken
                self._own(request, need)
            request.computed += steps
            request.total += steps
            request.made += steps
            request.emit(first_step, steps)
            if request.names:
                self._name_blocks(request)
            last.making.append(request)
            if request.made >= request.wanted:
                last.lasts.append(request)
        return last
