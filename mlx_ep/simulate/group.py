"""Instances that step together, in time: one engine, or the members of a dp_group.

An engine's loop: schedule a step; while fewer steps are in flight than its depth, go
on; else wait for the oldest to end and hand out its tokens. With asynchronous
scheduling the depth is 2: what arrives during a step is in the one after the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from mlx_ep.simulate.cluster import Instance
from mlx_ep.simulate.requests import ServedRequest
from mlx_ep.simulate.scheduler import Scheduler, StepBatch
from mlx_ep.simulate.server_scheduler import ServerScheduler, server_schedulers
from mlx_ep.simulate.steps import StepLog, Stretch

# Most steps that are computed at once: arrays stay small, whatever the trace.
MOST_STEPS = 1024


@runtime_checkable
class StepTimes(Protocol):
    """What a step takes, of a group of instances that step together."""

    def stage_ns(
        self, batches: Sequence[StepBatch], steps: int, first_step: int
    ) -> np.ndarray:
        """``[stages, steps]`` ns of `steps` steps, of which the first is given.

        In each following step every decode sees one key more.
        """
        ...


class _InFlight(NamedTuple):
    batches: Sequence[StepBatch]
    end: int


class Group:
    """Schedulers in lock step.

    Attributes:
        time: when its loop goes on, ns; None: it waits for a request.
    """

    def __init__(self, instances: Sequence[Instance], times: StepTimes) -> None:
        first = instances[0]
        self.instances = list(instances)
        self.is_server = first.settings.scheduler == "mlx_ep"
        self.members: Sequence[Scheduler | ServerScheduler] = (
            server_schedulers(instances)
            if self.is_server
            else [
                Scheduler(i.settings, i.pool.num_blocks, i.pd_type == "prefill")
                for i in instances
            ]
        )
        self.log = StepLog()
        self.time: int | None = None
        self._times = times
        self._is_piped = first.pp > 1
        is_async = first.settings.async_scheduling and not self.is_server
        self._depth = first.pp if self._is_piped else 1 + is_async
        self._in_flight: deque[_InFlight] = deque()
        self._free = [0] * first.pp

    def wake(self, now: int) -> None:
        """A request came: an idle loop goes on."""
        if self.time is None:
            self.time = now

    def iterate(self, until: int) -> list[ServedRequest]:
        """One round of the loop, or many that are alike and begin before `until`.

        Returns:
            Requests that got their last token here.
        """
        assert self.time is not None
        steps = self._steps_alike()
        if steps > 1:
            return self._many(min(steps, MOST_STEPS), until)
        return self._one()

    def _one(self) -> list[ServedRequest]:
        now, step = self.time, self.log.count
        assert now is not None
        flying = [entry.batches for entry in self._in_flight]
        busy: frozenset[int] = frozenset()
        if self._is_piped:  # a stage needs the token that the last stage makes
            busy = frozenset(
                id(r) for batches in flying for batch in batches for r in batch.making
            )
        batches = [
            member.schedule(now, step, busy, [batches[index] for batches in flying])
            for index, member in enumerate(self.members)
        ]
        if any(batch.num_tokens for batch in batches):
            stages = self._times.stage_ns(batches, 1, step)[:, 0]
            end = now
            for stage, duration in enumerate(stages.tolist()):  # on host
                end = max(end, self._free[stage]) + int(duration)
                self._free[stage] = end
            self._record(np.array([end]), batches, 1)  # on host
            self._in_flight.append(_InFlight(batches, end))
            if len(self._in_flight) < self._depth:
                return []
        if not self._in_flight:
            self.time = None
            return []
        return self._pop()

    def _steps_alike(self) -> int:
        if self._is_piped or len(self._in_flight) != self._depth - 1:
            return 0
        for batches, _ in self._in_flight:
            if any(batch.lasts for batch in batches):
                return 0
        if not any(member.running for member in self.members):
            return 0
        return min(member.steps_alike() for member in self.members)

    def _many(self, steps: int, until: int) -> list[ServedRequest]:
        """`_one` so many times, as far as the rounds begin before `until`."""
        now, first = self.time, self.log.count
        assert now is not None
        batches = [
            StepBatch(decodes=[r.computed + 1 for r in member.running])
            for member in self.members
        ]
        durations = self._times.stage_ns(batches, steps, first)[0]
        ends = max(now, self._free[0]) + np.cumsum(durations)
        before = [entry.end for entry in self._in_flight]
        rounds = np.concatenate([[now], before, ends])[:steps]
        steps = max(1, int(np.searchsorted(rounds, until, side="left")))
        ends = ends[:steps]
        self._record(ends, batches, steps)
        last = [member.advance(steps, first) for member in self.members]
        self._free[0] = int(ends[-1])
        flying = list(self._in_flight)
        self._in_flight.clear()
        for entry in flying:
            self._hand_out(entry)
        # Of the last ones `depth - 1` are still running.
        popped = steps - (self._depth - 1)
        if self._depth == 1:
            return self._hand_out(_InFlight(last, int(ends[-1])))
        self.time = int(ends[popped - 1]) if popped else flying[-1].end
        self._in_flight.append(_InFlight(last, int(ends[-1])))
        return []

    def _record(
        self, ends: np.ndarray, batches: Sequence[StepBatch], steps: int
    ) -> None:
        used = [
            i.pool.used_bytes(m.pool.num_used)
            for i, m in zip(self.instances, self.members)
        ]
        full = [m.pool.num_used / m.pool.num_blocks for m in self.members]
        made = sum(len(b.making) or len(b.decodes) for b in batches)
        self.log.add(
            ends,
            Stretch(
                self.log.count,
                steps,
                sum(b.prefill_tokens for b in batches),
                made,
                sum(len(m.running) for m in self.members),
                sum(len(m.waiting) for m in self.members),
                max(used),
                max(full),
            ),
        )

    def _pop(self) -> list[ServedRequest]:
        return self._hand_out(self._in_flight.popleft())

    def _hand_out(self, entry: _InFlight) -> list[ServedRequest]:
        """The oldest step has ended."""
        self.time = entry.end
        done: list[ServedRequest] = []
        for batch, member in zip(entry.batches, self.members):
            for request in batch.firsts:
                if request.first < 0:
                    request.first = entry.end
            for request in batch.lasts:
                member.finish(request)
                done.append(request)
        return done
