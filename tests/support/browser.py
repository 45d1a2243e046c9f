"""A headless Chromium that is told what to do over a pipe, without a library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.waiting import LONG, until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_READS, _WRITES = 3, 4  # the browser's ends of --remote-debugging-pipe
# Moves the pipe's ends to where the browser expects them.
_SHELL = 'exec "$@" 3<&"$IN" 4>&"$OUT"'


class Tab:
    """One page; `log` has what it and its network said."""

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of = to, of
        self._number, self._held = 0, b""
        self.log: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._call(method, self._session, **parameters)

    def _call(
        self, method: str, session: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self._note(found)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = os.read(self._of, 65536)
            assert part, "the browser has ended"
            self._held += part
        line, self._held = self._held.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.log.append(f"exception: {parameters['exceptionDetails']['text']}")
        elif event["method"] == "Log.entryAdded":
            entry = parameters["entry"]
            self.log.append(f"{entry['level']}: {entry['text']} {entry.get('url')}")
        elif event["method"] == "Network.requestWillBeSent":
            self.log.append(f"asks: {parameters['request']['url']}")

    def run(self, code: str) -> Any:
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, code: str, seconds: float = LONG) -> Any:
        """The value of an expression, once it is something."""
        return until(lambda: self.run(code), lambda: (code, self.log[-20:]), seconds)

    def picture(self, file: Path, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        data = self.call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A browser with a new profile in `folder`, and a tab of it."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    assert found, f"this test needs one of {', '.join(BROWSERS)}"
    theirs_in, to = os.pipe()
    of, theirs_out = os.pipe()
    command = [
        found[0], "--headless=new", "--no-sandbox", "--disable-gpu",
        "--disable-background-networking", "--disable-dev-shm-usage",
        "--no-first-run", f"--user-data-dir={folder / 'profile'}",
        "--remote-debugging-pipe",
    ]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", _SHELL, "browser", *command],
        env=os.environ | {"IN": str(theirs_in), "OUT": str(theirs_out)},
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Tab(to, of)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(of)
