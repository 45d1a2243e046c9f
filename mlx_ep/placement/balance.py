"""Replicas and their ranks from recorded loads, with EPLB's signature.

EPLB (github.com/deepseek-ai/EPLB) copies an expert again and again where the load of a
copy is highest, then packs the copies, heaviest first, each on the least loaded GPU
that has room. `rebalance_experts` begins like that and goes on: no GPU gets two copies
of one expert where that can be avoided, and copies of the busiest GPU are swapped as
long as its load falls (FlashLB, in vllm-ascend, and others refine EPLB in that way).
So its highest load is never above EPLB's.
"""

from __future__ import annotations

from heapq import heappop, heapreplace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

MOST_SWAPS = 12  # of one layer; later ones gain little


class Packed(NamedTuple):
    """Copies on packs, in slots: ``items[x, pack, slot]`` and the sums of each pack."""

    items: Int[np.ndarray, "X packs slots"]
    loads: Float[np.ndarray, "X packs"]


def rebalance_experts(
    weight: Float[np.ndarray, "layers E"] | Int[np.ndarray, "layers E"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> tuple[
    Int[np.ndarray, "layers S"],
    Int[np.ndarray, "layers E X"],
    Int[np.ndarray, "layers E"],
]:
    """Which expert is in each slot, so that the load of the busiest GPU is low.

    Where num_groups divides by num_nodes, the hierarchical rule: groups of experts go
    to nodes, copies stay within a node. Else the global one: as with one node.

    Args:
        weight: the load of each expert, 0 or more, such as rows counted.
        num_replicas: S, slots of all GPUs together; a multiple of num_gpus.
        num_groups: groups of consecutive experts that a router chooses together.
        num_nodes: nodes with fast links inside.
        num_gpus: a multiple of num_nodes.

    Returns:
        phy2log: the expert of each slot, GPU after GPU.
        log2phy: the slots of each expert, -1 behind them; X is the most there are.
        logcnt: the slots of each expert, at least 1. They add up to S.

    Raises:
        ValueError: the numbers do not divide, or there are fewer slots than experts.
    """
    weight = np.asarray(weight, np.float64)  # on host
    _check(weight, num_replicas, num_groups, num_nodes, num_gpus)
    num_layers, num_experts = weight.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    # 1. Groups to nodes; `local` are the experts of a node, in its order.
    in_group = num_experts // num_groups
    group_load = weight.reshape(num_layers, num_groups, in_group).sum(-1)
    groups = pack(group_load, num_nodes).items.reshape(num_layers, num_groups)
    local = (groups[..., None] * in_group + np.arange(in_group)).reshape(
        num_layers * num_nodes, -1
    )
    # 2. Copies within a node, 3. copies to its GPUs.
    load = np.take_along_axis(weight, local.reshape(weight.shape), -1)
    load = load.reshape(local.shape)
    gpus, slots = num_gpus // num_nodes, num_replicas // num_nodes
    most = max(gpus, -(-slots // load.shape[1]))
    packed, experts, capped = _copied(load, slots, gpus, most)
    if capped.any():
        # Where a copy more than there are GPUs would have been made: EPLB's own way.
        plain, plain_experts, _ = _copied(load[capped], slots, gpus, slots)
        better = plain.loads.max(-1) < packed.loads[capped].max(-1)
        chosen = np.flatnonzero(capped)[better]
        packed.items[chosen], packed.loads[chosen] = (
            plain.items[better],
            plain.loads[better],
        )
        experts[chosen] = plain_experts[better]
    share = load / _counts(experts, load.shape[1])
    _swap(packed, experts, share, num_nodes)
    _spread(packed, experts, share, num_nodes)
    # Number the slots, and find each expert's.
    of_slot = np.take_along_axis(experts, packed.items.reshape(len(local), -1), -1)
    phy2log = np.take_along_axis(local, of_slot, -1).reshape(num_layers, -1)
    return phy2log, *_slots_of(phy2log, num_experts)


def _check(
    weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, gpus: int
) -> None:
    if weight.ndim != 2 or not weight.size or not np.isfinite(weight).all():
        raise ValueError(
            f"weight must be a finite [layers, E] table; got shape {weight.shape}."
        )
    num_experts = weight.shape[1]
    if weight.min() < 0:
        raise ValueError(f"Loads must be 0 or more; got {weight.min():g}.")
    for what, number, by, divisor in (
        ("experts", num_experts, "num_groups", num_groups),
        ("num_gpus", gpus, "num_nodes", num_nodes),
        ("num_replicas", num_replicas, "num_gpus", gpus),
    ):
        if divisor < 1 or number % divisor:
            raise ValueError(
                f"{what} must be a multiple of {by}; got {number} and {divisor}."
            )
    if num_replicas < num_experts:
        raise ValueError(
            f"num_replicas must be at least the {num_experts} experts; got "
            f"{num_replicas}."
        )


def pack(load: Float[np.ndarray, "X n"], num_packs: int) -> Packed:
    """Put n items on packs of ``n / num_packs``: heaviest first, on the lightest.

    All tables X at once. Ties go to the lower item and to the lower pack.
    """
    rows, n = load.shape
    size = n // num_packs
    if size == 1:  # as EPLB does: item i is pack i
        items = np.broadcast_to(np.arange(n)[:, None], (rows, n, 1)).copy()
        return Packed(items, load.astype(np.float64))
    # With Python's heap: as fast as NumPy's steps over all tables at once, and simpler.
    items = np.empty((rows, num_packs, size), np.int64)
    loads = np.empty((rows, num_packs))
    orders = np.argsort(-load, axis=-1, kind="stable").tolist()  # on host
    for row, (order, values) in enumerate(zip(orders, load.tolist())):  # on host
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        heap = [(0.0, pack) for pack in range(num_packs)]
        for item in order:
            total, lightest = heap[0]
            pack = packs[lightest]
            pack.append(item)
            total += values[item]
            if len(pack) < size:
                heapreplace(heap, (total, lightest))
            else:
                loads[row, lightest] = total
                heappop(heap)
        items[row] = packs
    return Packed(items, loads)


def copies(
    load: Float[np.ndarray, "X E"], num_slots: int, most: int
) -> Int[np.ndarray, "X E"]:
    """How many slots each expert gets: each further one goes where a copy's load is
    highest, to the lower expert on a tie, and to none beyond `most`.

    That is the same as taking the highest of load, load/2, load/3, ... of all experts.
    """
    rows, num_experts = load.shape
    extra = num_slots - num_experts
    counts = np.ones((rows, num_experts), np.int64)
    reach = min(extra, most - 1)
    if reach <= 0:
        return counts
    if extra <= 4 * reach and extra < 64:
        at = np.arange(rows)
        share = load.astype(np.float64, copy=True)
        for _ in range(extra):
            best = share.argmax(-1)
            counts[at, best] += 1
            now = counts[at, best]
            share[at, best] = np.where(now < most, load[at, best] / now, -1.0)
        return counts
    # In the order of EPLB's choices: by load of a copy, then by expert.
    share = load[:, :, None] / np.arange(1, reach + 1)
    first = np.argsort(-share.reshape(rows, -1), axis=-1, kind="stable")[:, :extra]
    at = np.arange(rows)[:, None] * num_experts + first // reach
    found = np.bincount(at.reshape(-1), minlength=rows * num_experts)
    return counts + found.reshape(rows, num_experts)


def _copied(
    load: np.ndarray, slots: int, gpus: int, most: int
) -> tuple[Packed, np.ndarray, np.ndarray]:
    """Copies of the experts of nodes on their GPUs.

    Returns:
        packed: the copies, by number.
        experts: ``[X, slots]``, the expert of each copy.
        capped: ``[X]``, where an expert has all the copies that it may have.
    """
    rows, num_experts = load.shape
    counts = copies(load, slots, most)
    of_row = np.repeat(np.tile(np.arange(num_experts), rows), counts.reshape(-1))
    experts = of_row.reshape(rows, slots)
    share = np.take_along_axis(load / counts, experts, -1)
    packed = pack(share, gpus)
    return packed, experts, np.any(counts >= most, axis=-1)


def _swap(
    packed: Packed, experts: np.ndarray, share: np.ndarray, num_nodes: int
) -> None:
    """Swap copies of each layer's busiest GPU with others of its node, in place.

    The best swap is the one that leaves the lower maximum of the two GPUs, among those
    that put no expert twice on one. A layer is done when none lowers its maximum.
    """
    items, loads = packed
    rows, gpus, size = items.shape
    if gpus == 1:
        return
    layers = np.arange(rows // num_nodes)
    for _ in range(MOST_SWAPS):
        by_layer = loads.reshape(-1, num_nodes * gpus)[layers]
        busiest = by_layer.argmax(-1)
        row, gpu = layers * num_nodes + busiest // gpus, busiest % gpus
        at = np.arange(len(row))
        held = np.take_along_axis(experts[row], items[row].reshape(len(row), -1), -1)
        weights = np.take_along_axis(share[row], held, -1)
        held = held.reshape(-1, gpus, size)
        weights = weights.reshape(-1, gpus, size)
        own, own_experts = weights[at, gpu], held[at, gpu]
        # Moving `give - take` from the busiest GPU to the other.
        moved = own[:, :, None, None] - weights[:, None]
        top = loads[row, gpu]
        left = np.maximum(
            top[:, None, None, None] - moved, loads[row][:, None, :, None] + moved
        )
        left[at, :, gpu] = np.inf
        # Neither may get an expert which it holds already.
        has = (held[:, :, :, None] == own_experts[:, None, None]).any(2)  # [l gpu own]
        left[np.broadcast_to(has.transpose(0, 2, 1)[..., None], left.shape)] = np.inf
        doubles = (own_experts[:, None, None] == held[..., None]).any(-1)  # [l gpu s]
        left[np.broadcast_to(doubles[:, None], left.shape)] = np.inf
        best = left.reshape(len(row), -1).argmin(-1)
        gain = left.reshape(len(row), -1)[at, best] < top * (1 - 1e-12)
        if not gain.any():
            return
        give, other, take = np.unravel_index(best, left.shape[1:])
        r, g, o = row[gain], gpu[gain], other[gain]
        a, b = give[gain], take[gain]
        shift = moved[at, give, other, take][gain]
        items[r, g, a], items[r, o, b] = items[r, o, b], items[r, g, a]
        loads[r, g] -= shift
        loads[r, o] += shift
        layers = layers[gain]


def _spread(
    packed: Packed, experts: np.ndarray, share: np.ndarray, num_nodes: int
) -> None:
    """Take second copies of an expert off a GPU by swaps, in place.

    A swap may not lift a GPU above the layer's highest load; the one that leaves the
    lower maximum of the two is taken.
    """
    items, loads = packed
    rows, _, size = items.shape
    held = np.take_along_axis(experts, items.reshape(rows, -1), -1).reshape(items.shape)
    ordered = np.sort(held, -1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    for row, gpu in np.argwhere(twice).tolist():  # on host
        node = row // num_nodes * num_nodes
        limit = loads[node : node + num_nodes].max()
        for slot in range(1, size):
            own = held[row, gpu]
            expert = own[slot]
            if expert not in own[:slot]:
                continue
            give, take = share[row, expert], share[row][held[row]]
            left = np.maximum(
                loads[row, gpu] - give + take, loads[row][:, None] + give - take
            )
            left[(held[row] == expert).any(-1)] = np.inf
            left[(held[row][..., None] == own).any(-1)] = np.inf
            other, best = divmod(int(left.argmin()), size)
            if left[other, best] > limit:
                continue
            here, there = (row, gpu, slot), (row, other, best)
            for table in (items, held):
                table[here], table[there] = table[there], table[here]
            loads[row, gpu] += take[other, best] - give
            loads[row, other] += give - take[other, best]


def _counts(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert occurs in each row."""
    rows = len(experts)
    flat = experts + np.arange(rows)[:, None] * num_experts
    found = np.bincount(flat.reshape(-1), minlength=rows * num_experts)
    return found.reshape(rows, num_experts)


def _slots_of(phy2log: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """`log2phy` and `logcnt` of `rebalance_experts`."""
    num_layers, num_slots = phy2log.shape
    layer = np.arange(num_layers)[:, None]
    counts = _counts(phy2log, num_experts)
    # Slots sorted by expert: a slot's number among its expert's is its place there
    # less the slots of lower experts.
    order = np.argsort(phy2log, axis=-1, kind="stable")
    sorted_experts = np.take_along_axis(phy2log, order, -1)
    before = np.cumsum(counts, -1) - counts
    number = np.arange(num_slots) - np.take_along_axis(before, sorted_experts, -1)
    slots = np.full((num_layers, num_experts, int(counts.max())), -1, np.int64)
    slots[layer, sorted_experts, number] = order
    return slots, counts
