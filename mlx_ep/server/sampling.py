"""How the tokens of a batch are drawn, each as its request asks for.

A request with a seed has a stream of keys of its own, which goes the way of
``mx.random.seed(seed)``: its tokens are those of mlx_lm.generate with that seed,
whoever runs beside it. Requests without one that ask for the same share one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Int32
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    greedy_sampler,
    make_logits_processors,
)

from mlx_ep.server.grammar import GrammarMatcher
from mlx_ep.server.requests import Request, Sampling
from mlx_ep.types import to_host

NextKey = Callable[[], mx.array | None]


class Drawn(NamedTuple):
    """Tokens that are being drawn; nothing is evaluated.

    Attributes:
        tokens: of the rows of a batch.
        details: by row, where somebody asked: the token's log probability, then ids and
            log probabilities of the top ones.
    """

    tokens: Int32[mx.array, " B"]
    details: dict[int, list[mx.array]]


@dataclass
class SequenceSampler:
    """Draws the tokens of one request.

    Args:
        request: whose tokens they are.
        special: tokens that XTC never excludes.
        grammar: no token outside of it is drawn.
    """

    request: Request
    special: list[int] = field(default_factory=list)
    grammar: GrammarMatcher | None = None

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self._processors = make_logits_processors(
            None,  # biases of all rows are added at once
            sampling.repetition_penalty,
            sampling.repetition_context_size,
            sampling.presence_penalty,
            sampling.presence_context_size,
            sampling.frequency_penalty,
            sampling.frequency_context_size,
        )
        self._most_context = max(
            sampling.repetition_context_size,
            sampling.presence_context_size,
            sampling.frequency_context_size,
        )
        self._key: mx.array | None = None
        if sampling.seed is not None:
            self._key = mx.random.key(sampling.seed % 2**64)

    @property
    def changes_logits(self) -> bool:
        return bool(self._processors) or self.grammar is not None

    def change(
        self, logits: Float[mx.array, "1 V"], tokens: list[int]
    ) -> Float[mx.array, "1 V"]:
        """The logits, which have their biases, with penalties and the grammar.

        Args:
            tokens: of the sequence so far, with the prompt.
        """
        if self._processors:
            context = mx.array(tokens[-self._most_context :])
            for processor in self._processors:
                logits = processor(context, logits)
        if self.grammar is not None:
            logits = self.grammar.masked(logits)
        return logits

    @property
    def kind(self) -> Sampling | None:
        """Equal for sequences that can be drawn in one call; None: only by itself."""
        sampling = self.request.sampling
        if sampling.temperature == 0:
            return Sampling()
        if sampling.seed is not None:
            return None
        same = Sampling()  # what does not change how a token is drawn
        return replace(
            sampling,
            repetition_penalty=same.repetition_penalty,
            presence_penalty=same.presence_penalty,
            frequency_penalty=same.frequency_penalty,
            logit_bias={},
            logprobs=False,
            top_logprobs=0,
        )

    def draw(self, logprobs: Float[mx.array, "B V"]) -> mx.array:
        """Tokens ``[B]``, not evaluated; B > 1 only for sequences of one `kind`."""
        return draw(logprobs, self.request.sampling, self.special, self._next_key)

    def accept(self, token: int) -> None:
        """The token that was drawn; the grammar goes on behind it."""
        if self.grammar is not None:
            self.grammar.accept(token)

    @property
    def problem(self) -> str:
        """Why the sequence cannot go on, or ""."""
        if self.grammar is None or not self.grammar.error:
            return ""
        return f"the grammar cannot go on: {self.grammar.error}"

    def _next_key(self) -> mx.array | None:
        """As each call of mx.random takes one; None: from the server's own stream."""
        if self._key is None:
            return None
        keys = mx.random.split(self._key)
        self._key = keys[0]
        return keys[1]


