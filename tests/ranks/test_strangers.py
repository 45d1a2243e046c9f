"""10,000 strangers at the control channel while a run starts, and while it runs."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_ep.comm.control.meeting import find_meeting
from tests.support.launchers import rank_environment, ring_variables

pytestmark = [pytest.mark.requires("ranks"), pytest.mark.slow]

STRANGERS = 10_000
AT_ONCE = 100
COMMAND = [sys.executable, "-m", "mlx_ep.generate", "--max-tokens", "40"]
COMMAND += ["--prompt", "What is a hacker?", "--verbose", "F"]


class Crowd:
    """Connections to a port of this host, some silent and some not, the last open."""

    def __init__(self, port: int) -> None:
        self.port, self.count = port, 0
        self._open: list[socket.socket] = []

    def come(self) -> bool:
        """One more; False: nobody listens."""
        try:
            stranger = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        except ConnectionError:
            return False
        self.count += 1
        self._open.append(stranger)
        if self.count % 3 == 0:
            with contextlib.suppress(ConnectionError):
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        if len(self._open) > AT_ONCE:
            self._open.pop(0).close()
        return True

    def leave(self) -> None:
        for stranger in self._open:
            stranger.close()


def test_strangers_neither_end_nor_change_a_run(tmp_path: Path) -> None:
    variables = ring_variables(2, tmp_path)
    hosts = json.loads((tmp_path / "hostfile").read_text())
    place = Path(find_meeting({}, "ring", hosts).path)
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:

        def start(rank: int) -> None:
            out = stack.enter_context((tmp_path / f"{rank}.out").open("wb"))
            err = stack.enter_context((tmp_path / f"{rank}.err").open("wb"))
            environment = rank_environment(variables[rank])
            process = subprocess.Popen(COMMAND, env=environment, stdout=out, stderr=err)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)

        start(0)
        limit = time.monotonic() + 60
        while not place.exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        crowd = Crowd(json.loads(place.read_text())["port"])
        stack.callback(crowd.leave)
        began = time.monotonic()
        while crowd.count < STRANGERS:
            assert crowd.come()
        came = time.monotonic()
        start(1)
        while crowd.come():  # until all ranks are connected: then nobody listens
            assert time.monotonic() - came < 60
            time.sleep(0.001)
        joined = time.monotonic()
        assert [process.wait(120) for process in processes] == [0, 0]
        assert not crowd.come()
    print(
        f"{crowd.count} strangers, {STRANGERS} of them in {came - began:.1f} s; the "
        f"other rank was connected {joined - came:.1f} s after its start"
    )
    alone = subprocess.run(
        COMMAND, env=rank_environment(None), capture_output=True, check=True
    )
    assert (tmp_path / "0.out").read_bytes() == alone.stdout != b""
    said = (tmp_path / "0.err").read_text()
    assert len(re.findall(r"control channel", said)) == 2
    (count,) = re.findall(r"turned away (\d+) connections of strangers", said)
    assert STRANGERS <= int(count) <= crowd.count
