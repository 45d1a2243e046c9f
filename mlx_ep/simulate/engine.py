"""All groups of a cluster in one time line: arrivals, steps, completions."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from mlx_ep.simulate.blocks import BlockNames
from mlx_ep.simulate.cluster import Cluster, Instance
from mlx_ep.simulate.group import Group, StepTimes
from mlx_ep.simulate.links import send_ns
from mlx_ep.simulate.requests import ServedRequest
from mlx_ep.simulate.scheduler import Scheduler
from mlx_ep.simulate.server_scheduler import ServerScheduler
from mlx_ep.simulate.traces import Trace, TraceRequest

FOREVER = 1 << 62
_Place = tuple[Instance, Group, Scheduler | ServerScheduler]
ROUTING_POLICIES = ("LOAD", "RR", "RAND", "CUSTOM")


class Simulation:
    """A cluster that serves a trace.

    Args:
        times: of each group, in the cluster's order.
        policy: which instance takes a request. LOAD: the one with the least
            4 * waiting + running; RR: in turns; RAND: any; CUSTOM: as `chosen` says.
        chosen: for CUSTOM, the index of an instance per request.
        seed: of RAND.

    Attributes:
        requests: that have come so far.
        num_requests: of the whole trace.

    Raises:
        ValueError: a request can never run, or the cluster cannot serve.
    """

    def __init__(
        self,
        cluster: Cluster,
        trace: Trace,
        times: Sequence[StepTimes],
        *,
        policy: str = "LOAD",
        chosen: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        self.cluster = cluster
        self.groups = [Group(g, t) for g, t in zip(cluster.groups, times, strict=True)]
        self.requests: list[ServedRequest] = []
        self.num_requests = trace.num_requests
        self._places: list[_Place] = [
            (instance, group, member)
            for group in self.groups
            for instance, member in zip(group.instances, group.members)
        ]
        self._places.sort(key=lambda place: place[0].index)
        self._entries = _of_kind(self._places, "prefill", None)
        self._decoders = _of_kind(self._places, "decode")
        self._check_kinds()
        self._policy, self._chosen = policy, chosen
        self._random = np.random.default_rng(seed)
        self._turns = {True: count(), False: count()}
        self._names = {
            place[0].settings.block_size: BlockNames(place[0].settings.block_size)
            for place in self._places
        }
        self._heap: list[tuple[int, int, ServedRequest]] = []
        self._order = count()
        self._index = count()
        self._has_sessions = any(len(session) > 1 for session in trace.sessions)
        for session in trace.sessions:
            for asked in session:
                self._check_fits(asked)
        if chosen is not None:
            self._check_chosen(trace.num_requests)
        starts = []
        for session in trace.sessions:
            starts.append(next(self._index))
            for _ in session[1:]:
                next(self._index)
        for index, session in zip(starts, trace.sessions):
            self._arrive(index, session[0].arrival, session[0], session[1:])

    def run(self, progress: Callable[[int], object] = lambda done: None) -> None:
        """Serve everything.

        Args:
            progress: is told how many more requests are done.
        """
        active = [group for group in self.groups if group.time is not None]
        while self._heap or active:
            upcoming = self._heap[0][0] if self._heap else FOREVER
            group = min(active, key=_time, default=None)
            if group is None or upcoming <= _time(group):
                _, _, request = heapq.heappop(self._heap)
                self._deliver(upcoming, request)
                active = [g for g in self.groups if g.time is not None]
                continue
            until = upcoming
            if len(active) > 1 and (self._has_sessions or self._decoders):
                # What another group ends may arrive here.
                until = min(
                    until, min(_time(other) for other in active if other is not group)
                )
            done = group.iterate(until)
            for request in done:
                progress(self._end(request, group))
            if group.time is None:
                active = [g for g in self.groups if g.time is not None]

    def _arrive(
        self,
        index: int,
        arrival: int,
        asked: TraceRequest,
        follow: tuple[TraceRequest, ...],
    ) -> None:
        request = ServedRequest(index, arrival, asked, follow)
        request.total = asked.input_tokens
        self.requests.append(request)
        heapq.heappush(self._heap, (arrival, next(self._order), request))

    def _deliver(self, now: int, request: ServedRequest) -> None:
        is_decode = request.made > 0
        places = self._decoders if is_decode else self._entries
        instance, group, member = self._choose(places, request, is_decode)
        request.instance = instance.index
        if not is_decode:
            request.entry = instance.index
        settings = instance.settings
        if settings.skip_prefill and not is_decode:
            request.computed = request.asked.input_tokens - 1
        if settings.enable_prefix_caching and request.asked.input_ids is not None:
            ids = request.asked.input_ids + (request.asked.output_ids or ())
            request.names = self._names[settings.block_size].of(ids)
        member.add(request)
        group.wake(now)

    def _choose(
        self,
        places: Sequence[_Place],
        request: ServedRequest,
        is_decode: bool,
    ) -> _Place:
        if self._policy == "CUSTOM" and not is_decode:
            assert self._chosen is not None
            wanted = self._chosen[request.index]
            return next(place for place in places if place[0].index == wanted)
        if self._policy == "RR":
            return places[next(self._turns[is_decode]) % len(places)]
        if self._policy == "RAND":
            return places[int(self._random.integers(len(places)))]
        return min(places, key=lambda place: place[2].load)

    def _end(self, request: ServedRequest, group: Group) -> int:
        """It got its last token here. Returns how many requests are done with that."""
        assert group.time is not None
        if request.made < request.outputs:  # its decode instance goes on
            request.earlier.append(request.token_times(group.log.ends).copy())
            request.emitted, request.names = [], []
            request.named = 0
            instance = self.cluster.instances[request.instance]
            num_bytes = instance.model.kv_token_bytes(instance.settings.kv_itemsize)
            wait = send_ns(
                self.cluster.instances_link
                if instance.node == self._decoders[0][0].node
                else self.cluster.nodes_link,
                num_bytes
                * request.asked.input_tokens
                / instance.model.kv_split(instance.tp),
            )
            ready = group.time + round(wait)
            heapq.heappush(self._heap, (ready, next(self._order), request))
            return 0
        request.end = group.time
        request.names = []
        if request.follow:
            after = request.follow[0]
            self._arrive(
                request.index + 1,
                request.end + after.arrival,
                after,
                request.follow[1:],
            )
        return 1

    def times_of(self, request: ServedRequest) -> np.ndarray:
        """When each of its tokens came, ns."""
        group = next(
            group
            for group in self.groups
            if any(i.index == request.instance for i in group.instances)
        )
        return request.token_times(group.log.ends)

    def _check_kinds(self) -> None:
        prefills = _of_kind(self._places, "prefill")
        if bool(prefills) != bool(self._decoders):
            have, lack = ("decode", "prefill")
            if prefills:
                have, lack = lack, have
            raise ValueError(
                f"{self.cluster.file}: nodes: an instance with pd_type {have} needs "
                f"one with pd_type {lack}."
            )
        names = sorted({place[0].model.name for place in self._places})
        if len(names) > 1:
            raise ValueError(
                f"{self.cluster.file}: nodes: a trace is for one model; the instances "
                f"have {', '.join(names)}."
            )

    def _check_fits(self, asked: TraceRequest) -> None:
        tokens = asked.input_tokens + asked.output_tokens
        for instance, _, member in self._places:
            if isinstance(member, ServerScheduler):
                if problem := member.problem(asked):
                    raise ValueError(
                        f"line {asked.line} of the trace: of {instance.where}, "
                        f"{problem}."
                    )
                continue
            if tokens > instance.pool.num_tokens:
                raise ValueError(
                    f"line {asked.line} of the trace: {tokens} tokens must fit the KV "
                    f"blocks of {instance.where}, {instance.pool.num_tokens} tokens."
                )
            settings = instance.settings
            if (
                not settings.enable_chunked_prefill
                and asked.input_tokens > settings.token_budget
            ):
                raise ValueError(
                    f"line {asked.line} of the trace: a prompt of {asked.input_tokens} "
                    "tokens must fit max_num_batched_tokens "
                    f"{settings.max_num_batched_tokens} where chunked prefill is off."
                )

    def _check_chosen(self, num_requests: int) -> None:
        chosen = self._chosen or ()
        allowed = [place[0].index for place in self._entries]
        if len(chosen) < num_requests or any(i not in allowed for i in chosen):
            raise ValueError(
                "--request-routing-file must name one instance per request, "
                f"{num_requests} of them, out of {allowed}; got {len(chosen)}."
            )


def _time(group: Group) -> int:
    return FOREVER if group.time is None else group.time


def _of_kind(places: Sequence[_Place], *kinds: str | None) -> list[_Place]:
    return [place for place in places if place[0].pd_type in kinds]
