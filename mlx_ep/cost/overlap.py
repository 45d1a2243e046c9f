"""What of a step's exchanges `--overlap` hides, from the costs of its parts. Pure.

An exchange is hidden as far as there is computing that does not need it and that runs
meanwhile: min(computing, exchange), for each exchange (docs/overlap.md). Crossing from
the device to the host and back (`Link.crossing_seconds`) is the device's own time: it
computes nothing meanwhile, so nothing hides it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from mlx_ep.cost.step import StepCost

Seconds = np.ndarray | float


@dataclass(frozen=True)
class StepParts:
    """Seconds of a forward step, and of one of its MoE layers what can run at once.

    Attributes:
        seconds: of the whole step, with nothing hidden.
        layers: MoE layers that exchange.
        before: computing of a layer before its experts: attention, dense matrices,
            router.
        experts: routed and shared ones.
        shared: the shared ones alone.
        dispatch, combine: exchanges before and behind the experts, without their
            crossings. Of several collectives the last one is the combine.
        agreement: of `seconds`, agreeing on the ranks' token counts, once.
    """

    seconds: float | int
    layers: float | int
    before: float | int
    experts: float | int
    shared: float | int
    dispatch: float | int
    combine: float | int
    agreement: float | int = 0.0

    @classmethod
    def of(cls, cost: StepCost, num_layers: int) -> StepParts:
        """The parts of a step of a model with so many layers, MoE or not."""
        moe = cost.moe
        before = max(moe.collectives - 1, 0) * moe.crossing
        return cls(
            seconds=cost.seconds,
            layers=cost.num_moe_layers,
            before=(cost.attention + cost.dense) / num_layers + moe.route,
            experts=moe.experts + moe.shared,
            shared=moe.shared,
            dispatch=max(0.0, moe.communication - moe.combine - before),
            combine=max(0.0, moe.combine - moe.crossing),
            agreement=cost.agreement,
        )

    def between(self, other: StepParts, weight: float) -> StepParts:
        """On the line to another step's parts; weight 0 is this one."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return StepParts(*((1 - weight) * a + weight * b for a, b in pairs))


def hidden_by_shared(step: StepParts) -> float:
    """Seconds that `single` hides: of each layer's last collective, behind its shared
    experts.
    """
    return step.layers * min(step.shared, step.combine)


def hidden_by_halves(
    first: StepParts,
    second: StepParts,
    scores: tuple[Seconds, Seconds] = (0.0, 0.0),
) -> np.ndarray:
    """``[...]`` s that two micro-batches hide of each other's exchanges.

    They take turns: what one starts is under way while the other computes up to its
    own. Nothing is left to hide the last exchange of the second.

    Args:
        scores: of the attention, s per layer, of each, where `before` has none.
    """
    layers = max(min(first.layers, second.layers), 0.0)
    before = first.before + scores[0], second.before + scores[1]
    if first.dispatch or second.dispatch:
        every = np.minimum(first.dispatch, before[1])
        every = every + np.minimum(second.dispatch, first.experts)
        every = every + np.minimum(first.combine, second.experts)
        crossing = np.minimum(second.combine, before[0])
    else:  # a turn is a layer
        every = np.minimum(first.combine, before[1] + second.experts)
        crossing = np.minimum(second.combine, before[0] + first.experts)
    hidden = layers * every + max(layers - 1, 0.0) * crossing
    return np.asarray(hidden)  # on host
