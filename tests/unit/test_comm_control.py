"""The control channel without ranks: its frames, where watches meet, what they say."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import socket
import subprocess
import sys
import time

import psutil
import pytest

from mlx_ep.comm import host, host_id
from mlx_ep.comm.control.frames import MOST_HELLO, RefusedError, Session
from mlx_ep.comm.control.hub import LATECOMERS, Hub
from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.control.meeting import (
    find_meeting,
    read_meeting,
    remove_meeting,
    runtime_folder,
    write_meeting,
)
from mlx_ep.comm.control.progress import ProgressPage
from mlx_ep.comm.control.report import render_report
from mlx_ep.comm.control.wire import Wire
from tests.support.waiting import until

SECRET = b"s" * 32
LONG = "0123456789abcdef"


def connected(secret=SECRET):
    """A client and a server that know each other's nonces."""
    client, server = Session(secret, is_server=False), Session(SECRET, is_server=True)
    assert server.receive(client.opening) == []
    assert client.receive(server.opening) == []
    return client, server


@pytest.mark.parametrize(
    ("origin", "is_here"), [("127.0.0.1", True), ("127.0.0.2", False)]
)
def test_who_is_on_this_host_may_be_silent_for_longer(origin, is_here):
    said = []
    hub = Hub(2, Limits(), selectors.DefaultSelector(), said.append, said.append)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        client = socket.create_connection(place, source_address=(origin, 0))
        wire = Wire(listener.accept()[0], SECRET, is_server=True)
    session = Session(SECRET, is_server=False)
    client.sendall(session.opening)
    wire.receive()
    session.receive(client.recv(4096))
    hub.on_hello(wire, [{"kind": "hello", "rank": 1, "instance": "x"}])
    assert wire.is_here == is_here
    for _ in range(7):  # seconds in which its watch gets no time, or its host is gone
        hub.tick(1.0)
    is_ended = {"kind": "stacks"} in said  # the ranks are asked where they are
    assert is_ended != is_here
    for _ in range(60):
        hub.tick(1.0)
    assert {"kind": "stacks"} in said
    wire.close()
    client.close()


def test_messages_arrive_whole_and_in_order():
    client, server = connected()
    sent = [{"kind": "hello", "text": "é" * n} for n in (0, 1, 90)]
    data = b"".join(client.seal(message) for message in sent)
    got = []
    for byte in data:  # as slowly as can be
        got += server.receive(bytes([byte]))
    assert got == sent
    assert client.receive(server.seal({"kind": "welcome"})) == [{"kind": "welcome"}]


def test_nobody_reads_what_is_sent():
    client, _ = connected()
    assert b"traceback" not in client.seal({"text": "traceback"})
    assert client.seal({"a": 1}) != client.seal({"a": 1})


def refused(session, data, text="does not know the secret"):
    with pytest.raises(RefusedError, match=text):
        session.receive(data)


def test_what_is_changed_replayed_or_reordered_is_refused():
    client, server = connected()
    first, second = client.seal({"n": 1}), client.seal({"n": 2})
    for position in range(4, len(first)):
        _, other = connected()
        changed = bytearray(first)
        changed[position] ^= 1
        refused(other, bytes(changed))
    assert server.receive(first) == [{"n": 1}]
    refused(server, first)  # replayed in its connection

    client, server = connected()
    client.seal({"n": 1})
    refused(server, client.seal({"n": 2}))  # one left out

    client, server = connected()
    refused(client, client.seal({"n": 1}))  # sent back

    client, server = connected()
    refused(server, second)  # recorded from another connection


def test_a_recorded_connection_cannot_be_played_again():
    client = Session(SECRET, is_server=False)
    first = Session(SECRET, is_server=True)
    first.receive(client.opening)
    client.receive(first.opening)
    recording = client.opening + client.seal({"kind": "hello", "rank": 1})
    refused(Session(SECRET, is_server=True), recording)


def test_another_secret_and_another_protocol_are_refused():
    client, server = connected(b"x" * 32)
    refused(server, client.seal({"kind": "hello"}))
    fresh = Session(SECRET, is_server=True)
    refused(fresh, b"GET / HTTP/1.1\r\n", "does not speak this protocol")
    _, server = connected()
    huge = (MOST_HELLO + 1).to_bytes(4, "big")
    refused(server, huge, f"a frame of {MOST_HELLO + 1} bytes")


