"""What goes where: layouts and packing of tokens into rows (pure, no communication)."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
from jaxtyping import Bool, Int32, Shaped, UInt

from mlx_ep.placement import Placement
from mlx_ep.rows.serve import serving_slots
from mlx_ep.types import Routing

# Unsigned integers as wide as each dtype of rows: ids and gates travel beside them as
# bits, which no kernel may round, flush or canonicalise.
_BITS = {2: mx.uint16, 4: mx.uint32}


class Layout(NamedTuple):
    """Where the tokens of this rank go, before anything is sent.

    Attributes:
        rows_per_rank: rows for each rank, this one included. A token is one row for
            a rank however many of its experts live there.
        rows_per_expert: tokens that chose each expert; one that chose it twice
            counts once.
        token_in_rank: whether the token needs the rank.
    """

    rows_per_rank: Int32[mx.array, " P"]
    rows_per_expert: Int32[mx.array, " E"]
    token_in_rank: Bool[mx.array, "T P"]


def get_dispatch_layout(
    expert_ids: Int32[mx.array, "T K"], placement: Placement
) -> Layout:
    """Rows per rank, rows per expert and who needs whom. Lazy, no communication."""
    served = serving_slots(expert_ids, placement)
    needed = tokens_in_ranks(served, placement.slots)
    experts = mx.arange(placement.num_experts)
    chosen = mx.zeros((expert_ids.shape[0], placement.num_experts), mx.bool_)
    for k in range(expert_ids.shape[1]):
        chosen = chosen | (expert_ids[:, k, None] == experts)
    return Layout(
        rows_per_rank=needed.astype(mx.int32).sum(axis=0),
        rows_per_expert=chosen.astype(mx.int32).sum(axis=0),
        token_in_rank=needed,
    )


def tokens_in_ranks(
    expert_ids: Int32[mx.array, "T K"], placement: Placement
) -> Bool[mx.array, "T P"]:
    """Whether each token has an expert on each rank."""
    ranks = [
        (placement.local_slots(expert_ids, rank) >= 0).any(axis=1)
        for rank in range(placement.num_ranks)
    ]
    return mx.stack(ranks, axis=1)


class RowOrder(NamedTuple):
    """Which rows leave this rank, rank-major, and where each token's rows are.

    Tokens t0 (for r1), t1 (for r0 and r1) and t2 (for r0) give

        (t0,r1) (t1,r0) (t1,r1) (t2,r0)  token-major
     -> (t1,r0) (t2,r0) (t0,r1) (t1,r1)  rank-major, tokens in order

    Attributes:
        tokens: the token of each row.
        counts: rows for each rank.
        positions: per rank, the place of each token among that rank's rows; -1
            where it has none.
    """

    tokens: Int32[np.ndarray, " N"]
    counts: tuple[int, ...]
    positions: Int32[np.ndarray, "P T"]


def pack(token_in_rank: Bool[np.ndarray, "T P"]) -> RowOrder:
    """The packing of the (token, rank) pairs that are set."""
    by_rank = token_in_rank.T
    _, tokens = np.nonzero(by_rank)
    positions = np.where(by_rank, by_rank.cumsum(axis=1) - 1, -1)
    return RowOrder(
        tokens=tokens.astype(np.int32),
        counts=tuple(by_rank.sum(axis=1).tolist()),  # on host
        positions=positions.astype(np.int32),
    )


def limit_to_capacity(
    expert_ids: Int32[np.ndarray, "T K"], capacity: int
) -> tuple[Int32[np.ndarray, "T K"], int]:
    """The ids with -1 where an expert has more pairs than `capacity`, and how many.

    Every expert keeps the first pairs in choice-major order: the first choices of all
    tokens, then the second choices, and so on,

        (t0,k0) (t1,k0) ... (t0,k1) (t1,k1) ...

    These are the semantics of ml-explore/mlx#3158, per rank that holds the tokens.
    """
    flat = expert_ids.T.reshape(-1)  # [K*T], choice-major
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    # How many equal ids come before each one: its place minus where its run starts.
    place = np.arange(len(flat)) - np.searchsorted(ordered, ordered)
    over = np.zeros(len(flat), bool)
    over[order] = (place >= capacity) & (ordered >= 0)
    kept = np.where(over, -1, flat).astype(np.int32)
    return kept.reshape(expert_ids.T.shape).T.copy(), int(over.sum())


def pad_routing(routing: Routing, num_tokens: int) -> Routing:
    """The routing with tokens of no expert behind it, `num_tokens` in all."""
    missing = num_tokens - routing.gates.shape[0]
    if not missing:
        return routing
    return Routing(
        mx.pad(routing.expert_ids, [(0, missing), (0, 0)], constant_values=-1),
        mx.pad(routing.gates, [(0, missing), (0, 0)]),
    )


def routing_words(routing: Routing) -> Int32[mx.array, "T C"]:
    """Ids and the bits of the gates, one line per token (C is 2*K)."""
    gates = routing.gates.view(mx.int32)
    return mx.concatenate([routing.expert_ids, gates], axis=1)


def routing_from_words(words: Int32[mx.array, "T C"]) -> Routing:
    """What `routing_words` made its argument of; C is 2*K."""
    ids, gates = mx.split(words, 2, axis=1)
    return Routing(ids, mx.contiguous(gates).view(mx.float32))


def join_rows(x: Shaped[mx.array, "T D"], routing: Routing) -> UInt[mx.array, "T W"]:
    """Tokens and their routing in one buffer, as bits.

        (x[0] .. x[D-1]), ids and gates  ->  (x[0] .. x[D-1] id[0] .. gate[K-1])

    With 2-byte rows every id and gate takes two places: W is D + 8 * K / itemsize.
    """
    bits = _BITS[x.itemsize]
    return mx.concatenate([part.view(bits) for part in (x, *routing)], axis=1)


def split_rows(
    rows: UInt[mx.array, "M W"], width: int, dtype: mx.Dtype
) -> tuple[Shaped[mx.array, "M D"], Routing]:
    """What `join_rows` joined, `width` (D) values of `dtype` a row."""
    middle = (width + rows.shape[1]) // 2
    ids = mx.contiguous(rows[:, width:middle]).view(mx.int32)
    gates = mx.contiguous(rows[:, middle:]).view(mx.float32)
    return rows[:, :width].view(dtype), Routing(ids, gates)
