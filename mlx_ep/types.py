"""Shape legend and the records that flow between the stages of a layer.

One alphabet everywhere (docs, annotations, comments):

    T  tokens on this rank          E  experts (logical)
    D  model width                  K  experts per token
    F  expert width                 P  ranks
    S  slots in the group           L  slots on this rank
    M  rows received                N  (row, slot) pairs this rank computes

A *token* is a vector before packing, a *row* after it. An *expert* is logical, a
*slot* is a physical copy of one on a rank. A *gate* is the routing weight of one
(token, expert) pair; "weight" always means a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Float, Float32, Int32

# Logits' logarithms of probabilities in, a token out.
Sampler = Callable[[mx.array], mx.array]


class Routing(NamedTuple):
    """What a router decided for T tokens.

    Attributes:
        expert_ids: the experts of each token; -1 is "no expert".
        gates: the weight of each expert's output in the token's sum.
    """

    expert_ids: Int32[mx.array, "T K"]
    gates: Float32[mx.array, "T K"]


class CompleteRouting(Routing):
    """A routing of which it is known, without reading it, that no id is -1.

    Its ids may be uint32, as MLX's own operations make and take them.
    """

    __slots__ = ()


class Rows(NamedTuple):
    """What one rank has to compute: rows, and which of its slots each row visits.

    Attributes:
        x: the rows, in the model's dtype.
        slot_ids: this rank's slots that the row visits; -1 where the expert lives
            on another rank (or there is none).
        gates: as in `Routing`.
    """

    x: Float[mx.array, "M D"]
    slot_ids: Int32[mx.array, "M K"]
    gates: Float32[mx.array, "M K"]


class CompleteRows(Rows):
    """Rows of which it is known that no slot id is -1: every pair is this rank's.

    Slot ids may be uint32.
    """

    __slots__ = ()


class TokenCounts(NamedTuple):
    """How many tokens each rank holds, agreed by all ranks.

    Agree once per step (`mlx_ep.exchange.agree_tokens`) and use it for every layer of
    that step: the number of tokens does not change between layers, and asking again
    costs a collective and a host sync each time.

    Attributes:
        per_rank: T of rank 0, rank 1, ...
    """

    per_rank: tuple[int, ...]

    @property
    def largest(self) -> int:
        """The T of the rank that holds the most."""
        return max(self.per_rank)

    def num_rounds(self, round_tokens: int | None) -> int:
        """Rounds of `round_tokens` tokens a rank; at least 1, also for no tokens."""
        if round_tokens is None:
            return 1
        return max(1, -(-self.largest // round_tokens))

    def of_round(self, index: int, round_tokens: int | None) -> TokenCounts:
        """The tokens that each rank has in one round: 5 and 2 in rounds of 3 give
        (3, 2), then (2, 0).
        """
        if round_tokens is None:
            return self
        done = index * round_tokens
        return TokenCounts(
            tuple(min(max(t - done, 0), round_tokens) for t in self.per_rank)
        )
