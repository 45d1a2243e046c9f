"""The hosts of a cluster, as the hostfiles of mlx.launch name them."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKENDS = ("ring", "jaccl", "jaccl-ring", "mpi")
_HERE = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Host:
    """Where one rank runs.

    Attributes:
        ssh: the name to log in to.
        ips: its addresses; none where only the name is known.
        rdma: its devices to every rank, for JACCL; None to itself.
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[Any, ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, started without ssh."""
        return self.ssh in _HERE


@dataclass(frozen=True)
class Hosts:
    """The hosts of all ranks, in rank order.

    Attributes:
        backend: that the file names, or "".
        env: variables of every rank, as "NAME=value".
    """

    ranks: tuple[Host, ...]
    backend: str = ""
    env: tuple[str, ...] = ()


def read_hostfile(path: Path) -> Hosts:
    """A hostfile: a list of hosts, or an object with ``hosts``, ``backend``, ``envs``.

    Raises:
        ValueError: it cannot be read, or is not such a file.
    """
    where = f"--hostfile {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--hostfile must be a file that can be read: {error}."
        ) from None
    except ValueError as error:
        raise ValueError(f"{where} must be JSON; got {error}.") from None
    if isinstance(content, list):
        content = {"hosts": content}
    hosts = content.get("hosts") if isinstance(content, dict) else None
    if not isinstance(hosts, list) or not hosts:
        raise ValueError(
            f'{where} must hold a list of hosts, or an object with one as "hosts"; got '
            f"{json.dumps(content)[:60]}. docs/examples has some."
        )
    backend, env = content.get("backend", ""), content.get("envs", [])
    if backend not in ("", *BACKENDS):
        raise ValueError(
            f'{where}: "backend" must be one of {", ".join(BACKENDS)}; got {backend!r}.'
        )
    if not isinstance(env, list) or not all(_is_variable(entry) for entry in env):
        raise ValueError(
            f'{where}: "envs" must be a list of texts NAME=value; got {env!r}.'
        )
    ranks = tuple(_host(host, f"{where}, host {i}") for i, host in enumerate(hosts))
    return Hosts(ranks, backend, tuple(env))


def list_hosts(text: str, repeat: int) -> Hosts:
    """Hosts by their names or addresses, with commas between.

    Args:
        repeat: ranks on each host, one behind the other.

    Raises:
        ValueError: a name is empty.
    """
    ranks = []
    for name in (part.strip() for part in text.split(",")):
        if not name or name.startswith("-"):
            raise ValueError(f"--hosts must be names between commas; got {text!r}.")
        ranks += [Host(name, (name,) if _is_address(name) else ())] * repeat
    return Hosts(tuple(ranks))


def _host(content: Any, where: str) -> Host:
    name = content.get("ssh") if isinstance(content, dict) else None
    # A name that begins with a dash would be an option of ssh.
    if not isinstance(name, str) or not name or name.startswith("-"):
        raise ValueError(
            f'{where} must be an object with the name to log in to as "ssh"; got '
            f"{json.dumps(content)[:60]}."
        )
    ips, rdma = content.get("ips", []), content.get("rdma", [])
    if not isinstance(ips, list) or not all(map(_is_address, ips)):
        raise ValueError(f'{where}: "ips" must be a list of addresses; got {ips!r}.')
    if not isinstance(rdma, list):
        raise ValueError(f'{where}: "rdma" must be a list of devices; got {rdma!r}.')
    return Host(name, tuple(ips), tuple(rdma))


def _is_address(text: Any) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_variable(entry: Any) -> bool:
    name = entry.partition("=")[0] if isinstance(entry, str) else ""
    return "=" in str(entry) and name.isidentifier()
