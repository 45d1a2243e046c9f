"""EPLB in NumPy, written from its description: what `bench_balance` compares with.

Reproduces the example that DeepSeek documents (tests/unit/test_balance.py).
"""

from __future__ import annotations

import numpy as np


def rebalance_experts(
    weight: np.ndarray,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See `mlx_ep.placement.rebalance_experts`."""
    num_layers, num_experts = weight.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    phy2log = np.empty((num_layers, num_replicas), np.int64)
    number = np.empty((num_layers, num_replicas), np.int64)
    logcnt = np.empty((num_layers, num_experts), np.int64)
    per_group, slots = num_experts // num_groups, num_replicas // num_nodes
    for layer, load in enumerate(weight.astype(np.float64)):
        of_groups = load.reshape(num_groups, per_group).sum(-1)
        for node, groups in enumerate(_packs(of_groups, num_nodes)):
            experts = [g * per_group + i for g in groups for i in range(per_group)]
            held, copy, counts = _replicas(load[experts], slots)
            logcnt[layer, experts] = counts
            packs = _packs((load[experts] / counts)[held], num_gpus // num_nodes)
            place = np.array([item for items in packs for item in items])
            at = slice(node * slots, (node + 1) * slots)
            phy2log[layer, at] = np.array(experts)[held[place]]
            number[layer, at] = copy[place]
    log2phy = np.full((num_layers, num_experts, int(logcnt.max())), -1, np.int64)
    layers = np.arange(num_layers)[:, None]
    log2phy[layers, phy2log, number] = np.arange(num_replicas)
    return phy2log, log2phy, logcnt


def _packs(load: np.ndarray, num_packs: int) -> list[list[int]]:
    """Items of each pack, in slot order: heaviest first, on the lightest open pack."""
    size = len(load) // num_packs
    if size == 1:
        return [[i] for i in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sums = [0.0] * num_packs
    values = load.tolist()
    for item in np.argsort(-load, kind="stable").tolist():
        open_packs = [p for p in range(num_packs) if len(packs[p]) < size]
        pack = min(open_packs, key=sums.__getitem__)
        packs[pack].append(item)
        sums[pack] += values[item]
    return packs


def _replicas(
    load: np.ndarray, num_slots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expert and number of each copy, and the copies of each expert."""
    counts = np.ones(len(load), np.int64)
    held, copy = list(range(len(load))), [0] * len(load)
    for _ in range(num_slots - len(load)):
        expert = int(np.argmax(load / counts))
        held.append(expert)
        copy.append(int(counts[expert]))
        counts[expert] += 1
    return np.array(held), np.array(copy), counts
