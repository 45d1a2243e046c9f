"""Which copy of an expert serves a token: from experts to slots."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np
from jaxtyping import Int32, Integer

from mlx_ep.kernels import ReplicaTables, metal
from mlx_ep.placement import DECODE_TOKENS, Placement
from mlx_ep.rows.option import uses_metal
from mlx_ep.types import lists_of_rows, to_host

CHECKED_STEPS = 8  # steps with which the kernel is compared before it is used


def serving_slots(
    expert_ids: Integer[mx.array, "... K"],
    placement: Placement,
    levels_rows: bool = False,
) -> Integer[mx.array, "... K"]:
    """The slots that serve routed experts: ids for ``placement.slots``.

    Where no expert has copies these are the ids themselves, and nothing is computed.
    On Metal a kernel chooses in decode, and nothing waits; in prefill, and elsewhere,
    the host does. Both make the same choice, so ranks may differ in that.

    Args:
        expert_ids: of all tokens that are computed together, the same on every rank
            that asks.
        levels_rows: the host chooses, as `Placement.serve` with it does, the same on
            every rank that asks: for groups without Metal, whose kernel does not.
    """
    if not placement.has_replicas:
        return expert_ids
    tables = _tables(expert_ids, placement, levels_rows)
    if tables is not None:
        return metal.choose_replicas(expert_ids.astype(mx.int32), tables)
    return mx.array(_served_on_host(expert_ids, placement, levels_rows))


def serving_local_slots(
    expert_ids: Integer[mx.array, "... K"],
    placement: Placement,
    rank: int,
    levels_rows: bool = False,
    read_too: Sequence[mx.array] = (),
) -> Integer[mx.array, "... K"]:
    """The slots on `rank` that serve routed experts; -1 where another rank does.

    ``placement.slots.local_slots(serving_slots(...), rank)``. Where the host chooses
    the copy it looks up the slot too: what it gives is there, and a runner that reads
    it does not wait for the device a second time.

    Args:
        expert_ids, levels_rows: see `serving_slots`. Of one token with any leading
            axes: without Metal, [1, K] is returned then.
        read_too: what the host reads of this layer next, such as the gates: computed
            when it waits for the ids, if it does.
    """
    if not placement.has_replicas or _tables(expert_ids, placement, levels_rows):
        served = serving_slots(expert_ids, placement, levels_rows)
        return placement.slots.local_slots(served, rank)
    # sync: which copy serves an expert depends on all the ids of the step.
    mx.eval(expert_ids, *read_too)
    if 0 < expert_ids.size <= DECODE_TOKENS * expert_ids.shape[-1]:
        ids = lists_of_rows(expert_ids)
        return mx.array(placement.serve_on(ids, rank, levels_rows), mx.int32)
    slots = _served_on_host(expert_ids, placement, levels_rows)
    return mx.array(placement.slots.local_slots_on_host(slots, rank))


def _served_on_host(
    expert_ids: Integer[mx.array, "T K"], placement: Placement, levels_rows: bool
) -> Int32[np.ndarray, "T K"]:
    # sync: which copy serves an expert depends on all the ids of the step.
    ids = to_host(expert_ids).astype(np.int32, copy=False)
    return placement.serve(ids, levels_rows)


def _tables(
    expert_ids: Integer[mx.array, "... K"], placement: Placement, levels_rows: bool
) -> ReplicaTables | None:
    """What the kernel chooses by; None: the host chooses."""
    in_decode = expert_ids.size <= DECODE_TOKENS * expert_ids.shape[-1]
    if levels_rows or not in_decode or not uses_metal():
        return None
    return _checked_tables(placement, expert_ids.shape[-1])


def replica_tables(placement: Placement) -> ReplicaTables:
    """What `choose_replicas` takes of a placement."""
    order, masks, starts = placement.choice.classes
    return ReplicaTables(
        mx.array(order, mx.int32),
        mx.array(masks, mx.int32),
        mx.array(starts, mx.int32),
        mx.array(placement.slot_table),
    )


@lru_cache(maxsize=256)  # layers may differ
def _checked_tables(placement: Placement, per_token: int) -> ReplicaTables | None:
    """The kernel's tables, where it chooses as the host does; None: the host has to."""
    num_ranks, num_experts = placement.num_ranks, placement.num_experts
    if num_ranks > metal.MAX_CHOICE_RANKS or num_experts > metal.MAX_CHOICE_EXPERTS:
        return None
    tables = replica_tables(placement)
    random = np.random.default_rng(0)
    for step in range(CHECKED_STEPS):
        shape = (1 + step % 4, per_token)
        ids = random.integers(-1, num_experts, shape).astype(np.int32)
        # sync: once for a placement, before anything depends on it.
        got = to_host(metal.choose_replicas(mx.array(ids), tables))
        if not np.array_equal(got, placement.serve(ids)):
            warnings.warn(
                "The kernel choose_replicas does not choose as the host does on this "
                "GPU; the host chooses, which waits for the GPU once per layer. Please "
                "report it with the output of mlx_ep.doctor.",
                stacklevel=2,
            )
            return None
    return tables
