"""Text that follows a grammar: which tokens may come next, by llguidance."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import llguidance.hf
import llguidance.numpy
import mlx.core as mx
import numpy as np
from jaxtyping import Float
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper


class GrammarMatcher:
    """Where one sequence is in its grammar.

    Args:
        tokenizer: as `grammar_tokenizer` gives it.
        grammar: in llguidance's form.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._mask = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)

    @property
    def error(self) -> str:
        """Why it cannot go on, or "": the grammar is wrong, or too much of a task."""
        return " ".join(self._matcher.get_error().split())

    def masked(self, logits: Float[mx.array, "1 V"]) -> Float[mx.array, "1 V"]:
        """The logits, -inf where a token may not come next.

        Behind the last token of a text that is complete, the end token alone may. With
        an `error` they stay as they are.
        """
        if self._matcher.is_error():
            return logits
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        bits = np.unpackbits(self._mask.view(np.uint8), axis=1, bitorder="little")
        # A model's head may be wider than its vocabulary: those are no tokens.
        allowed = np.zeros(logits.shape, bool)
        width = min(bits.shape[1], logits.shape[1])
        allowed[:, :width] = bits[:, :width]
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))

    def accept(self, token: int) -> None:
        """Go on behind a token; where that cannot be, there is an `error`."""
        self._matcher.consume_token(token)


def grammar_tokenizer(tokenizer: TokenizerWrapper, ends: Sequence[int]) -> LLTokenizer:
    """What grammars need of a tokenizer; takes a second for a large vocabulary.

    Raises:
        ValueError: it is of a kind that grammars cannot be matched with.
    """
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    return llguidance.hf.from_tokenizer(inner, eos_token=list(ends))


class Grammars:
    """The grammars of requests that wait or run on this rank.

    A grammar is compiled on the thread that asks for it, so that running answers do not
    wait for it.
    """

    def __init__(self, tokenizer: TokenizerWrapper, ends: Sequence[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._matchers: dict[str, GrammarMatcher] = {}

    def prepare(self, request: str, grammar: str) -> None:
        """Compile a grammar for a request.

        Raises:
            ValueError: it cannot be followed.
        """
        matcher = self._compile(grammar)
        if matcher.error:
            raise ValueError(f"The grammar cannot be followed: {matcher.error}")
        self._matchers[request] = matcher

    def forget(self, request: str) -> None:
        """The request has ended, perhaps before it began."""
        self._matchers.pop(request, None)

    def matcher(self, request: str, grammar: str | None) -> GrammarMatcher | None:
        """For a request that begins; None where it has no grammar."""
        if grammar is None:
            return None
        return self._matchers.pop(request, None) or self._compile(grammar)

    def _compile(self, grammar: str) -> GrammarMatcher:
        with self._lock:
            if self._made is None:
                self._made = grammar_tokenizer(self._tokenizer, self._ends)
            made = self._made
        return GrammarMatcher(made, grammar)
