"""A simulator written plainly: one token at a time, one block at a time.

The oracle of `mlx_ep.simulate`: the same rules, with nothing shared but what a step
takes. Steps of groups of one pipeline stage; no prefill/decode instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from mlx_ep.simulate.cluster import Cluster
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.traces import Trace


class PlainRequest:
    def __init__(self, index: int, arrival: int, asked: Any, follow: Any) -> None:
        self.index, self.arrival, self.asked, self.follow = (
            index, arrival, asked, follow,
        )  # fmt: skip
        known = None
        if asked.input_ids is not None:
            known = list(asked.input_ids) + list(asked.output_ids or ())
        self.known = known
        self.computed = 0
        self.made = 0
        self.blocks: list[int] = []
        self.scheduled = -1
        self.instance = -1
        self.token_times: list[int] = []
        self.end = -1

    @property
    def total(self) -> int:
        return self.asked.input_tokens + self.made


class PlainPool:
    """Blocks by number; a block may have a name, which is all tokens up to its end."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count))
        self.names: dict[int, tuple[int, ...]] = {}
        self.by_name: dict[tuple[int, ...], int] = {}
        self.users: dict[int, int] = {}
        self.unused: list[int] = []

    def available(self) -> int:
        return len(self.free) + len(self.unused)

    def take(self) -> int:
        if self.free:
            block = self.free.pop()
        else:
            block = self.unused.pop(0)
            del self.by_name[self.names.pop(block)]
        self.users[block] = 1
        return block

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if self.users[block]:
                continue
            if block in self.names:
                self.unused.append(block)
            else:
                self.free.append(block)

    def share(self, block: int) -> None:
        self.users[block] += 1
        if block in self.unused:
            self.unused.remove(block)


