"""Where the watches meet and which secret they share, from what the launcher gave.

Before the group exists there are two ways (docs/reliability.md says what each protects
against):

    file       all ranks are on this host: the watch of rank 0 writes its port and a
               random secret to a file that only this user can read
    address    MLX_EP_SECRET is the same on all hosts: it is the secret, and the port is
               made from it; the address is rank 0's as the launcher tells it, or
               MLX_EP_CONTROL=address:port

Otherwise the watches meet `late`: once the group exists, rank 0 tells the others by a
collective. What fails before then is seen by `Limits.starting` alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

SECRET = "MLX_EP_SECRET"
CONTROL = "MLX_EP_CONTROL"
LEAST_SECRET = 16  # characters: it can be tried against a recorded connection
# Ports made from the secret, below those that systems give out by themselves.
FIRST_PORT, NUM_PORTS, PORTS_TRIED = 20000, 10000, 4


@dataclass(frozen=True)
class Meeting:
    """Where the watches of a run meet.

    Attributes:
        kind: see above.
        path: of the file; "" for the other kinds.
        addresses: of rank 0, where its watch listens; for the kind `late` too, as far
            as they are known.
        ports: the watch of rank 0 takes the first that is free; 0 is any.
        secret: of the run, in hexadecimal; "" where rank 0 makes one up.
    """

    kind: Literal["file", "address", "late"]
    path: str = ""
    addresses: tuple[str, ...] = ()
    ports: tuple[int, ...] = (0,)
    secret: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Meeting:
        pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**pairs)  # type: ignore[arg-type]


def secret_key(secret: str) -> bytes:
    """Of MLX_EP_SECRET; b"" of none."""
    return hashlib.sha256(b"mlx_ep run " + secret.encode()).digest() if secret else b""


def find_meeting(
    environ: Mapping[str, str],
    transport: str,
    ring_hosts: Sequence[Sequence[str]] = (),
) -> Meeting:
    """Where the ranks that a launcher started meet.

    Args:
        transport: as `Launched.transport`.
        ring_hosts: what MLX_HOSTFILE holds, ["address:port", ...] for each rank.

    Raises:
        ValueError: MLX_EP_SECRET or MLX_EP_CONTROL is malformed.
    """
    addresses = _addresses_of_rank_0(environ, transport, ring_hosts)
    control = _control(environ)
    if secret := environ.get(SECRET, ""):
        if len(secret) < LEAST_SECRET:
            raise ValueError(
                f"{SECRET} must have {LEAST_SECRET} characters or more, got "
                f"{len(secret)}; make one with: openssl rand -hex 16"
            )
        key = secret_key(secret)
        if control:
            return Meeting("address", "", (control[0],), (control[1],), key.hex())
        if addresses:
            return Meeting("address", "", addresses, _ports(key), key.hex())
    name = _same_host_name(environ, transport, ring_hosts)
    if name:
        digest = hashlib.sha256(f"{transport} {name}".encode()).hexdigest()[:24]
        return Meeting("file", str(runtime_folder() / digest), ("127.0.0.1",))
    return Meeting("late", "", addresses)


def runtime_folder() -> Path:
    """A folder that only this user can enter, made if it is not there.

    Raises:
        ValueError: somebody else made it, or others can enter it.
    """
    folder = Path(tempfile.gettempdir()) / f"mlx_ep-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_own or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(
            f"{folder} must be a folder of this user's that nobody else can enter "
            f"(mode 0700), got mode {stat.S_IMODE(status.st_mode):o}, owner "
            f"{status.st_uid}: remove it, or set TMPDIR"
        )
    return folder


def write_meeting(path: str, port: int) -> bytes:
    """Rank 0 says on its host where it listens; gives the secret that it made up."""
    secret = secrets.token_bytes(32)
    partial = f"{path}.{os.getpid()}"
    with suppress(FileNotFoundError):
        os.unlink(partial)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(partial, flags, 0o600), "w") as file:
        json.dump({"port": port, "secret": secret.hex(), "pid": os.getpid()}, file)
    os.rename(partial, path)
    return secret


def read_meeting(path: str) -> tuple[int, bytes] | None:
    """The port and the secret that rank 0 wrote; None where it did not (yet)."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            content = json.load(file)
        return int(content["port"]), bytes.fromhex(content["secret"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_meeting(path: str) -> None:
    """Removes what `write_meeting` wrote, unless another run wrote there since."""
    with suppress(OSError, ValueError, KeyError):
        if json.loads(Path(path).read_text())["pid"] == os.getpid():
            os.unlink(path)


def _control(environ: Mapping[str, str]) -> tuple[str, int] | None:
    text = environ.get(CONTROL, "")
    if not text:
        return None
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"{CONTROL} must be the address:port at which rank 0 can be reached, got "
            f"{text!r}"
        )
    if SECRET not in environ:
        raise ValueError(f"{CONTROL} needs {SECRET}, the same on every host; set both")
    return address.strip("[]"), int(port)


def _ports(key: bytes) -> tuple[int, ...]:
    numbers = hmac.digest(key, b"port", "sha256")
    return tuple(
        FIRST_PORT + int.from_bytes(numbers[4 * i : 4 * i + 4], "big") % NUM_PORTS
        for i in range(PORTS_TRIED)
    )


def _addresses_of_rank_0(
    environ: Mapping[str, str], transport: str, ring_hosts: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    if transport == "ring" and ring_hosts:
        found = [entry.rpartition(":")[0].strip("[]") for entry in ring_hosts[0]]
        return tuple(dict.fromkeys(found))
    if transport in ("jaccl", "jaccl-ring"):
        address = environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]
        return (address.strip("[]"),) if address else ()
    return ()


def _same_host_name(
    environ: Mapping[str, str], transport: str, ring_hosts: Sequence[Sequence[str]]
) -> str:
    """A name of this run if all its ranks are on this host, else ""."""
    if transport == "mpi":
        here, all_ranks = (
            environ.get(f"OMPI_COMM_WORLD_{what}SIZE", "") for what in ("LOCAL_", "")
        )
        return environ.get("PMIX_NAMESPACE", "") if here == all_ranks else ""
    if transport == "ring" and ring_hosts:
        firsts = {hosts[0].rpartition(":")[0] for hosts in ring_hosts}
        return json.dumps(list(map(list, ring_hosts))) if len(firsts) == 1 else ""
    return ""


def own_addresses() -> tuple[str, ...]:
    """This host's IPv4 addresses, the loopback last."""
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    return tuple(sorted(found, key=lambda it: it.startswith("127.")))[:16]
