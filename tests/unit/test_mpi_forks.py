"""What stands in for a rank under mpirun ends as the rank did."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from tests.support.mpi_forks import _code


def test_a_rank_that_ends_is_waited_for(tmp_path: Path) -> None:
    """Also by who looks when the pipe is open and the code is not yet in it."""
    pipe = tmp_path / "ended.0"
    os.mkfifo(pipe)

    def end() -> None:
        with pipe.open("wb", buffering=0) as file:
            time.sleep(0.1)
            file.write(b"3")

    ending = threading.Thread(target=end)
    ending.start()
    assert _code(str(pipe), os.getppid()) == 3
    ending.join()


def test_a_mpirun_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "ended.0"
    os.mkfifo(pipe)
    assert _code(str(pipe), parent=-1) == 1
