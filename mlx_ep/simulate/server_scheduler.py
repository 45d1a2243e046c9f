"""What one instance runs in its next step, as this package's own server decides it.

`mlx_ep.server.scheduler.RequestScheduler` and `PrefixCache` are the server's own: who
enters, whose prompt goes on by how much, what of a prompt is known. What is here is the
turn around them (`ServingEngine._turn`, `Worker.step`), with tokens counted only:

    decide -> the pass over one more token of all sequences whose prompts are processed
           -> those with their last token leave -> one chunk of prompts

With look-ahead, the default, that pass begins before anybody has seen the tokens of the
last one, so that a sequence that ended has one more row in it; without, it comes last,
and has those whose prompts ended in this turn.

With attention of their own, the members of a group have one queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_ep.server.prefix_cache import KEEP_PROMPT, PrefixCache, PrefixHit
from mlx_ep.server.requests import Request
from mlx_ep.server.scheduler import PATIENCE, Decision, RequestScheduler
from mlx_ep.server.sizes import KvSizes
from mlx_ep.simulate.cluster import Instance
from mlx_ep.simulate.requests import ServedRequest
from mlx_ep.simulate.scheduler import StepBatch
from mlx_ep.simulate.traces import TraceRequest

KEPT_PART = 4  # of the memory for KV caches, a quarter keeps prefixes
UNKNOWN = -1  # a token that the trace does not say: in no prefix
NO_LIMIT = 1 << 60  # requests that wait: clients that are refused would ask again


@dataclass(eq=False)
class _Sequence:
    """A request that has a place; `left` tokens of its prompt are not processed."""

    served: ServedRequest
    request: Request
    place: int
    owner: int
    left: int
    cached: int
    is_row: bool = False  # of the batch that decodes

    @property
    def is_done(self) -> bool:
        return self.served.made >= self.served.wanted


@dataclass
class CountedPool:
    """KV blocks in use, for the log: what `BlockPool` says of them."""

    num_blocks: int
    num_used: int = 0


class ServerQueue:
    """One server: the queue of a group, and its turns.

    Args:
        instances: each an owner of sequences. One has all the devices of its `tp`.
    """

    def __init__(self, instances: Sequence[Instance]) -> None:
        first = instances[0]
        self.settings = first.settings
        self.sizes = KvSizes(round(first.pool.block_bytes / first.pool.block_size))
        self._instances = list(instances)
        keeps = self.settings.enable_prefix_caching
        kept = [int(i.pool.pool_bytes) // KEPT_PART * keeps for i in instances]
        self._prefixes = [PrefixCache(limit) for limit in kept]
        self.limits = [int(i.pool.pool_bytes) - k for i, k in zip(instances, kept)]
        self.policy = RequestScheduler(
            self.sizes,
            self.limits,
            places=self.settings.max_num_seqs,
            most_waiting=NO_LIMIT,
            prefill_step=self.settings.prefill_step,
            find=self._find,
            clock=lambda: 0.0,
        )
        self._asked: dict[str, ServedRequest] = {}
        self._by_place: dict[int, _Sequence] = {}
        self.members: list[list[_Sequence]] = [[] for _ in instances]
        self._ended: list[_Sequence] = []
        self._is_blocked = False
        self.batches: list[StepBatch] = []

    def _find(self, owner: int, tokens: Sequence[int]) -> PrefixHit | None:
        is_known = len(tokens) and tokens[0] != UNKNOWN
        return self._prefixes[owner].find(tokens) if is_known else None

    def add(self, served: ServedRequest) -> None:
        served.wanted = served.outputs
        request = request_of(served.asked, str(len(self._asked)))
        self._asked[request.id] = served
        self.policy.add(request)

    def turn(self, now: int, step: int) -> None:
        """One step of all members; the next that has something to compute."""
        while True:
            self.batches = self._turn(now, step)
            has_work = bool(self._by_place) or self.policy.num_waiting > 0
            if any(batch.num_tokens for batch in self.batches) or not has_work:
                return

    def _turn(self, now: int, step: int) -> list[StepBatch]:
        decision = self.policy.decide()
        self._is_blocked = self.policy.num_waiting > 0
        batches = [StepBatch() for _ in self._instances]
        looks_ahead = self.settings.async_scheduling
        if looks_ahead:
            self._pass(batches, [s for s in self._by_place.values() if s.is_row], step)
        for sequence in self._ended:
            self._leave(sequence)
        self._ended = []
        self._enter(decision, now)
        for owner, chunks in decision.prefill.items():
            self._prefill(batches[owner], owner, chunks)
        for sequence in self._by_place.values():
            sequence.is_row = sequence.left == 0
        if not looks_ahead:
            self._pass(batches, [s for s in self._by_place.values() if s.is_row], step)
        return batches

    def _pass(
        self, batches: Sequence[StepBatch], rows: Sequence[_Sequence], step: int
    ) -> None:
        """One more token of all sequences whose prompts are processed."""
        if all(sequence.is_done for sequence in rows):
            return  # for nobody
        for sequence in rows:
            _draw(batches[sequence.owner], sequence.served, step)

    def _enter(self, decision: Decision, now: int) -> None:
        for place, owner, request, hit in decision.enter:
            served = self._asked[request.id]
            cached = hit.num_tokens if hit else 0
            if hit:
                self._prefixes[owner].use(hit.entry)
            left = max(0, len(request.tokens) - 1 - cached)
            sequence = _Sequence(served, request, place, owner, left, cached)
            served.scheduled, served.computed = now, cached
            served.instance = served.entry = self._instances[owner].index
            self._by_place[place] = sequence
            self.members[owner].append(sequence)

    def _prefill(
        self, batch: StepBatch, owner: int, chunks: Sequence[tuple[int, int]]
    ) -> None:
        longest = max(count for _, count in chunks)
        for place, count in chunks:
            sequence = self._by_place[place]
            # Those that are shorter are padded.
            batch.prefills.append((longest, sequence.served.computed))
            sequence.served.computed += count
            sequence.left -= count
            new = sequence.served.computed - sequence.cached
            if not sequence.left and new >= KEEP_PROMPT:
                self._keep(owner, sequence.request.tokens[: sequence.served.computed])

    def _leave(self, sequence: _Sequence) -> None:
        """It has its last token, and all have heard of it."""
        known = sequence.request.tokens + (sequence.served.asked.output_ids or ())
        self._keep(sequence.owner, known[: sequence.served.computed])
        self.members[sequence.owner].remove(sequence)
        del self._by_place[sequence.place]
        self.policy.ended(sequence.place, sequence.request.id)
        self._is_blocked = False

    def _keep(self, owner: int, tokens: Sequence[int]) -> None:
        prefixes, num_bytes = self._prefixes[owner], self.sizes.held(len(tokens))
        if tokens[0] != UNKNOWN and prefixes.has_room_for(num_bytes):
            prefixes.put(tokens, num_bytes, None)

    def finish(self, served: ServedRequest) -> None:
        """Its last token is there; the turn to come hears of it."""
        found = (s for s in self._by_place.values() if s.served is served)
        self._ended.append(next(found))

    def steps_alike(self) -> int:
        """See `Scheduler.steps_alike`."""
        if not self._by_place:
            return 1 << 40 if not self.policy.num_waiting else 0
        if self._ended or (self.policy.num_waiting and not self._is_blocked):
            return 0
        sequences = self._by_place.values()
        if any(s.left or not s.served.made for s in sequences):
            return 0
        return min(s.served.wanted - s.served.made for s in sequences)

    def repeat(self, steps: int) -> None:
        """Decide for so many steps that are alike."""
        # More only counts how long nobody's prompt has been passed over.
        for _ in range(min(steps, PATIENCE + 1)):
            self.policy.decide()


class ServerScheduler:
    """One member of a group, with the interface of `Scheduler`."""

    def __init__(self, queue: ServerQueue, owner: int, instance: Instance) -> None:
        self._queue, self._owner = queue, owner
        self._blocks = instance.pool.num_blocks
        self._size = instance.pool.block_size

    @property
    def running(self) -> list[ServedRequest]:
        return [sequence.served for sequence in self._queue.members[self._owner]]

    @property
    def waiting(self) -> range:
        """As long as the queue; that of a group counts once."""
        return range(self._queue.policy.num_waiting if self._owner == 0 else 0)

    @property
    def load(self) -> int:
        policy = self._queue.policy
        return 4 * policy.num_waiting + len(policy.places)

    @property
    def pool(self) -> CountedPool:
        used = sum(-(-request.computed // self._size) for request in self.running)
        return CountedPool(self._blocks, used)

    def add(self, request: ServedRequest) -> None:
        """See `Scheduler.add`."""
        self._queue.add(request)

    def problem(self, asked: TraceRequest) -> str:
        """Why a request can never run, or ""."""
        tokens = asked.input_tokens + asked.output_tokens
        needed, most = self._queue.sizes.batch([tokens]), max(self._queue.limits)
        if needed <= most:
            return ""
        return f"the KV cache of {tokens} tokens must fit {most} bytes, takes {needed}"

    def schedule(
        self, now: int, step: int, busy: frozenset[int], in_flight: Sequence[StepBatch]
    ) -> StepBatch:
        """See `Scheduler.schedule`; the first member, asked first, asks for all."""
        if self._owner == 0:
            self._queue.turn(now, step)
        return self._queue.batches[self._owner]

    def finish(self, request: ServedRequest) -> None:
        """See `Scheduler.finish`."""
        self._queue.finish(request)

    def steps_alike(self) -> int:
        """See `Scheduler.steps_alike`."""
        return self._queue.steps_alike()

    def advance(self, steps: int, first_step: int) -> StepBatch:
        """See `Scheduler.advance`."""
        if self._owner == 0:
            self._queue.repeat(steps)
        last = StepBatch()
        for request in self.running:
            last.decodes.append(request.computed + steps)
            request.computed += steps
            request.made += steps
            request.emit(first_step, steps)
            last.making.append(request)
            if request.made >= request.wanted:
                last.lasts.append(request)
        return last


def _draw(batch: StepBatch, served: ServedRequest, step: int) -> None:
    batch.decodes.append(served.computed + 1)
    if served.made >= served.wanted:
        return  # it has ended, and nobody knows yet
    served.computed += 1
    batch.make_token(served, step)


def request_of(asked: TraceRequest, name: str) -> Request:
    """What the server is asked for."""
    tokens = asked.input_ids or (UNKNOWN,) * asked.input_tokens
    return Request(name, tokens, asked.output_tokens)


def server_schedulers(instances: Sequence[Instance]) -> list[ServerScheduler]:
    """The members of a group."""
    queue = ServerQueue(instances)
    return [ServerScheduler(queue, i, mine) for i, mine in enumerate(instances)]
