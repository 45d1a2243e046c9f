"""What the process beside a rank starts with."""

from __future__ import annotations

import os
import signal
import socket
import sys

from mlx_ep.comm.control.watch import Watch
from mlx_ep.comm.control.wire import allow_newcomers


def main() -> None:
    """The process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    link, wake, page, stacks = map(int, sys.argv[1:5])
    allow_newcomers()
    Watch(socket.socket(fileno=link), socket.socket(fileno=wake), page, stacks).run()
    os._exit(0)  # a thread may still wait for somebody to read its words
