"""The first rung of the ladder: what a MoE layer computes, as float64 loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Expert = Callable[[np.ndarray], np.ndarray]


def swiglu_expert(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Expert:
    """``down @ (silu(gate @ x) * (up @ x))``; gate, up ``[F, D]``, down ``[D, F]``."""
    gate, up, down = (np.asarray(w, np.float64) for w in (gate, up, down))

    def run(x: np.ndarray) -> np.ndarray:
        hidden = gate @ x
        return down @ (hidden / (1 + np.exp(-hidden)) * (up @ x))

    return run


def moe_sum(
    x: np.ndarray, expert_ids: np.ndarray, gates: np.ndarray, experts: list[Expert]
) -> np.ndarray:
    """``sum_k gates[t, k] * experts[ids[t, k]](x[t])``; an id of -1 adds nothing."""
    total = np.zeros(x.shape, np.float64)
    for token in range(x.shape[0]):
        for expert_id, gate in zip(expert_ids[token], gates[token], strict=True):
            if expert_id >= 0:
                output = experts[expert_id](np.asarray(x[token], np.float64))
                total[token] += float(gate) * output
    return total
