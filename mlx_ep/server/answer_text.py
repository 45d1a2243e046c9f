"""From tokens to text: stop strings, reasoning, tool calls.

mlx-lm's detokenizer makes text of tokens, `StopText` cuts it at the first stop string,
mlx-lm's TextStateMachine takes the markers of thoughts and tool calls out of the rest.
Each holds back what may be the beginning of something, so that a client never sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper

PieceKind = Literal["text", "reasoning", "tool"]
# States of mlx-lm's machine; text in another one is its own business, not the client's.
_KINDS: dict[str, PieceKind] = {
    "normal": "text",
    "reasoning": "reasoning",
    "tool": "tool",
}


class StopText:
    """Cuts a text that comes in parts at the first of some strings.

    Attributes:
        matched: the string that ended it, or "".
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.matched = ""

    def add(self, text: str) -> str:
        """What can be shown now: no stop string, nor the beginning of one at its end.

        Of strings that match, the one that begins first counts, then the longest.
        """
        if not self._stops:
            return text
        self._held += text
        found = [(self._held.find(stop), -len(stop), stop) for stop in self._stops]
        found = [match for match in found if match[0] >= 0]
        if found:
            place, _, self.matched = min(found)
            shown, self._held = self._held[:place], ""
            return shown
        keep = max(self._overlap(stop) for stop in self._stops)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Characters at the end of what is held that begin `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


@dataclass(frozen=True)
class Piece:
    """A part of an answer; of kind "tool" a whole call, as the model wrote it."""

    kind: PieceKind
    text: str


class AnswerText:
    """The text of one sequence, token by token.

    Args:
        machine: with the markers of the tokenizer, from `mlx_lm`.
        initial: "reasoning" where the prompt has opened a thought, else "normal".
        stops: stop strings.

    Attributes:
        stopped: the stop string that ended the answer, or "".
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        machine: TextStateMachine,
        initial: str,
        stops: Sequence[str],
    ) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._ends = tokenizer.eos_token_ids
        self._stop = StopText(stops)
        self._state: Any = machine.make_state(initial)
        self._name = initial
        self._call = ""

    @property
    def stopped(self) -> str:
        return self._stop.matched

    @property
    def is_thought(self) -> bool:
        """Whether the last token belongs to a thought."""
        return self._name == "reasoning"

    def add(self, token: int) -> list[Piece]:
        """The pieces that a token completes; an end token has no text."""
        if token in self._ends:
            return []
        self._detokenizer.add_token(token)
        return list(self._split(self._stop.add(self._detokenizer.last_segment)))

    def end(self) -> list[Piece]:
        """What was held back; after a stop string nothing is."""
        pieces: list[Piece] = []
        if not self.stopped:
            self._detokenizer.finalize()
            text = self._stop.add(self._detokenizer.last_segment)
            if not self.stopped:
                text += self._stop.rest()
            pieces += self._split(text)
        self._state, held, name = TextStateMachine.flush(self._state)
        pieces += self._pieces(name, held)
        if self._name == "tool" and self._call:
            pieces.append(Piece("tool", self._call))
            self._call = ""
        return pieces

    def _split(self, text: str) -> Iterator[Piece]:
        if text:
            self._state, segments = TextStateMachine.split(self._state, text)
            for name, part in segments:
                yield from self._pieces(name, part)

    def _pieces(self, name: str, text: str) -> Iterator[Piece]:
        if self._name == "tool" and name != "tool":
            yield Piece("tool", self._call)
            self._call = ""
        self._name = name
        kind = _KINDS.get(name)
        if kind == "tool":
            self._call += text
        elif text and kind is not None:
            yield Piece(kind, text)
