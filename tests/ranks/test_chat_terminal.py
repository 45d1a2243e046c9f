"""The chat in a terminal: Ctrl-C stops the answer only, lines have a history."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.waiting import LONG

pytestmark = pytest.mark.requires("ranks")


class Terminal:
    """A command in a terminal of its own, as a user would type at it."""

    def __init__(self, command: list[str], home: Path) -> None:
        self._file, child = pty.openpty()
        self.said = ""
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env=os.environ | {"XDG_CACHE_HOME": str(home), "HOME": str(home)},
        )
        os.close(child)

    def wait_for(self, text: str, seconds: float = LONG) -> str:
        """Read until `text` comes; what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < deadline, self.said
            try:
                self.said += os.read(self._file, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                assert text in self.said, self.said
        before, _, self.said = self.said.partition(text)
        return before

    def wait_for_more(self, count: int) -> None:
        """Until it has said so many characters more."""
        wanted = len(self.said) + count
        while len(self.said) < wanted:
            self.said += os.read(self._file, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def close(self) -> int:
        code = self.process.wait(timeout=LONG)
        os.close(self._file)
        return code


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_stops_the_answer_only(num_ranks: int, tmp_path: Path) -> None:
    # Random weights do not come to an end by themselves.
    model = str(tiny.save_checkpoint(tmp_path / "model", tiny.QWEN3_MOE))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    launch = ["-m", "mlx_ep.launch", "-n", str(num_ranks), "--", "mlx_ep.chat"]
    flags = ["--model", model, "--max-tokens", "100000", "--no-warmup"]
    terminal = Terminal([sys.executable, *launch, *flags], tmp_path / "home")
    terminal.wait_for(">> ")
    terminal.type("hello there\n")
    terminal.wait_for("hello there")  # the echo
    terminal.wait_for_more(200)
    # As the terminal does it: to rank 0 and the launcher, which share its group.
    os.killpg(terminal.process.pid, signal.SIGINT)
    said = terminal.wait_for("tokens-per-sec")
    tokens = int(said.rsplit("[", 1)[1].split()[0])
    assert 1 < tokens < 100_000
    terminal.wait_for(">> ")
    terminal.type("\x1b[A\n")  # the line before, out of the history
    assert "hello there" in terminal.wait_for("\n")
    terminal.wait_for_more(200)
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("tokens-per-sec")
    terminal.wait_for(">> ")
    terminal.type("/quit\n")
    assert terminal.close() == 0, terminal.said
    (history,) = tmp_path.glob("home/**/chat_history")
    assert history.read_text().splitlines()[-2:] == ["hello there", "/quit"]
