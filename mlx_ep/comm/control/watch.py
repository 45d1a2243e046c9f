"""The watch of one rank: the process beside it (see `mlx_ep.comm.control`).

From the rank come, as lines of JSON over the link, its configuration first, then:

    meet(meeting)       where the watches meet, once the group exists
    group               the group exists; an end without a word is one like any other
    ready               it is about to connect to the group
    guarded             from here on it is a failure
    signals(numbers)    that end the run; others are the program's own business
    goodbye(seconds)    more than as a rule, for what it does when it is told to end
    failed, usage, leave   as in `hub.py`, `failed` with details and grace

and to it go: listening(meeting), joined, ready, left(texts), end(code, text).
"""

from __future__ import annotations

import json
import math
import os
import selectors
import socket
import time
from collections import deque
from contextlib import suppress

from mlx_ep.comm.control.frames import RefusedError
from mlx_ep.comm.control.hub import (
    FAREWELL,
    LATECOMERS,
    ControlMessage,
    Hub,
    ended_without_a_word,
)
from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.control.meeting import Meeting, remove_meeting, write_meeting
from mlx_ep.comm.control.progress import ProgressPage
from mlx_ep.comm.control.rank import RankProcess, read_config
from mlx_ep.comm.control.report import signal_text
from mlx_ep.comm.control.say import Sayer
from mlx_ep.comm.control.seek import Seeker
from mlx_ep.comm.control.wire import Door, Wire, serve

TICK = 0.1  # seconds
BEAT = 0.5  # seconds between two beats
LONGEST_TICK = 1.0  # what is longer was a pause of this process, and does not count
SIGNAL_GRACE = 0.5  # seconds for Python's handler to run after a signal
LEAVE_GRACE = 1.0  # seconds for the rank to leave by itself after that
CONNECT_GRACE = 1.0  # seconds for a rank that failed to be connected first
USAGE_ALONE = 15.0  # seconds for rank 0 to come and be told of wrong usage here
KILL_AFTER = 0.5  # seconds for the rank to end by itself
STACKS_AFTER = 0.25  # seconds for the stacks to be written
HANDLED = 0  # a wake-up byte; the others are the numbers of signals