# Where they meet ----------------------------------------------------------------------

RING = (("10.0.0.1:5001", "10.1.0.1:5001"), ("10.0.0.2:5001",))
HERE = (("127.0.0.1:5001",), ("127.0.0.1:5002",))


def test_ranks_of_one_host_meet_by_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    meeting = find_meeting({}, "ring", HERE)
    assert meeting.kind == "file" and meeting.addresses == ("127.0.0.1",)
    assert find_meeting({}, "ring", HERE) == meeting
    other = (("127.0.0.1:6001",), ("127.0.0.1:6002",))
    assert find_meeting({}, "ring", other).path != meeting.path
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    mpi["PMIX_NAMESPACE"] = "prterun-7@1"
    assert find_meeting(mpi, "mpi").kind == "file"
    mpi["OMPI_COMM_WORLD_LOCAL_SIZE"] = "1"
    assert find_meeting(mpi, "mpi").kind == "late"

    assert read_meeting(meeting.path) is None
    secret = write_meeting(meeting.path, 4711)
    assert read_meeting(meeting.path) == (4711, secret) and len(secret) == 32
    assert os.stat(meeting.path).st_mode & 0o777 == 0o600
    assert os.stat(runtime_folder()).st_mode & 0o777 == 0o700
    remove_meeting(meeting.path)
    assert read_meeting(meeting.path) is None


def test_a_folder_that_others_can_enter_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runtime_folder().chmod(0o755)
    with pytest.raises(ValueError, match="got mode 755"):
        find_meeting({}, "ring", HERE)
    runtime_folder_path = tmp_path / f"mlx_ep-{os.getuid()}"
    runtime_folder_path.rmdir()
    runtime_folder_path.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="must be a folder of this user's"):
        find_meeting({}, "ring", HERE)


def test_ranks_of_several_hosts_meet_by_a_secret_or_late():
    assert find_meeting({}, "ring", RING).kind == "late"
    with_secret = find_meeting({"MLX_EP_SECRET": LONG}, "ring", RING)
    assert with_secret.kind == "address"
    assert with_secret.addresses == ("10.0.0.1", "10.1.0.1")
    assert all(20000 <= port < 30000 for port in with_secret.ports)
    other = find_meeting({"MLX_EP_SECRET": LONG + "!"}, "ring", RING)
    assert other.secret != with_secret.secret and other.ports != with_secret.ports
    jaccl = {"MLX_EP_SECRET": LONG, "MLX_JACCL_COORDINATOR": "192.168.0.5:32323"}
    assert find_meeting(jaccl, "jaccl").addresses == ("192.168.0.5",)
    by_hand = {"MLX_EP_SECRET": LONG, "MLX_EP_CONTROL": "[fd00::1]:7000"}
    meeting = find_meeting(by_hand, "mpi")
    assert (meeting.addresses, meeting.ports) == (("fd00::1",), (7000,))


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"MLX_EP_SECRET": "short"}, "must have 16 characters or more, got 5"),
        ({"MLX_EP_CONTROL": "10.0.0.1:7000"}, "MLX_EP_CONTROL needs MLX_EP_SECRET"),
        ({"MLX_EP_SECRET": LONG, "MLX_EP_CONTROL": "host"}, "must be the address:port"),
    ],
)
def test_malformed_variables_are_refused(environ, text):
    with pytest.raises(ValueError, match=text):
        find_meeting(environ, "ring", RING)


# Limits, progress, report -------------------------------------------------------------


def test_limits_come_from_the_environment():
    limits = Limits().changed_by({"MLX_EP_LIMITS": "decode=120, loading=inf,"})
    assert (limits.decode, limits.loading, limits.prefill) == (120, math.inf, 300)
    assert limits.of("decode") == 120 and limits.of("waiting") == math.inf
    for text in ("decode", "decode=x", "nothing=5", "decode=nan"):
        with pytest.raises(ValueError, match="must be name=seconds between commas"):
            Limits().changed_by({"MLX_EP_LIMITS": text})
    with pytest.raises(ValueError, match="limit decode must be above 0 s, got -1"):
        Limits().changed_by({"MLX_EP_LIMITS": "decode=-1"})
    with pytest.raises(ValueError, match="limit silence must be above 1 s"):
        Limits(silence=0.5)


