"""The door of the control channel, at which ranks and strangers knock."""

from __future__ import annotations

import selectors
import socket
import time

import pytest

from mlx_ep.comm.control.frames import Session
from mlx_ep.comm.control.meeting import Meeting
from mlx_ep.comm.control.seek import ATTEMPT, Seeker
from mlx_ep.comm.control.wire import HELLO_LIMIT, MOST_NEWCOMERS, Door, serve
from tests.support.waiting import LONG

SECRET = b"s" * 32
MOST_TURNS = 20  # of the door, each at most 10 ms long where nothing happens


class Room:
    """A door with its selector, and who came in."""

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.came, self.lines = [], []
        self.door = Door(
            self.selector,
            ("127.0.0.1",),
            (0,),
            lambda wire, messages: self.came.append((wire, messages)),
            self.lines.append,
        )
        self.door.open(SECRET)

    def turn(self, seconds=0.0):
        serve(self.selector, seconds)
        self.door.tick()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.door.port), timeout=LONG)

    def close(self):
        self.door.close()
        for wire, _ in self.came:
            wire.close()
        self.selector.close()


@pytest.fixture
def room(monkeypatch):
    now = time.monotonic()  # it stands still: nobody is late because this host is
    monkeypatch.setattr(time, "monotonic", lambda: now)
    made = Room()
    yield made
    made.close()


def come_in(room):
    """A rank says hello; gives the turns until it is in."""
    turns, before = 0, len(room.came)
    session = Session(SECRET, is_server=False)
    with room.connect() as connection:
        connection.sendall(session.opening)
        connection.setblocking(False)
        is_open = False
        while len(room.came) == before:
            turns += 1
            room.turn(0.01)
            try:
                data = connection.recv(4096)
            except BlockingIOError:
                continue
            assert data, "turned away"
            session.receive(data)
            if session.is_open and not is_open:
                is_open = True
                connection.sendall(session.seal({"kind": "hello", "rank": 1}))
    return turns


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_strangers_cost_two_lines_and_delay_nobody(room, count):
    turns = []
    for number in range(count):
        with room.connect() as stranger:
            if number % 3 == 0:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        room.turn()
        if number % (count // 4) == 0:
            turns.append(come_in(room))
    assert max(turns) < MOST_TURNS
    while room.door._newcomers:
        room.turn(0.01)
    room.door.close()
    assert len(room.lines) == 2
    assert room.lines[1] == (
        f"turned away {count} connections of strangers from 127.0.0.1"
    )


def test_silent_and_slow_strangers_keep_nobody_out(room, monkeypatch):
    silent = [room.connect() for _ in range(MOST_NEWCOMERS + 10)]
    slow = room.connect()
    slow.sendall(b"m")  # the first byte of what a rank says
    for _ in range(20):
        room.turn(0.01)
    assert len(room.door._newcomers) <= MOST_NEWCOMERS
    assert come_in(room) < MOST_TURNS
    later = time.monotonic() + HELLO_LIMIT + 0.1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    slow.sendall(b"l")  # a byte now and then does not help
    room.turn()
    assert not room.door._newcomers
    for connection in (*silent, slow):
        connection.close()


def test_who_is_turned_away_while_it_speaks_is_not_heard(room):
    # The listener is ready first, and takes in one for whom the oldest has to go.
    oldest, *others = [room.connect() for _ in range(MOST_NEWCOMERS)]
    while len(room.door._newcomers) < MOST_NEWCOMERS:
        room.turn(0.01)
    late = room.connect()
    oldest.sendall(b"m")
    time.sleep(0.05)  # so that both are in one round
    room.turn()
    room.turn()
    assert len(room.door._newcomers) == MOST_NEWCOMERS
    with pytest.raises(ConnectionResetError):  # with what it had said
        oldest.recv(1)
    for connection in (oldest, *others, late):
        connection.close()


def test_who_comes_last_closes_the_door_on_another(room):
    # As when the last rank comes in while a stranger knocks.
    def come(wire, messages):
        room.came.append((wire, messages))
        room.door.close()

    room.door._on_hello = come
    client = Session(SECRET, is_server=False)
    with room.connect() as connection:
        connection.sendall(client.opening)
        for _ in range(3):
            room.turn(0.05)
        client.receive(connection.recv(4096))
        connection.sendall(client.seal({"kind": "hello", "rank": 1}))
        with room.connect():
            time.sleep(0.05)  # so that both are in one round
            room.turn()
            room.turn()
    assert room.came


def test_rank_0_that_has_answered_is_not_tried_again(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        selector = selectors.DefaultSelector()
        port = listener.getsockname()[1]
        meeting = Meeting("address", "", ("127.0.0.1",), (port,), SECRET.hex())
        seeker = Seeker(selector, meeting, {"kind": "hello"}, lambda *_: None)
        seeker.tick()
        connection, _ = listener.accept()
        server = Session(SECRET, is_server=True)
        serve(selector, 1.0)
        server.receive(connection.recv(4096))
        connection.sendall(server.opening)
        serve(selector, 1.0)
        assert server.receive(connection.recv(4096)) == [{"kind": "hello"}]
        later = time.monotonic() + 10 * ATTEMPT  # rank 0's host has no time for us
        monkeypatch.setattr(time, "monotonic", lambda: later)
        seeker.tick()
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)  # it is still there
        seeker.close()
        connection.close()
        selector.close()


def test_recorded_bytes_do_not_open_the_door(room):
    assert come_in(room) < MOST_TURNS
    client, server = (Session(SECRET, is_server=side) for side in (False, True))
    server.receive(client.opening)
    client.receive(server.opening)
    with room.connect() as stranger:
        stranger.sendall(client.opening + client.seal({"kind": "hello", "rank": 1}))
        for _ in range(20):
            room.turn(0.01)
    assert len(room.came) == 1
    assert "does not know the secret" in room.lines[0]


def test_the_door_listens_at_its_address_only(room):
    (listener,) = room.door._listeners
    assert listener.getsockname()[0] == "127.0.0.1"
    port = room.door.port
    room.door.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))  # free again, at once
