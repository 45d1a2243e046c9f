"""The page in a browser: it chats, and shows the cluster; nothing else is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_ep.server.service import Access
from tests.support.browser import browser
from tests.support.http_serving import serving


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    # Kept where somebody wants to look at them.
    pictures = Path(os.environ.get("MLX_EP_PICTURES", tmp_path))
    said = "<think>hm</think>A daemon runs in the background."
    with (
        serving(said, step_seconds=0.03, access=Access(api_keys=("k",))) as server,
        browser(tmp_path) as tab,
    ):
        tab.call("Page.navigate", url=server.address)
        # Without the key the page shows nothing, and asks for it.
        tab.wait_for("document.querySelector('#access:not([hidden])')?.id")
        tab.run("$('key').value = 'k'; $('access').requestSubmit()")
        tab.wait_for("$('health').textContent == 'serving'")
        tab.run("$('text').value = 'What is a daemon?'; $('ask').requestSubmit()")
        tab.wait_for("document.querySelector('.assistant')?.textContent")
        tab.wait_for("$('numbers').textContent.includes('running1')")
        tab.wait_for("$('speed').textContent.includes('tokens/s')")
        texts = tab.run(
            "[...document.querySelectorAll('li')].map((i) => i.textContent)"
        )
        assert texts == [
            "What is a daemon?",
            "hm",
            "A daemon runs in the background.",
        ]
        assert "rank 1: 1.3 GB" in tab.run("$('memory').textContent")
        text = tab.run("document.getElementById('load-text').textContent")
        assert text == "3 layers, 2 ranks; the busiest has 1.50 x the mean"
        tab.run("$('record').click()")
        tab.wait_for("$('record').textContent == 'Stop'")
        tab.run("$('text').value = 'And a worm?'; $('ask').requestSubmit()")
        tab.run("$('stop').click()")
        tab.wait_for("!$('send').disabled")
        server.engine.wait_until_idle()
        for name, width in (("wide", 1280), ("narrow", 480)):
            picture = pictures / f"page-{name}.png"
            tab.picture(picture, width, 900)
            assert picture.stat().st_size > 10_000
        assert not [line for line in tab.log if line.startswith("exception")], tab.log
        asked = {line for line in tab.log if line.startswith("asks")}
        assert all(line.startswith(f"asks: {server.address}") for line in asked)
        assert not [line for line in tab.log if "Content Security" in line], tab.log
