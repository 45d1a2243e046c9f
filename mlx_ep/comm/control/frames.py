"""Messages that only the ranks of one run can write, read or replay.

Each side opens with 8 bytes of magic and 16 random bytes, the client first:

    client                      server
    magic nonce_c        ->
                         <-     magic nonce_s
    frame 0: hello       ->
                         <-     frame 0: welcome
    frame 1 ...         <->     frame 1 ...

The nonces and the run's secret give four keys, two for each direction. A frame is

    length [4] | ciphertext [length] | tag [32]

    ciphertext = JSON xor SHAKE-256(cipher key, number of the frame)
    tag        = HMAC-SHA256(tag key, number | length | ciphertext)

Frames are numbered from 0 in each direction and the number is not sent: a frame that
is replayed, left out, reordered, sent back or taken from another connection has a wrong
tag. Until the first tag was right, a frame may have no more than `MOST_HELLO` bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from typing import Any

MAGIC = b"mlx_ep/1"
NONCE = 16  # bytes
TAG = 32
MOST_HELLO = 1024  # bytes of a frame from somebody who may be a stranger
MOST = 4 << 20  # bytes of a frame from a rank: stacks of all threads


class RefusedError(Exception):
    """The other side is no rank of this run."""


class Session:
    """One side of a connection: bytes in, messages out; it does no input or output.

    Args:
        secret: of the run.
        is_server: the server says nothing before the client did.
    """

    def __init__(self, secret: bytes, is_server: bool) -> None:
        self._secret = secret
        self._is_server = is_server
        self._nonce = secrets.token_bytes(NONCE)
        self._buffer = bytearray()
        self._keys: dict[str, bytes] = {}
        self._sent = self._received = 0
        self.opening = b"" if is_server else MAGIC + self._nonce

    @property
    def is_open(self) -> bool:
        """Whether the nonces are known, so that `seal` can be used."""
        return bool(self._keys)

    def receive(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that are complete by now; see `receive_bytes`."""
        return [json.loads(text) for text in self.receive_bytes(data)]

    def receive_bytes(self, data: bytes) -> list[bytes]:
        """The texts of the frames that are complete by now.

        What a server has to answer to an opening is in `opening` afterwards.

        Raises:
            RefusedError: the bytes are not from a rank of this run.
        """
        self._buffer += data
        if not self._keys and not self._meet():
            return []
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def seal(self, message: dict[str, Any]) -> bytes:
        """The frame of a message; frames have to be sent in the order of the calls."""
        return self.seal_bytes(json.dumps(message).encode())

    def seal_bytes(self, text: bytes) -> bytes:
        """Likewise, of a text that is no JSON; of `MOST` bytes at most."""
        side = "server" if self._is_server else "client"
        number = self._sent.to_bytes(8, "big")
        self._sent += 1
        body = _xor(text, self._keys[f"{side} cipher"], number)
        length = len(body).to_bytes(4, "big")
        return length + body + _tag(self._keys[f"{side} tag"], number + length + body)

    def _meet(self) -> bool:
        size = len(MAGIC) + NONCE
        if not self._buffer.startswith(MAGIC[: len(self._buffer)]):
            raise RefusedError("it does not speak this protocol")
        if len(self._buffer) < size:
            return False
        theirs = bytes(self._buffer[len(MAGIC) : size])
        del self._buffer[:size]
        nonces = (theirs, self._nonce) if self._is_server else (self._nonce, theirs)
        base = _tag(self._secret, MAGIC + b"".join(nonces))
        for name in ("client cipher", "client tag", "server cipher", "server tag"):
            self._keys[name] = _tag(base, name.encode())
        if self._is_server:
            self.opening = MAGIC + self._nonce
        return True

    def _next(self) -> bytes | None:
        if len(self._buffer) < 4:
            return None
        length = int.from_bytes(self._buffer[:4], "big")
        if length > (MOST if self._received else MOST_HELLO):
            raise RefusedError(f"it sent a frame of {length} bytes")
        end = 4 + length + TAG
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[:end])
        del self._buffer[:end]
        side = "client" if self._is_server else "server"
        number = self._received.to_bytes(8, "big")
        expected = _tag(self._keys[f"{side} tag"], number + frame[:-TAG])
        if not hmac.compare_digest(expected, frame[-TAG:]):
            raise RefusedError("it does not know the secret of this run")
        self._received += 1
        return _xor(frame[4:-TAG], self._keys[f"{side} cipher"], number)


def _tag(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _xor(text: bytes, key: bytes, number: bytes) -> bytes:
    stream = hashlib.shake_256(key + number).digest(len(text))
    mixed = int.from_bytes(text, "big") ^ int.from_bytes(stream, "big")
    return mixed.to_bytes(len(text), "big")