def test_progress_is_read_through_the_page():
    page = ProgressPage()
    reader = ProgressPage(page.file_descriptor)
    assert reader.read().phase == ""
    page.at("decode", 7)
    since = reader.read().since
    page.at(layer=3, stage="all_reduce")
    place = reader.read()
    assert (place.phase, place.step, place.layer) == ("decode", 7, 3)
    assert (place.stage, place.count, place.since) == ("all_reduce", 1, since)
    page.at("prefill")
    assert reader.read().step is None and reader.read().since >= since
    before = time.monotonic()
    page.beat()
    assert before <= reader.read().beat <= time.monotonic()
    reader.close()
    page.close()


def test_a_layer_is_read_through_the_page_until_the_next_step():
    page = ProgressPage()
    watch = ProgressPage(page.file_descriptor)
    page.at("decode", 3)
    page.visit(7, "experts")
    place = watch.read()
    assert (place.step, place.layer, place.stage) == (3, 7, "experts")
    page.visit(-1, "combine")  # a layer without a number
    assert (watch.read().layer, watch.read().stage) == (None, "combine")
    page.at(step=4)
    assert (watch.read().layer, watch.read().stage) == (None, "")
    watch.close()
    page.close()


def test_fingerprints_are_kept_by_number():
    one, other = ProgressPage(), ProgressPage()
    for number in range(1000):
        one.mark(number)
        other.mark(number if number != 990 else 0)
    assert len(one.read_marks()) == 64
    assert max(one.read_marks()) == 1000
    same = [
        n for n, value in one.read_marks().items() if other.read_marks()[n] == value
    ]
    assert max(same) == 988 and min(one.read_marks()) == 1000 - 63 * 4
    fresh = ProgressPage()
    fresh.mark(1)
    fresh.mark(2, 3)
    assert list(fresh.read_marks()) == [1, 2]
    for page in (one, other, fresh):
        page.close()


def test_a_report_says_who_where_and_since_when():
    place = {"phase": "decode", "step": 12, "layer": None, "stage": "", "since": 3.0}
    running = place | {"stopped": False, "interpreter": 0.1}
    stopped = place | {"stopped": True, "interpreter": 9.0, "layer": 4}
    text = render_report("rank 1 stopped", {0: running, 1: stopped}, [0, 1], {0: "at"})
    assert text.splitlines() == [
        "[mlx_ep] rank 0 ends: rank 1 stopped",
        "[mlx_ep]   rank 0: decode, step 12, for 3.0 s; running",
        "[mlx_ep]   rank 1: decode, step 12, layer 4, for 3.0 s; stopped",
        "[mlx_ep] stacks of rank 0:",
        "at",
        "[mlx_ep] stacks of rank 1:",
        "(no answer)",
    ]
    assert render_report("rank 0 failed", {}, [], {}) == "[mlx_ep] rank 0 failed"


def test_a_watch_needs_no_mlx():
    code = (
        "import sys, json; import mlx_ep.comm.control.process; "
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in "
        "('mlx', 'mlx_lm', 'numpy')]))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == []


FAILING = """
import os
from mlx_ep.comm.channel import Liveness
from mlx_ep.comm.control.limits import Limits
from mlx_ep.comm.control.meeting import Meeting
Liveness(0, 2, Meeting("late", "", ("127.0.0.1",)), Limits())
os._exit(3)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_mpirun_does_not_wait_for_a_watch_whose_peer_never_came(rank, tmp_path):
    def watches():
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MLX_EP_TEST") == str(tmp_path):
                    yield process

    own = {"OMPI_COMM_WORLD_SIZE": "2", "MLX_EP_TEST": str(tmp_path)}
    command = [sys.executable, "-c", FAILING.replace("(0,", f"({rank},")]
    assert subprocess.run(command, env=os.environ | own).returncode == 3
    until(lambda: not list(watches()), lambda: list(watches()), 5 * LATECOMERS)


def test_hosts_of_one_name_are_told_apart(monkeypatch):
    own = host_id()
    assert own.startswith(socket.gethostname() + "/") and host_id() == own
    monkeypatch.setattr(host, "_boot", lambda: "another boot")
    other = host_id.__wrapped__()
    assert other != own and other.startswith(socket.gethostname() + "/")
