"""What the endpoints share: the engine, the tokenizer, names, limits, counters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TypeVar

from mlx_ep.server.asked import Defaults, Names
from mlx_ep.server.mail import Mail
from mlx_ep.server.metrics import ServerMetrics
from mlx_ep.server.requests import Engine
from mlx_ep.server.texts import Texts

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much.

    Attributes:
        api_keys: any of them; none: everybody who reaches the port.
        origins: of web pages that may ask from a browser; "*" all, none none.
        body_bytes: of a request.
        send_seconds: after which a client that does not read is given up.
        keep_alive_seconds: between two signs of life on a stream without tokens.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()
    body_bytes: int = 32 * 2**20
    send_seconds: float = 60.0
    keep_alive_seconds: float = 5.0


@dataclass
class Service:
    """One model behind one address; made on the event loop's thread."""

    engine: Engine
    texts: Texts
    names: Names
    defaults: Defaults = field(default_factory=Defaults)
    access: Access = field(default_factory=Access)
    fingerprint: str = field(init=False)
    mail: Mail = field(init=False)
    metrics: ServerMetrics = field(init=False)

    def __post_init__(self) -> None:
        versions = (version(name) for name in ("mlx-ep", "mlx", "mlx-lm"))
        self.fingerprint = "-".join(versions)
        self.mail = Mail(asyncio.get_running_loop())
        self.metrics = ServerMetrics(self.engine.state)
        # One thread: a tokenizer of transformers is not for two at once.
        self._readers = ThreadPoolExecutor(1, "tokenizer")

    async def read(self, work: Callable[[], T]) -> T:
        """Templates, tokens and grammars, beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, work)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While a request whose body is here becomes one of the engine's."""
        self.engine.expect(1)
        try:
            yield
        finally:
            self.engine.expect(-1)

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
