"""How often experts are used, and what the busiest rank then has to do. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

# "activated": distinct experts, which is decode; "rows": rows, which is prefill.
Objective = Literal["activated", "rows"]


@dataclass(frozen=True)
class LayerLoad:
    """How often the experts of a layer are used.

    Attributes:
        used: per expert, in how many steps it occurs, or its rows; any unit.
        together: in how many steps two of them occur, the diagonal being `used`; None:
            as if they were chosen without regard to each other.
        per_step: experts of one step (K for one token), the scale where `together` is
            None.
    """

    used: Float[np.ndarray, " E"]
    together: Float[np.ndarray, "E E"] | None = None
    per_step: int = 8

    @classmethod
    def uniform(cls, num_experts: int, per_step: int) -> LayerLoad:
        """Every expert as often as every other."""
        return cls(np.full(num_experts, per_step / num_experts), None, per_step)

    def moments(self, objective: Objective) -> Float[np.ndarray, "E E"]:
        """C of `placement.replicas`, scaled to steps of `per_step` experts."""
        total = float(self.used.sum())
        if total <= 0:
            return LayerLoad.uniform(len(self.used), self.per_step).moments(objective)
        if objective == "rows":
            share = self.used / total
            return np.outer(share, share)
        scale = self.per_step / total
        used = np.minimum(self.used * scale, 1.0)
        if self.together is not None:
            both = self.together * scale
        else:
            both = np.outer(used, used) * (1 - 1 / self.per_step)
        both = both.astype(np.float64, copy=True)
        np.fill_diagonal(both, used)
        return both


def draw_steps(
    load: LayerLoad, num_steps: int = 2000, seed: int = 0
) -> Bool[np.ndarray, "steps E"]:
    """Steps of `per_step` experts as the load has them, alike always.

    One expert after another, in proportion to how often it is used and, where that is
    known, to how much more often than by chance it occurs with each one drawn before.
    """
    moments = load.moments("activated")
    used = np.maximum(np.diag(moments), 1e-9)
    lift = np.zeros_like(moments)
    if load.together is not None:
        lift = np.log(np.maximum(moments, 1e-9) / np.outer(used, used))
        lift = np.clip(lift, -3, 3)  # rare pairs are counted too seldom to be sure
    random = np.random.default_rng(seed)
    steps = np.zeros((num_steps, len(used)), bool)
    at = np.arange(num_steps)
    weight = np.tile(np.log(used), (num_steps, 1))
    for _ in range(min(load.per_step, len(used))):
        # The largest of log weight + Gumbel noise is a draw in proportion to weight.
        noise = random.gumbel(size=weight.shape)
        chosen = (weight + noise).argmax(-1)
        steps[at, chosen] = True
        weight += lift[chosen]
        weight[at, chosen] = -np.inf
    return steps


def expected_busiest(
    rank_experts: Sequence[Sequence[int]],
    steps: Bool[np.ndarray, "steps E"] | Float[np.ndarray, "steps E"],
    speeds: Sequence[float] | None = None,
) -> float:
    """The busiest rank's distinct experts under the exact choice, mean over steps.

    By Hall's theorem, without making the choices: the largest of ``n(A) / |A|`` over
    all sets of ranks, rounded up. With speeds, the least time (the largest of
    ``n(A) / speed(A)``, in experts of a rank of speed 1, not rounded).

    Args:
        rank_experts: the experts of each rank, at most 8 ranks.
        steps: which experts occur in each step, or the share of each in its rows.
        speeds: of the ranks.
    """
    num_ranks = len(rank_experts)
    masks = np.zeros(steps.shape[1], np.int64)
    for rank, experts in enumerate(rank_experts):
        masks[list(experts)] |= 1 << rank
    used = np.zeros(
        (len(steps), 1 << num_ranks), np.float32 if steps.dtype == bool else np.float64
    )
    for mask in np.unique(masks):
        used[:, mask] = steps[:, masks == mask].sum(1)
    for rank in range(num_ranks):  # sums over subsets, one rank after another
        halves = used.reshape(len(steps), -1, 2, 1 << rank)
        halves[:, :, 1] += halves[:, :, 0]
    members = np.arange(1, 1 << num_ranks)[:, None] >> np.arange(num_ranks) & 1
    if speeds is None:
        return float(np.ceil(used[:, 1:] / members.sum(1) - 1e-9).max(1).mean())
    of_sets = members @ np.array(speeds)  # on host
    return float((used[:, 1:] / of_sets).max(1).mean())