class Watch:
    """What the process holds; `run` is all that it does."""

    def __init__(
        self, link: socket.socket, wake: socket.socket, page: int, stacks: int
    ) -> None:
        self._link, self._wake = link, wake
        self._page = ProgressPage(page)
        self._selector = selectors.DefaultSelector()
        config, self._buffer = read_config(link)
        link.setblocking(False)
        wake.setblocking(False)
        self._rank, self._size = config["rank"], config["size"]
        # mpirun ends all ranks with the first that goes, those that are still starting
        # too, and waits itself for this process.
        self._patience = FAREWELL if config["mpirun"] else LATECOMERS
        self._limits = Limits(**config["limits"])
        self._process = RankProcess(config, self._limits, self._page, stacks)
        self._instance = f"process {config['pid']} on {socket.gethostname()}"
        self._is_guarded = True  # until the group exists, then by `guard`
        self._is_rank_gone = self._is_left = self._is_joined = False
        self._signal: tuple[int, float] | None = None  # number, deadline
        self._heeded: set[int] = set()
        # A failure that may follow.
        self._grace: tuple[ControlMessage, float] | None = None
        self._stacks_at = math.inf
        self._unsent: list[ControlMessage] = []
        self._alone: tuple[ControlMessage, float] | None = None  # not known to others
        self._inbox: deque[ControlMessage] = deque()
        self._code: int | None = None  # of the end
        self._kill_at = self._quit_at = self._usage_until = math.inf
        self._starting_for = self._goodbye = 0.0
        self._hub_wire: Wire | None = None
        self._hub: Hub | None = None
        self._seeker: Seeker | None = None
        self._meeting = Meeting("late")
        self._sayer = Sayer()
        self._say = self._sayer.say
        self._selector.register(link, selectors.EVENT_READ, self._on_link)
        self._selector.register(wake, selectors.EVENT_READ, self._on_wake)
        if self._rank == 0:
            self._hub = Hub(
                self._size, self._limits, self._selector, self._inbox.append, self._say,
                self._patience,
            )  # fmt: skip
        self._meet(Meeting.from_json(config["meeting"]))
        self._hear_lines()  # what came with the configuration

    def run(self) -> None:
        """Watches until there is nothing left to do."""
        last = last_tick = last_beat = time.monotonic()
        while not self._is_done():
            serve(self._selector, TICK)
            now = time.monotonic()
            if now - last_tick >= TICK:
                self._tick(min(now - last, LONGEST_TICK))
                last = last_tick = now
            if now - last_beat >= BEAT:
                self._beat()
                last_beat = now
            while self._inbox:
                self._hear_hub(self._inbox.popleft())
        if self._meeting.kind == "file" and self._rank == 0:
            remove_meeting(self._meeting.path)
        self._sayer.finish()

    # The rank -------------------------------------------------------------------------

    def _on_link(self) -> None:
        try:
            data = self._link.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._rank_is_gone()
            return
        self._buffer += data
        self._hear_lines()

    def _hear_lines(self) -> None:
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._hear_rank(json.loads(line))

    def _hear_rank(self, message: ControlMessage) -> None:
        kind = message["kind"]
        if kind == "meet":
            self._meet(Meeting.from_json(message["meeting"]))
        elif kind == "group":
            self._is_guarded = False
        elif kind == "guarded":
            self._is_guarded = True
        elif kind == "signals":
            self._heeded = set(message["numbers"])
        elif kind == "goodbye":
            self._goodbye = float(message["seconds"])
        elif kind == "failed":
            grace = message.pop("grace")
            if grace:
                self._grace = message, time.monotonic() + grace
            else:
                self._tell_failure(message)
        elif kind == "ready":
            self._tell_hub(message)
        else:  # usage and leave
            self._is_left = True
            self._tell_hub(message)
        if kind in ("failed", "usage", "leave"):
            self._signal = None

    def _tell_rank(self, message: ControlMessage) -> None:
        with suppress(OSError):
            self._link.send(json.dumps(message).encode() + b"\n")

    def _rank_is_gone(self) -> None:
        if self._is_rank_gone:
            return
        self._is_rank_gone = True
        self._selector.unregister(self._link)
        if self._code is not None:
            return
        self._signal = None
        if self._is_left or not self._is_guarded:
            self._tell_hub({"kind": "leave"})
        elif self._grace is None:
            text = ended_without_a_word(self._rank)
            self._beat()  # the page says where it was
            self._tell_hub({"kind": "failed", "text": text, "code": 1, "asks": True})
        self._quit_at = time.monotonic() + self._patience
        if self._hub is not None or (not self._is_guarded and self._is_joined):
            self._quit_at = math.inf  # until the others leave

    def _on_wake(self) -> None:
        try:
            data = self._wake.recv(4096)
        except OSError:
            return
        if not data:
            self._selector.unregister(self._wake)
        now = time.monotonic()
        for byte in data:
            if byte == HANDLED:
                if self._signal is not None:
                    self._signal = self._signal[0], now + LEAVE_GRACE
            elif byte in self._heeded and self._signal is None and self._code is None:
                self._signal = byte, now + SIGNAL_GRACE

    # The hub --------------------------------------------------------------------------

    def _meet(self, meeting: Meeting) -> None:
        self._meeting = meeting
        if self._hub is not None:
            self._open_door(meeting)
        else:
            if self._seeker is not None:
                self._seeker.close()
            hello = {"kind": "hello", "rank": self._rank, "instance": self._instance}
            self._seeker = Seeker(self._selector, meeting, hello, self._on_welcome)

    def _open_door(self, meeting: Meeting) -> None:
        assert self._hub is not None
        if not meeting.addresses or self._hub.door is not None:
            return
        try:
            door = Door(
                self._selector, meeting.addresses, meeting.ports, self._hub.on_hello,
                lambda text: self._say(f"[mlx_ep] control channel: {text}"),
            )  # fmt: skip
        except OSError as error:
            where = " and ".join(meeting.addresses)
            self._hub.fail(
                0, f"rank 0 cannot listen at {where}, ports {meeting.ports}: {error}"
            )
            return
        self._hub.door = door
        secret = bytes.fromhex(meeting.secret) or os.urandom(32)
        if meeting.kind == "file":
            secret = write_meeting(meeting.path, door.port)
        door.open(secret)
        if meeting.kind == "late":
            place = Meeting(
                "address", "", meeting.addresses, (door.port,), secret.hex()
            )
            self._tell_rank({"kind": "listening", "meeting": place.to_json()})

    def _on_welcome(self, wire: Wire, messages: list[ControlMessage]) -> None:
        self._hub_wire, self._seeker, self._alone = wire, None, None
        self._selector.register(wire.socket, selectors.EVENT_READ, self._on_hub_wire)
        self._beat()
        for message in self._unsent:
            wire.send(message)
        self._unsent.clear()
        self._inbox.extend(messages)

    def _on_hub_wire(self) -> None:
        wire = self._hub_wire
        assert wire is not None
        try:
            self._inbox.extend(wire.receive())
        except RefusedError as error:
            wire.is_gone = True
            text = f"the connection to rank 0 was tampered with: {error}"
            self._inbox.append({"kind": "end", "text": text, "code": 1})
        while self._inbox:
            self._hear_hub(self._inbox.popleft())
        if wire.is_gone:
            self._selector.unregister(wire.socket)
            if self._code is None and not (self._is_left and self._is_rank_gone):
                self._end(ended_without_a_word(0), 1)

    def _tell_failure(self, message: ControlMessage) -> None:
        self._say(message.pop("details"), end="")
        self._tell_hub(message)

    def _tell_hub(self, message: ControlMessage) -> None:
        if self._hub is not None:
            self._hub.receive(0, message)
        elif self._hub_wire is not None:
            self._hub_wire.send(message)
        elif message["kind"] != "beat":
            self._unsent.append(message)
            if message["kind"] == "failed":
                # Better that rank 0 ends all: mpirun ends the others without a word.
                self._alone = message, time.monotonic() + CONNECT_GRACE
            elif message["kind"] == "usage":
                self._usage_until = time.monotonic() + USAGE_ALONE

    def _hear_hub(self, message: ControlMessage) -> None:
        kind = message["kind"]
        if kind in ("joined", "ready"):
            self._is_joined = True
            self._tell_rank(message)
        elif kind == "stacks" and not self._is_rank_gone:
            self._beat()  # where it is now
            self._process.ask_for_stacks()
            self._stacks_at = time.monotonic() + STACKS_AFTER
        elif kind == "stacks":
            self._tell_hub({"kind": "stacks", "text": "(its process is gone)"})
        elif kind == "end":
            self._end(message["text"], message["code"])
        elif kind == "left":
            self._code = 0
            self._tell_rank(message)
            self._quit_at = time.monotonic()

    # Time -----------------------------------------------------------------------------

    def _beat(self) -> None:
        beat = {"kind": "beat"} | self._process.describe(time.monotonic())
        if self._is_rank_gone:
            beat |= {"stopped": False, "gone": True}
        self._tell_hub(beat)
        if self._hub is not None:
            self._hub.beat()

    def _tick(self, seconds: float) -> None:
        now = time.monotonic()
        if self._hub is not None:
            self._hub.tick(seconds)
        if self._seeker is not None:
            self._seeker.tick()
        if self._hub_wire is not None:
            self._hub_wire.flush()
            self._look_at_hub(seconds)
        if not self._is_rank_gone:
            self._look_at_rank(seconds)
        if self._signal is not None and now >= self._signal[1] and self._code is None:
            number, self._signal = self._signal[0], None
            self._fail(signal_text(self._rank, number), 128 + number)
        if self._grace is not None and now >= self._grace[1]:
            message, self._grace = self._grace[0], None
            if self._code is None:  # nobody had a better reason
                self._tell_failure(message)
        if self._alone is not None and now >= self._alone[1]:
            # Those that still start hear of it, or never.
            message, self._alone = self._alone[0], None
            self._end(message["text"], message["code"])
        if now >= self._usage_until and self._hub_wire is None and self._code is None:
            self._end(f"wrong usage on rank {self._rank}; rank 0 was not told", 2)
        if now >= self._stacks_at:
            self._stacks_at = math.inf
            self._tell_hub({"kind": "stacks", "text": self._process.read_stacks()})
        if now >= self._kill_at and not self._is_rank_gone:
            self._kill_at = math.inf
            self._process.kill()

    def _look_at_rank(self, seconds: float) -> None:
        if self._process.is_gone:
            self._rank_is_gone()
            return
        problem = self._process.look(seconds)
        if problem and self._code is None:
            self._fail(problem, 1)
        if self._process.is_stopped or self._code is not None:
            return
        if not self._is_joined and self._hub is None:
            self._starting_for += seconds
            if self._starting_for > self._limits.starting + 1:  # rank 0 goes first
                trouble = self._seeker.trouble if self._seeker else "it does not answer"
                self._fail(
                    f"rank {self._rank} could not reach rank 0 within "
                    f"{self._limits.starting:g} s ({trouble}); is a firewall on?", 1
                )  # fmt: skip

    def _look_at_hub(self, seconds: float) -> None:
        wire = self._hub_wire
        assert wire is not None
        wire.silent += seconds
        if wire.silent > wire.patience(self._limits.silence) and self._code is None:
            what = "its host or its network is gone"
            self._end(f"rank 0 has been silent for {wire.silent:.0f} s; {what}", 1)

    # The end --------------------------------------------------------------------------

    def _fail(self, text: str, code: int) -> None:
        asks = code < 128
        self._beat()  # where it is now, for the report
        self._tell_hub({"kind": "failed", "text": text, "code": code, "asks": asks})

    def _end(self, text: str, code: int) -> None:
        """Ends the rank, gently first."""
        if self._code is not None:
            return
        self._code = code % 256 or 1
        if self._hub is None:
            me = f"rank {self._rank} "
            self._say(
                f"[mlx_ep] {text if text.startswith(me) else f'{me}ends: {text}'}"
            )
        self._tell_rank({"kind": "end", "code": self._code, "text": text})
        self._kill_at = time.monotonic() + KILL_AFTER + self._goodbye
        if self._seeker is None:
            self._quit_at = self._kill_at + KILL_AFTER
        else:
            self._quit_at = time.monotonic() + self._patience

    def _is_done(self) -> bool:
        if self._code and not self._is_rank_gone:
            return False  # it is killed in a moment
        if self._hub is not None:
            return self._hub.is_done
        is_told = self._seeker is None and self._is_rank_gone and self._code is not None
        return is_told or time.monotonic() >= self._quit_at
