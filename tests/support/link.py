"""A slow link between ranks: latency and bandwidth, without a cable.

On a ring each rank believes that its neighbours listen where a relay of this process
does. A relay holds back what it passes on: bytes leave one after another at the
bandwidth, and arrive a latency later, as on a cable. A relay's threads run before all
others where the system lets them (root on Linux): the ranks keep their cores busy while
they wait, and a relay that had to wait for one would add milliseconds. What it takes of
a core is the copying of bytes.

Over MPI a library in the place of libmpi (`slow_mpi.c`) lets the ranks of a collective
sleep until all have joined it, and then for the latency and the time of the bytes that
a rank gives it. That takes no core at all. `set_link` makes it another link, so that
what goes through it can be timed in turn with what does not.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.host.compilers import builder, missing

CHUNK_BYTES = 1 << 16
CONNECT_SECONDS = 20.0


@dataclass
class Link:
    """Links of one kind between all neighbours; a context manager.

    Attributes:
        latency: seconds.
        bandwidth: bytes per second, in each direction, of all connections between two
            ranks together.
        num_bytes: that went through, of all links.
    """

    latency: float
    bandwidth: float
    num_bytes: int = 0
    _free_at: dict[tuple[int, int], float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sockets: list[socket.socket] = field(default_factory=list)
    _places: list[Path] = field(default_factory=list)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for place in self._places:
            place.unlink(missing_ok=True)

    def between(
        self, variables: list[dict[str, str]], directory: Path
    ) -> list[dict[str, str]]:
        """The variables of `ring_variables`, with relays between the ranks."""
        hosts = json.loads(Path(variables[0]["MLX_HOSTFILE"]).read_text())
        relays = [
            [self._relay(address, (rank - 1) % len(hosts), rank) for address in host]
            for rank, host in enumerate(hosts)
        ]
        changed = []
        for rank, own in enumerate(variables):
            seen = [*relays[:rank], hosts[rank], *relays[rank + 1 :]]
            hostfile = directory / f"hostfile.{rank}"
            hostfile.write_text(json.dumps(seen))
            changed.append(own | {"MLX_HOSTFILE": str(hostfile)})
        return changed

    def over_mpi(self, variables: dict[str, str], directory: Path) -> dict[str, str]:
        """The variables of `mpirun_command`, with the slow library in libmpi's place.

        Raises:
            RuntimeError: there is no compiler.
        """
        compiler = builder()
        if compiler is None:
            raise RuntimeError(f"a slow link over MPI is compiled: {missing()}")
        real, made = Path(variables["MLX_MPI_LIBNAME"]), directory / "libslow_mpi.so"
        command = [*compiler, "-x", "c", str(Path(__file__).with_name("slow_mpi.c"))]
        command += [f"-DLATENCY={self.latency}", f"-DBANDWIDTH={self.bandwidth}"]
        command += [f'-DMEETING="{self._meeting_place(directory)}"']
        command += ["-O1", "-shared", "-fPIC", "-x", "none", str(real)]
        command += [f"-Wl,-rpath,{real.parent}", "-o", str(made)]
        subprocess.run(command, check=True)
        return variables | {"MLX_MPI_LIBNAME": str(made)}

    def _meeting_place(self, directory: Path) -> Path:
        """A page of zeros, in memory where the system has files there."""
        memory = Path("/dev/shm")
        folder = memory if memory.is_dir() else directory
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(bytes(4096))
        self._places.append(Path(file.name))
        return self._places[-1]

    def _relay(self, address: str, source: int, target: int) -> str:
        """Where rank `source` connects instead of to `address`, of rank `target`."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(listener)
        self._start(self._accept, listener, address, (source, target))
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def _accept(
        self, listener: socket.socket, address: str, ends: tuple[int, int]
    ) -> None:
        with suppress(OSError):  # closed at the end
            while True:
                near, _ = listener.accept()
                far = _connect(address)
                self._sockets += [near, far]
                ways = ((near, far, ends), (far, near, ends[::-1]))
                for source, target, way in ways:
                    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    chunks: queue.Queue[tuple[float, bytes]] = queue.Queue()
                    self._start(self._read, source, chunks, way)
                    self._start(_write, target, chunks)

    def _read(
        self,
        source: socket.socket,
        chunks: queue.Queue[tuple[float, bytes]],
        way: tuple[int, int],
    ) -> None:
        """Say of each chunk when its last byte arrives at the other end."""
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                with self._lock:
                    self.num_bytes += len(data)
                    sent = max(self._free_at.get(way, 0.0), time.monotonic())
                    sent += len(data) / self.bandwidth
                    self._free_at[way] = sent
                chunks.put((sent + self.latency, data))
        chunks.put((0.0, b""))

    @staticmethod
    def _start(function: Callable[..., None], *args: object) -> None:
        def run() -> None:
            run_first()
            function(*args)

        threading.Thread(target=run, daemon=True).start()


def set_link(latency: float, bandwidth: float) -> None:
    """On a rank behind a `Link` over MPI: another link, from the next collective on.

    All ranks have to call it between the same collectives.
    """
    library = ctypes.CDLL(os.environ["MLX_MPI_LIBNAME"])
    library.set_link(ctypes.c_double(latency), ctypes.c_double(bandwidth))


def run_first() -> None:
    """Let this thread run as soon as it can, where the system allows it."""
    if hasattr(os, "sched_setscheduler"):
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _write(target: socket.socket, chunks: queue.Queue[tuple[float, bytes]]) -> None:
    with suppress(OSError):
        while True:
            arrival, data = chunks.get()
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            if (wait := arrival - time.monotonic()) > 0:
                time.sleep(wait)
            target.sendall(data)


def _connect(address: str) -> socket.socket:
    """To a rank that may not listen yet."""
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