class PlainInstance:
    def __init__(self, instance: Any) -> None:
        self.instance, self.settings = instance, instance.settings
        self.pool = PlainPool(instance.pool.num_blocks)
        self.waiting: list[PlainRequest] = []
        self.running: list[PlainRequest] = []

    def load(self) -> int:
        return 4 * len(self.waiting) + len(self.running)

    def prefix(self, request: PlainRequest) -> list[int]:
        size, found = self.settings.block_size, []
        known = request.known or []
        if not self.settings.enable_prefix_caching:
            return []
        for end in range(size, min(len(known), request.total - 1) + 1, size):
            block = self.pool.by_name.get(tuple(known[:end]))
            if block is None:
                break
            found.append(block)
        return found

    def chunk(self, request: PlainRequest, start: int, budget: int) -> int:
        chunk = request.total - start
        if self.settings.long_prefill_token_threshold:
            chunk = min(chunk, self.settings.long_prefill_token_threshold)
        return min(chunk, budget)

    def schedule(
        self, now: int, flying: list[list[tuple[PlainRequest, bool, bool]]]
    ) -> tuple[StepBatch, list[tuple[PlainRequest, bool, bool]]]:
        settings, batch = self.settings, StepBatch()
        marks: list[tuple[PlainRequest, bool, bool]] = []
        budget = settings.max_num_batched_tokens or 10**18
        preempted = False
        for request in list(self.running):
            if budget <= 0:
                break
            if (
                request not in self.running
                or request.made >= request.asked.output_tokens
            ):
                continue
            chunk = self.chunk(request, request.computed, budget)
            need = -(-(request.computed + chunk) // settings.block_size)
            lost = False
            while need - len(request.blocks) > self.pool.available() and not lost:
                victim = self.running.pop()
                preempted = True
                self.pool.release(victim.blocks)
                victim.blocks, victim.computed = [], 0
                for entry in flying:
                    for mark in list(entry):
                        if mark[0] is victim:
                            entry.remove(mark)
                            victim.made -= 1
                self.waiting.insert(0, victim)
                lost = victim is request
            if lost:
                break
            self.compute(batch, marks, request, chunk)
            budget -= chunk
        while (
            not preempted
            and self.waiting
            and budget > 0
            and len(self.running) < settings.max_num_seqs
        ):
            request = self.waiting[0]
            shared = self.prefix(request) if not request.computed else []
            start = request.computed or len(shared) * settings.block_size
            wanted = request.total - start
            if settings.long_prefill_token_threshold:
                wanted = min(wanted, settings.long_prefill_token_threshold)
            if wanted > budget and not settings.enable_chunked_prefill:
                break
            chunk = min(wanted, budget)
            reach = request.total if settings.reserve_full_isl else start + chunk
            revived = sum(block in self.pool.unused for block in shared)
            need = -(-reach // settings.block_size) - len(shared)
            if need > self.pool.available() - revived:
                break
            self.waiting.pop(0)
            for block in shared:
                self.pool.share(block)
            request.blocks = list(shared)
            request.computed = start
            self.running.append(request)
            if request.scheduled < 0:
                request.scheduled = now
            self.compute(batch, marks, request, chunk)
            budget -= chunk
        return batch, marks

    def compute(
        self,
        batch: StepBatch,
        marks: list[tuple[PlainRequest, bool, bool]],
        request: PlainRequest,
        chunk: int,
    ) -> None:
        size = self.settings.block_size
        if chunk == 1:
            batch.decodes.append(request.computed + 1)
        else:
            batch.prefills.append((chunk, request.computed))
        for _ in range(chunk):
            if request.computed % size == 0:
                request.blocks.append(self.pool.take())
            request.computed += 1
            known = request.known or []
            done = request.computed
            if (
                self.settings.enable_prefix_caching
                and done % size == 0
                and done <= len(known)
            ):
                name, block = tuple(known[:done]), request.blocks[done // size - 1]
                if name not in self.pool.by_name:
                    self.pool.by_name[name] = block
                    self.pool.names[block] = name
        if request.computed == request.total:
            request.made += 1
            last = request.made == request.asked.output_tokens
            marks.append((request, request.made == 1, last))


class PlainGroup:
    def __init__(self, instances: Sequence[Any], times: Any) -> None:
        self.members = [PlainInstance(instance) for instance in instances]
        self.times = times
        self.depth = 2 if instances[0].settings.async_scheduling else 1
        self.flying: list[tuple[int, list[list[tuple[PlainRequest, bool, bool]]]]] = []
        self.time: int | None = None
        self.free = 0
        self.steps = 0

    def loop(self) -> list[PlainRequest]:
        """One round. Returns what is done."""
        assert self.time is not None
        batches, marks = [], []
        for index, member in enumerate(self.members):
            batch, own = member.schedule(
                self.time, [entry[index] for _, entry in self.flying]
            )
            batches.append(batch)
            marks.append(own)
        if any(batch.num_tokens for batch in batches):
            duration = int(self.times.stage_ns(batches, 1, self.steps)[0, 0])
            self.steps += 1
            self.free = max(self.free, self.time) + duration
            self.flying.append((self.free, marks))
            if len(self.flying) < self.depth:
                return []
        if not self.flying:
            self.time = None
            return []
        self.time, marks = self.flying.pop(0)
        done = []
        for member, own in zip(self.members, marks):
            for request, _, last in own:
                request.token_times.append(self.time)
                if last:
                    request.end = self.time
                    member.running.remove(request)
                    member.pool.release(request.blocks)
                    done.append(request)
        return done


def plain_csv(cluster: Cluster, trace: Trace, times: Sequence[Any]) -> str:
    """The CSV of a trace served with LOAD routing."""
    groups = [PlainGroup(g, t) for g, t in zip(cluster.groups, times)]
    places = sorted(
        ((m.instance.index, group, m) for group in groups for m in group.members),
        key=lambda place: place[0],
    )
    arrivals: list[tuple[int, int, PlainRequest]] = []
    index = order = 0
    for session in trace.sessions:
        first = PlainRequest(index, session[0].arrival, session[0], session[1:])
        arrivals.append((first.arrival, order, first))
        index, order = index + len(session), order + 1
    done: list[PlainRequest] = []
    while True:
        live = [group for group in groups if group.time is not None]
        arrivals.sort(key=lambda entry: entry[:2])
        group = min(live, key=lambda g: g.time or 0, default=None)
        if arrivals and (group is None or arrivals[0][0] <= (group.time or 0)):
            now, _, request = arrivals.pop(0)
            number, owner, member = min(places, key=lambda place: place[2].load())
            request.instance = number
            member.waiting.append(request)
            if owner.time is None:
                owner.time = now
            continue
        if group is None:
            break
        for request in group.loop():
            done.append(request)
            if request.follow:
                after = request.follow[0]
                arrival = request.end + after.arrival
                new = PlainRequest(
                    request.index + 1, arrival, after, request.follow[1:]
                )
                arrivals.append((arrival, order, new))
                order += 1
    lines = [
        "instance id,request id,model,input,output,arrival,end_time,latency,"
        "queuing_delay,TTFT,TPOT,ITL"
    ]
    model = cluster.instances[0].model.name
    for request in sorted(done, key=lambda r: (r.end, r.index)):
        ends = request.token_times
        gaps = [after - before for before, after in pairwise(ends)]
        latency, ttft = request.end - request.arrival, ends[0] - request.arrival
        tpot = (latency - ttft) // len(gaps) if gaps else 0
        itl = f'"{gaps}"' if len(gaps) > 1 else str(gaps)
        asked = request.asked
        lines.append(
            f"{request.instance},{request.index},{model},{asked.input_tokens},"
            f"{asked.output_tokens},{request.arrival},{request.end},{latency},"
            f"{request.scheduled - request.arrival},{ttft},{tpot},{itl}"
        )
    return "\n".join(lines) + "\n"
