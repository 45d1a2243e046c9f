"""What the stages of a pipeline take, from profiles and a model's shape. Pure.

A stage's part of a step is that of its layers; a step goes through one stage after
another, while the chunks of a prompt keep them busy at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_ep.cost.profile import Profile, slowest
from mlx_ep.cost.shape import ModelShape
from mlx_ep.cost.step import PREFILL_TOKENS, StepCost, step_cost

_ARM = "ep-replicated"


@dataclass(frozen=True)
class StageSize:
    """How many layers a stage has, and how many of them have experts."""

    layers: int
    moe_layers: int


@dataclass(frozen=True)
class PipelineCost:
    """Seconds of a model in stages.

    Attributes:
        decode: of each stage's layers, for one token.
        prefill: of each stage's layers, for a whole prompt.
        hop: of hidden states from stage to stage, for one token.
        last: what every rank does behind the last stage, for one token: its output
            comes to all, and the logits.
        prompt: of a whole prompt through all stages.
    """

    decode: tuple[float, ...]
    prefill: tuple[float, ...]
    hop: float
    last: float
    prompt: float

    @property
    def token(self) -> float:
        """Of one decoded token: through all stages, one after another."""
        return sum(self.decode) + (len(self.decode) - 1) * self.hop + self.last


def pipeline_cost(
    profiles: Sequence[Profile],
    model: ModelShape,
    stages: Sequence[StageSize],
    *,
    prompt: int,
    step_tokens: int = PREFILL_TOKENS,
    link: str | None = None,
) -> PipelineCost:
    """A prompt of one sequence, and a token decoded behind it.

    Chunk c leaves stage s when both c - 1 has left it and c has come to it:

        end[c, s] = max(end[c - 1, s], end[c, s - 1] + hop) + seconds[c, s]

    Args:
        profiles: of every rank; in a stage the slowest counts.
        stages: their layers; ranks are divided evenly.
        prompt: tokens.
        step_tokens: of a chunk of it.
        link: between all ranks; None: the profile's first.

    Raises:
        ValueError: the profile has no such link.
    """
    members = len(profiles) // len(stages)
    groups = [
        slowest(profiles[i : i + members]) for i in range(0, len(profiles), members)
    ]
    every = slowest(profiles)
    row = model.layer.width * model.layer.itemsize

    def of_stages(tokens: int, phase: str, context: int) -> list[float]:
        costs = [
            step_cost(
                profile,
                model,
                _ARM,
                tokens=tokens,
                phase=phase,
                context=context,
                num_ranks=members,
                link=link,
            )
            for profile in groups
        ]
        triples = zip(groups, costs, stages, strict=True)
        return [stage_seconds(p, model, cost, size) for p, cost, size in triples]

    def hop(tokens: int) -> float:
        # What each way of an exchange between two ranks takes.
        return _moved(every, "all_gather", tokens * row, 2, link)

    ends = [0.0] * len(stages)
    prefill = [0.0] * len(stages)
    for first in range(0, prompt, step_tokens):
        tokens = min(step_tokens, prompt - first)
        seconds = of_stages(tokens, "prefill", first)
        came = 0.0
        for index, each in enumerate(seconds):
            ends[index] = came = max(ends[index], came) + each
            came += hop(tokens)
            prefill[index] += each
    last_tokens = (prompt - 1) % step_tokens + 1

    def last(tokens: int) -> float:
        shared = _moved(every, "all_reduce", tokens * row, len(profiles), link)
        return shared + max(_head(profile, model, members, link) for profile in groups)

    return PipelineCost(
        tuple(of_stages(1, "decode", prompt)),
        tuple(prefill),
        hop(1),
        last(1),
        ends[-1] + last(last_tokens),
    )


def stage_seconds(
    profile: Profile, model: ModelShape, cost: StepCost, size: StageSize
) -> float:
    """A stage's part of a step of the whole model, without the logits.

    Attention and what a layer costs whatever it computes are taken to be alike in all
    layers, dense feed-forward layers to be those without experts.

    Args:
        cost: of a step on the ranks of one stage.
    """
    share = size.layers / model.num_layers
    tokens, width = cost.tokens, model.layer.width
    elements = profile.element_seconds * tokens * width * model.num_layers
    without = model.num_layers - model.num_moe_layers
    matrices = max(cost.dense - elements, 0.0)
    dense = matrices * (size.layers - size.moe_layers) / without if without else 0.0
    return (
        size.moe_layers * cost.moe.seconds
        + (cost.attention + elements) * share
        + dense
        + profile.layer_seconds * size.layers
        + profile.step_seconds
    )


def _head(profile: Profile, model: ModelShape, members: int, link: str | None) -> float:
    """The logits of one token."""
    cost = step_cost(
        profile, model, _ARM, tokens=1, phase="decode", num_ranks=members, link=link
    )
    return cost.head


def _moved(
    profile: Profile, operation: str, num_bytes: int, num_ranks: int, link: str | None
) -> float:
    if num_ranks == 1:
        return 0.0
    cable = profile.link(link)
    return cable.seconds(operation, num_bytes, num_ranks) + cable.crossing_seconds
