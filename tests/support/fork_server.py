"""A process from which others are forked: run as a script by `forked.py`.

It imports everything, and then answers requests of the processes of tests that connect
to its socket: a command line, variables, a folder, and four open files (stdin, stdout,
stderr, and where to say how it ended). A child runs the command line as a Python would
that was started with it. No thread runs here, and no random number has been drawn. It
ends when the last of those processes has.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import types
from contextlib import suppress
from typing import Any

HEADER = struct.Struct("!I")  # bytes of the request that follows
NUM_FILES = 4
READY = b"r"  # its first word
# The variable that names the folder where all processes of one pytest find it.
FOLDER = "MLX_EP_TEST_FORKS"


def serve(listener: socket.socket) -> list[str]:
    """Fork for every request; returns in each child, with what it is to run."""
    status_of: dict[int, int] = {}
    clients: list[socket.socket] = []
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Ctrl-C in a terminal is for pytest, which ends its children by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        if woken in ready:
            os.read(woken, 4096)
            _report_ended(status_of)
        if listener in ready:
            client, _ = listener.accept()
            client.sendall(READY)
            clients.append(client)
            selector.register(client, selectors.EVENT_READ)
        for client in [client for client in clients if client in ready]:
            header, files, *_ = socket.recv_fds(client, HEADER.size, NUM_FILES)
            if not header:
                selector.unregister(client)
                clients.remove(client)
                client.close()
                if not clients:
                    sys.exit()  # pytest is gone
                continue
            request = json.loads(_read(client, HEADER.unpack(header)[0]))
            pid = os.fork()
            if pid == 0:
                selector.close()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for end in (woken, wakes, *status_of.values()):
                    os.close(end)
                for end in (listener, *clients):
                    end.close()
                return _become(request, files)
            for file in files[:3]:
                os.close(file)
            status_of[pid] = files[3]
            _tell(files[3], pid)


def _read(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += client.recv(size - len(data))
    return data


def _tell(file: int, number: int) -> None:
    with suppress(BrokenPipeError):  # who asked is gone; others are not
        os.write(file, b"%d\n" % number)


def _report_ended(status_of: dict[int, int]) -> None:
    while status_of:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        file = status_of.pop(pid)
        _tell(file, os.waitstatus_to_exitcode(status))
        os.close(file)


def _become(request: dict[str, Any], files: list[int]) -> list[str]:
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    argv: list[str] = request["argv"]
    return argv


def run_to_the_end(argv: list[str]) -> None:
    """Run a command line and end the process, as Python does but for one thing.

    Python frees all that it has imported at its end: of what was forked, that copies
    page after page, a quarter of a second.
    """
    code = 0
    try:
        run(argv)
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise  # a message
        code = ended.code or 0
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)  # Python says what is wrong
    _say_farewell_to_mpi(code)
    # With the lock that Python's threads wait for: none runs while C's objects go.
    ctypes.PyDLL(None).exit(code)


def _say_farewell_to_mpi(code: int) -> None:
    """MPI wants one; MLX says it once the last object that holds the group is gone."""
    library = os.environ.get("MLX_MPI_LIBNAME")
    if library is None or not any(name.startswith("OMPI_") for name in os.environ):
        return
    mpi, begun, ended = ctypes.CDLL(library), ctypes.c_int(), ctypes.c_int()
    mpi.MPI_Initialized(ctypes.byref(begun))
    mpi.MPI_Finalized(ctypes.byref(ended))
    if begun.value and not ended.value:
        mpi.MPI_Finalize()
        os._exit(code & 0xFF)  # else MLX might say it again


def run(argv: list[str]) -> None:
    """What ``python ARGV...`` does: ``-m MODULE``, ``-c CODE`` or a script."""
    what, *rest = argv
    if what == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = rest
        # Else runpy warns that it runs a module that has been imported.
        if not hasattr(sys.modules.get(rest[0]), "__path__"):
            sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(what))
        sys.argv = argv
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    from tests.support.preloaded import import_all

    import_all(checks_shapes=sys.argv[1] == "checked")
    gc.collect()
    gc.freeze()  # no collection in a child touches, and copies, what is imported
    run_to_the_end(serve(socket.socket(fileno=int(sys.argv[2]))))