def draw(
    logprobs: Float[mx.array, "B V"],
    sampling: Sampling,
    special: list[int],
    next_key: NextKey,
) -> mx.array:
    """Tokens as the samplers of mlx_lm.sample_utils draw them, with keys of ours."""
    if sampling.temperature == 0:
        return greedy_sampler(logprobs)
    if 0 < sampling.top_p < 1:
        logprobs = apply_top_p(logprobs, sampling.top_p)
    if sampling.min_p != 0:
        logprobs = apply_min_p(logprobs, sampling.min_p)
    if sampling.xtc_probability > 0:
        # With probability 1 whatever mlx-lm's own coin says.
        cut = apply_xtc(logprobs, 1.0, sampling.xtc_threshold, special)
        is_whole = mx.random.uniform(0, 1, key=next_key()) > sampling.xtc_probability
        logprobs = mx.where(is_whole, logprobs, cut)
    if sampling.top_k > 0:
        logprobs = apply_top_k(logprobs, sampling.top_k)
    return mx.random.categorical(logprobs * (1 / sampling.temperature), key=next_key())


def draw_all(
    logits: Float[mx.array, "B V"],
    samplers: Sequence[SequenceSampler],
    tokens: Sequence[list[int]],
) -> Drawn:
    """One token of every sequence of a batch.

    Args:
        samplers: of every row.
        tokens: so far, of every row.
    """
    logits = _with_biases(logits, samplers)
    if any(sampler.changes_logits for sampler in samplers):
        rows = [
            sampler.change(logits[row : row + 1], tokens[row])
            for row, sampler in enumerate(samplers)
        ]
        logits = mx.concatenate(rows)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    drawn = _draw_groups(logprobs, samplers)
    details = {
        row: _details(logprobs[row], drawn[row], sampler.request.sampling)
        for row, sampler in enumerate(samplers)
        if sampler.request.sampling.logprobs
    }
    mx.async_eval(drawn, details)
    return Drawn(drawn, details)


def _with_biases(
    logits: Float[mx.array, "B V"], samplers: Sequence[SequenceSampler]
) -> Float[mx.array, "B V"]:
    """Every row's `logit_bias` is added in one operation; mlx-lm has one for each."""
    rows: list[int] = []
    tokens: list[int] = []
    values: list[float] = []
    for row, sampler in enumerate(samplers):
        bias = sampler.request.sampling.logit_bias
        rows += [row] * len(bias)
        tokens += bias.keys()
        values += bias.values()
    if not rows:
        return logits
    added = mx.array(values).astype(logits.dtype)
    return logits.at[mx.array(rows), mx.array(tokens)].add(added)


def _draw_groups(logprobs: mx.array, samplers: Sequence[SequenceSampler]) -> mx.array:
    """Rows that are drawn alike in one call, the others one by one."""
    groups: list[list[int]] = []
    kinds: list[Sampling | None] = []
    for row, sampler in enumerate(samplers):
        kind = sampler.kind
        if kind is not None and kind in kinds:
            groups[kinds.index(kind)].append(row)
        else:
            groups.append([row])
            kinds.append(kind)
    if len(groups) == 1:
        return samplers[0].draw(logprobs).astype(mx.int32)
    parts = [
        samplers[rows[0]].draw(logprobs[mx.array(rows)]).astype(mx.int32)
        for rows in groups
    ]
    order = mx.array([row for rows in groups for row in rows])
    return mx.concatenate(parts)[mx.argsort(order)]


def _details(logprobs: mx.array, token: mx.array, sampling: Sampling) -> list[mx.array]:
    """Of logprobs ``[V]``: that of a token, then ids and values of the top ones."""
    found = [logprobs[token].astype(mx.float32)]
    if count := min(sampling.top_logprobs, logprobs.size):
        top = mx.argpartition(-logprobs, kth=count - 1)[:count]
        top = top[mx.argsort(-logprobs[top])]
        found += [top, logprobs[top].astype(mx.float32)]
    return found


def read_details(
    details: list[mx.array],
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """One of `Drawn.details` as numbers."""
    # sync: evaluated with the tokens.
    own, *top = (to_host(array) for array in details)
    if not top:
        return float(own), ()
    pairs = zip(top[0].tolist(), top[1].tolist(), strict=True)  # on host
    return float(own), tuple((int(token), float(value)) for token, value in pairs)
