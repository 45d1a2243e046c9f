"""What the watch of rank 0 does for all: it hears of every end, and decides once.

Messages to the hub, from each watch (its own included):

    beat(place, stopped)        twice a second
    failed(text, code, asks)    this rank takes the run down; asks: for all stacks
    stacks(text)                where the threads of this rank are
    ready                       this rank is about to connect to the group
    usage(text)                 wrong usage; the others should find the same
    leave                       this rank has done its part

and from it:

    beat(places)                where every rank is
    joined                      all watches are connected
    ready                       all ranks are about to connect to the group
    stacks                      say where your threads are
    end(text, code)             end your rank
    left(texts)                 all have left; texts: of wrong usage, by rank
"""

from __future__ import annotations

import math
import selectors
import time
from collections.abc import Callable
from typing import Any

from mlx_ep.comm.control.frames import RefusedError
from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.control.report import describe_place, render_report
from mlx_ep.comm.control.wire import Door, Wire

STACKS_LIMIT = 1.0  # seconds for the ranks to say where they are
USAGE_LIMIT = 1.0  # seconds for the others to find the same wrong usage
USAGE_START = 5.0  # for those that have not come yet: hosts start seconds apart
# Seconds for a rank that is still starting to hear why it ends: on a host with far more
# processes than cores, starting one more took over 6.
LATECOMERS = 20.0
FAREWELL = 1.5  # seconds for the last words to be read
MARKS_KNOWN = 1024  # fingerprints of the latest steps
CLOSE_NOTE = 10.0  # after this, a rank 0 that waits for the others says so

ControlMessage = dict[str, Any]


