"""What MLX connects by, as mlx.launch gives it to the ranks."""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Sequence

from mlx_ep.cli.hosts import Host

FIRST_PORT = 32323  # mlx.launch's


def transport(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Files (by the variable that names each) and variables that MLX connects by.

    Raises:
        ValueError: the hosts do not have what the backend needs.
    """
    ranks: Sequence[Host] = args.hosts.ranks
    if args.backend == "ring":
        if len(ranks) == 1:
            return {}, {}
        for rank, host in enumerate(ranks):
            if not host.ips and not host.is_here:
                raise ValueError(
                    f"The ring needs the address of every rank; rank {rank} is "
                    f'{host.ssh}. Give addresses, or "ips" in a hostfile.'
                )
        ports = _ports(args)
        addresses = [
            [f"{ip}:{port}" for ip in host.ips or ("127.0.0.1",)]
            for host, port in zip(ranks, ports, strict=True)
        ]
        return {"MLX_HOSTFILE": json.dumps(addresses)}, {}
    for rank, host in enumerate(ranks):
        others = [device for i, device in enumerate(host.rdma) if i != rank]
        if len(host.rdma) != len(ranks) or host.rdma[rank] is not None:
            raise ValueError(
                f'{args.backend} needs for every rank a list "rdma" with its device to '
                f"each of the {len(ranks)} ranks, null to itself; rank {rank} has "
                f"{list(host.rdma)}."
            )
        if args.backend == "jaccl" and None in others:
            raise ValueError(
                f"jaccl needs a device to every other rank; rank {rank} has "
                f"{list(host.rdma)}. For Macs in a circle the backend is jaccl-ring."
            )
    if not ranks[0].ips:
        raise ValueError(
            f'{args.backend} needs an address of rank 0: "ips" of {ranks[0].ssh}.'
        )
    port = args.starting_port or FIRST_PORT
    variables = {"MLX_JACCL_COORDINATOR": f"{ranks[0].ips[0]}:{port}"}
    if args.backend == "jaccl-ring":
        variables["MLX_JACCL_RING"] = "1"
    return {"MLX_IBV_DEVICES": json.dumps([h.rdma for h in ranks])}, variables


def _ports(args: argparse.Namespace) -> list[int]:
    """One for each rank: free ones where all ranks are here."""
    count = len(args.hosts.ranks)
    if args.starting_port or not all(host.is_here for host in args.hosts.ranks):
        first = args.starting_port or FIRST_PORT
        return list(range(first, first + count))
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
