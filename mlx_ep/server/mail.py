"""Tokens on their way from the engine's thread to the coroutines that wait for them."""

from __future__ import annotations

import asyncio
from collections import deque

from mlx_ep.server.requests import Token


class Inbox:
    """The tokens of one HTTP request."""

    def __init__(self) -> None:
        self._tokens: list[Token] = []
        self._is_there = asyncio.Event()

    def put(self, token: Token) -> None:
        """On the event loop's thread."""
        self._tokens.append(token)
        self._is_there.set()

    async def take(self) -> list[Token]:
        """All that have come, at least one: a slow client gets more at a time."""
        await self._is_there.wait()
        self._is_there.clear()
        tokens, self._tokens = self._tokens, []
        return tokens


class Mail:
    """One wake-up of the event loop for all the tokens of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._post: deque[tuple[Inbox, Token]] = deque()
        self._is_due = False

    def send(self, inbox: Inbox, token: Token) -> None:
        """On the engine's thread; after the loop's end nobody is left to read."""
        self._post.append((inbox, token))
        if not self._is_due and not self._loop.is_closed():
            self._is_due = True
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        # Before the first is taken: what is sent from here on asks again.
        self._is_due = False
        while self._post:
            inbox, token = self._post.popleft()
            inbox.put(token)
