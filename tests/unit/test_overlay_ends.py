"""Ctrl-C when the text of mlx-lm's own command is complete and the ranks leave."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import atexit, os, signal, sys
from types import SimpleNamespace
from mlx_ep.comm.liveness import Liveness
from mlx_ep.overlay.model import _end_together

class Channel:
    rank = 0
    def close(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    def announce(self, text, code):
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()  # as a rank does that its watch ends
        os._exit(code)

def interrupt():
    signal.raise_signal(signal.SIGINT)  # of another thread it may come too late

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
Liveness.current = Channel()
Liveness.start = lambda group: Liveness.current
when = sys.argv[1]
if when == "afterwards":
    atexit.register(interrupt)  # the last one registered is the first to run
barrier = interrupt if when == "meanwhile" else lambda: None
_end_together(SimpleNamespace(group=None, barrier=barrier))
print("text")
"""


@pytest.mark.parametrize(
    ("when", "code", "error"),
    [
        ("never", 0, ""),
        ("meanwhile", 130, "rank 0 was interrupted (Ctrl-C)\n"),
        ("afterwards", 0, ""),
    ],
)
def test_an_interruption_at_the_end(when: str, code: int, error: str) -> None:
    argv = [sys.executable, "-c", _PROGRAM, when]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "text\n", error)
