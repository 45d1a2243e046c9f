"""The router of a MoE layer: tokens -> experts and gates."""

from __future__ import annotations

import math
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Float32

from mlx_ep.types import CompleteRouting, Routing


class TopKRouter(nn.Module):
    """Chooses K of E experts per token.

    1. logits    ``x @ weight.T`` in float32, soft-capped
    2. scores    softmax over all experts, or sigmoid of each
    3. select    the K best by score plus `bias`, among the best groups only
    4. gates     the scores (without the bias) of those, renormalised and scaled

    Args:
        hidden_dims: D.
        num_experts: E.
        top_k: K.
        score_function: ``softmax`` or ``sigmoid``.
        use_bias: have a parameter ``bias`` (E numbers, zeros) that is added for the
            selection only; load balancing without an auxiliary loss trains it.
        num_groups: experts are in this many groups of consecutive ones.
        top_groups: only experts of this many groups can be chosen. A group counts for
            the sum of its two best scores with a bias, for its best without one.
        renormalize: divide the gates by their sum.
        scaling_factor: multiply the gates by it.
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``.

    Raises:
        ValueError: the numbers do not fit one another.
    """

    def __init__(
        self,
        hidden_dims: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: Literal["softmax", "sigmoid"] = "softmax",
        use_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        if score_function not in ("softmax", "sigmoid"):
            raise ValueError(
                f"score_function must be softmax or sigmoid; got {score_function!r}."
            )
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(
                f"num_groups must divide the experts; got {num_groups} groups and "
                f"{num_experts} experts."
            )
        if not 1 <= top_groups <= num_groups:
            raise ValueError(
                f"top_groups must be 1 to num_groups={num_groups}; got {top_groups}."
            )
        selectable = num_experts // num_groups * top_groups
        if not 1 <= top_k <= selectable:
            raise ValueError(
                f"top_k must be 1 to {selectable}, the experts that can be chosen; got "
                f"{top_k}."
            )
        if soft_cap is not None and soft_cap <= 0:
            raise ValueError(f"soft_cap must be above 0, or None; got {soft_cap}.")
        self.top_k = top_k
        self.score_function = score_function
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.renormalize = renormalize
        self.scaling_factor = scaling_factor
        self.soft_cap = soft_cap
        scale = 1 / math.sqrt(hidden_dims)
        self.weight = mx.random.uniform(-scale, scale, (num_experts, hidden_dims))
        if use_bias:
            self.bias = mx.zeros((num_experts,))

    def __call__(self, x: Float[mx.array, "T D"]) -> Routing:
        """The experts of each token and their gates; in no particular order."""
        # Near-ties decide which expert runs, so logits are float32 whatever x is.
        weight = self.weight.astype(mx.float32)
        logits = x.astype(mx.float32) @ weight.T
        if self.soft_cap is not None:
            logits = self.soft_cap * mx.tanh(logits / self.soft_cap)
        return self.select(logits)

    def select(self, logits: Float32[mx.array, "T E"]) -> Routing:
        """Steps 2 to 4."""
        if self.score_function == "softmax":
            scores = mx.softmax(logits, axis=-1, precise=True)
        else:
            scores = mx.sigmoid(logits)
        choice = scores + self.bias if "bias" in self else scores
        if self.top_groups < self.num_groups:
            choice = self._within_groups(choice)
        ids = _best(choice, self.top_k)
        gates = mx.take_along_axis(scores, ids, axis=-1)
        if self.renormalize:
            # Sigmoid scores may all be 0 in float32; softmax scores never are.
            gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
        gates = gates * self.scaling_factor
        return CompleteRouting(ids.astype(mx.int32), gates.astype(mx.float32))

    def _within_groups(
        self, choice: Float32[mx.array, "T E"]
    ) -> Float32[mx.array, "T E"]:
        """The choice with minus infinity outside the best groups of each token."""
        num_tokens, num_experts = choice.shape
        grouped = choice.reshape(
            num_tokens, self.num_groups, num_experts // self.num_groups
        )
        num_best = min(2 if "bias" in self else 1, grouped.shape[-1])
        best = mx.take_along_axis(grouped, _best(grouped, num_best), axis=-1)
        kept = _best(best.sum(axis=-1), self.top_groups)
        is_kept = (mx.arange(self.num_groups) == kept[..., None]).any(axis=1)
        limited = mx.where(is_kept[..., None], grouped, -mx.inf)
        return limited.reshape(choice.shape)


def _best(values: mx.array, count: int) -> mx.array:
    """The places of the `count` largest values of the last axis."""
    return mx.argpartition(-values, kth=count - 1, axis=-1)[..., :count]