class Hub:
    """The state of all ranks.

    Args:
        tell_own: hands a message to the watch that this hub is part of.
        say: prints on rank 0.
        patience: seconds for which ranks that have not come may still hear of an end.
    """

    def __init__(
        self,
        size: int,
        limits: Limits,
        selector: selectors.BaseSelector,
        tell_own: Callable[[ControlMessage], None],
        say: Callable[[str], None],
        patience: float = LATECOMERS,
    ) -> None:
        self._size, self._limits, self._selector = size, limits, selector
        self._patience = patience
        self._tell_own, self._say = tell_own, say
        self._wires: dict[int, Wire] = {}
        self._instances: dict[int, str] = {}
        self._places: dict[int, ControlMessage] = {}
        self._last_places: dict[int, ControlMessage] = {}  # when the run began to end
        self._counts: dict[int, int] = {}  # phases and steps of each rank so far
        self._quiet = 0.0  # seconds since any rank came further
        self._stopped_for = 0.0  # seconds in which some ranks were stopped
        self._waiting = 0.0  # seconds for ranks that have not come
        self._ready: set[int] = set()
        self._marks: dict[int, tuple[int, int]] = {}  # number: value, rank
        self._left: set[int] = set()
        self._usage: dict[int, str] = {}
        self._usage_since = math.inf
        self._left_since = math.inf
        self._ending: ControlMessage | None = None
        self._asked: set[int] = set()
        self._asked_until = math.inf
        self._stacks: dict[int, str] = {}
        self._told: set[int] = set()
        self._ended_at = math.inf
        self.door: Door | None = None

    @property
    def missing(self) -> list[int]:
        """The ranks that have not come."""
        return [rank for rank in range(1, self._size) if rank not in self._instances]

    @property
    def is_done(self) -> bool:
        """Whether everyone has heard what there was to hear."""
        if math.isinf(self._ended_at):
            return False
        since = time.monotonic() - self._ended_at
        is_heard = all(wire.is_gone for wire in self._wires.values())
        # Ranks that did not come within `starting` are not waited for again.
        is_overdue = self._waiting > self._limits.starting and since > FAREWELL
        if is_overdue or since > self._patience or (self._ending is None and is_heard):
            return True
        return not self.missing and (is_heard or since > FAREWELL)

    def on_hello(self, wire: Wire, messages: list[ControlMessage]) -> None:
        """A newcomer that knows the secret."""
        hello = messages[0]
        rank, instance = hello.get("rank"), str(hello.get("instance"))
        if not isinstance(rank, int) or not 0 < rank < self._size:
            wire.close()
            return
        wire.send({"kind": "welcome"})
        known = self._instances.get(rank)
        if known is not None:  # a second try of the same watch follows the first's end
            text = f"two processes are rank {rank}: {known} and {instance}"
            wire.send({"kind": "end", "text": text, "code": 1})
            if known != instance:
                self.fail(rank, text)
            return
        self._wires[rank], self._instances[rank] = wire, instance
        self._selector.register(
            wire.socket, selectors.EVENT_READ, lambda: self._hear(rank, wire)
        )
        if self._told:
            self._send(rank, self._last_words())
        for message in messages[1:]:
            self.receive(rank, message)
        if not self.missing:
            if self.door is not None:
                self.door.close()
            if self._ending is None:
                self._send_all({"kind": "joined"})

    def receive(self, rank: int, message: ControlMessage) -> None:
        """A message of a rank's watch."""
        kind = message["kind"]
        if kind == "beat":
            self._places[rank] = message
            if rank in self._asked and rank not in self._stacks:
                # Its answer to that, too; the signal may have ended a silence.
                silent = self._last_places.get(rank, message)["interpreter"]
                longest = max(silent, message["interpreter"])
                self._last_places[rank] = message | {"interpreter": longest}
            self._compare(rank, message.get("marks", []))
        elif kind == "failed":
            self.fail(rank, message["text"], message["code"], message["asks"])
        elif kind == "stacks":
            self._stacks[rank] = message["text"]
        elif kind == "ready":
            self._ready.add(rank)
            if len(self._ready) == self._size:
                self._send_all({"kind": "ready"})
        elif kind == "usage":
            self._usage[rank] = message["text"]
            self._left.add(rank)
            self._usage_since = min(self._usage_since, time.monotonic())
            self._end_if_all_left()
        elif kind == "leave":
            self._left.add(rank)
            if rank == 0:
                self._left_since = time.monotonic()
            self._end_if_all_left()

    def fail(self, rank: int, text: str, code: int = 1, asks: bool = False) -> None:
        """Ends the run, because of a rank; the first reason is the one that counts."""
        if self._ending is not None or not math.isinf(self._ended_at):
            return
        self._ending = {"kind": "end", "text": text, "code": code}
        self._last_places = dict(self._places)
        self._asked_until = -math.inf
        if asks:
            self._asked = {0, *self._wires} - self._left
            self._asked_until = time.monotonic() + STACKS_LIMIT
            self._send_all({"kind": "stacks"})
        self._finish_if_answered()

    def tick(self, seconds: float) -> None:
        """Looks at everything that takes time.

        Args:
            seconds: since the last call, none of them in a pause of this process.
        """
        now = time.monotonic()
        if self.door is not None:
            self.door.tick()
        for wire in self._wires.values():
            wire.flush()
        if self._ending is not None:
            self._finish_if_answered()
            return
        for rank, wire in list(self._wires.items()):
            wire.silent += seconds
            limit = wire.patience(self._limits.silence)
            if wire.silent > limit and rank not in self._left:
                what = f"has been silent for {limit:g} s; its host or"
                self.fail(rank, f"rank {rank} {what} its network is gone", asks=True)
        self._look_for_missing(seconds)
        self._look_for_stopped(seconds)
        self._look_for_late(seconds)
        limit = USAGE_START if self.missing else USAGE_LIMIT
        if now - self._usage_since > limit:
            self._usage_since = math.inf
            rank = min(self._usage)
            self.fail(rank, f"wrong usage on rank {rank}: {self._usage[rank]}", 2)
        if now - self._left_since > CLOSE_NOTE:
            self._left_since = math.inf
            others = sorted(set(self._wires) - self._left)
            self._say(f"[mlx_ep] rank 0 is done and waits for ranks {others}")

    def beat(self) -> None:
        """Tells all ranks where the others are."""
        places = {str(rank): place for rank, place in self._places.items()}
        self._send_all({"kind": "beat", "places": places})

    # ----------------------------------------------------------------------------------

    def _hear(self, rank: int, wire: Wire) -> None:
        try:
            messages = wire.receive()
        except RefusedError as error:
            self._drop(wire)
            self.fail(rank, f"the connection of rank {rank} was tampered with: {error}")
            return
        for message in messages:
            self.receive(rank, message)
        if wire.is_gone:
            self._drop(wire)
            if rank not in self._left:
                self.fail(rank, ended_without_a_word(rank), asks=True)

    def _drop(self, wire: Wire) -> None:
        self._selector.unregister(wire.socket)
        wire.close()

    def _look_for_missing(self, seconds: float) -> None:
        if not self.missing:
            return
        self._waiting += seconds
        if self._waiting > self._limits.starting:
            self.fail(
                self.missing[0],
                f"of {self._size} ranks, {self.missing} did not come within "
                f"{self._limits.starting:g} s; were they started? Is a firewall on?",
                asks=True,
            )

    def _look_for_stopped(self, seconds: float) -> None:
        active = {rank for rank in self._places if rank not in self._left}
        stopped = {rank for rank in active if self._places[rank]["stopped"]}
        is_pause = stopped == active and not self.missing
        self._stopped_for += seconds
        if not stopped or is_pause:
            self._stopped_for = 0.0
        if self._stopped_for > self._limits.stopped:
            names = " and ".join(f"rank {rank}" for rank in sorted(stopped))
            self.fail(
                min(stopped),
                f"{names} stopped {self._limits.stopped:g} s ago (SIGSTOP, Ctrl-Z or a "
                "debugger) while others run",
                asks=True,
            )

    def _look_for_late(self, seconds: float) -> None:
        """Ends the run when no rank comes further and those behind are over their time.

        Ranks run one program, so the one with the fewest phases and steps behind it is
        the one that the others wait for.
        """
        active = {r: p for r, p in self._places.items() if r not in self._left}
        counts = {rank: place["count"] for rank, place in active.items()}
        if counts != self._counts:
            self._counts, self._quiet = counts, 0.0
        if not active or any(place["stopped"] for place in active.values()):
            return
        self._quiet += seconds
        fewest = min(counts.values())
        behind = [rank for rank in sorted(active) if counts[rank] == fewest]
        limit = max(self._limits.of(active[rank]["phase"]) for rank in behind)
        if self._quiet > limit:
            rank = behind[0]
            self.fail(
                rank,
                f"no rank has come further for {limit:g} s; rank {rank} is in "
                f"{describe_place(active[rank])} (MLX_EP_LIMITS changes the limit)",
                asks=True,
            )

    def _compare(self, rank: int, marks: list[list[int]]) -> None:
        """Ends the run where two ranks have different fingerprints of one step."""
        for number, value in marks:
            known, first = self._marks.setdefault(number, (value, rank))
            if known != value:
                self.fail(
                    rank,
                    f"rank {rank} has computed something else than rank {first} by "
                    f"step {number} (their tokens or lengths differ): they were given "
                    "different prompts or samplers, or one of them computes wrongly",
                    asks=True,
                )
        while len(self._marks) > MARKS_KNOWN:
            del self._marks[min(self._marks)]

    def _end_if_all_left(self) -> None:
        if len(self._left) < self._size or self._ending is not None:
            return
        if self._usage and len(self._usage) < self._size:
            return  # the limit for wrong usage ends it
        texts = [self._usage[rank] for rank in sorted(self._usage)]
        self._send_all({"kind": "left", "texts": texts})
        self._ended_at = time.monotonic()

    def _finish_if_answered(self) -> None:
        if self._told or self._ending is None:
            return
        here = {r for r, w in self._wires.items() if not w.is_gone} | {0}
        is_answered = not (self._asked & here) - set(self._stacks)
        if not is_answered and time.monotonic() < self._asked_until:
            return
        asked = sorted(self._asked)
        self._say(
            render_report(self._ending["text"], self._last_places, asked, self._stacks)
        )
        self._told = {0, *self._wires}
        self._ended_at = time.monotonic()
        self._send_all(self._last_words())

    def _last_words(self) -> ControlMessage:
        assert self._ending is not None
        return self._ending

    def _send(self, rank: int, message: ControlMessage) -> None:
        self._wires[rank].send(message)

    def _send_all(self, message: ControlMessage) -> None:
        for wire in self._wires.values():
            wire.send(message)
        self._tell_own(message)


def ended_without_a_word(rank: int) -> str:
    """What is known of a rank that is gone."""
    return (
        f"rank {rank} ended without a word; it was killed, or its host or its network "
        "went away"
    )
