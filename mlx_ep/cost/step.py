"""What a step of a model takes, from a profile and a shape. Pure.

`layer_cost` is for one MoE layer, `step_cost` for a forward step, `prefill_seconds` for
a prompt. The formulas are explained in docs/cost-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mlx_ep.config import EPConfig
from mlx_ep.cost.layer import (
    ARMS,
    Arm,
    LayerCost,
    check_arguments,
    collectives_seconds,
    dense_seconds,
    layer_cost,
    spread,
)
from mlx_ep.cost.profile import Profile
from mlx_ep.cost.shape import ModelShape
from mlx_ep.exchange import Collective
from mlx_ep.placement import Placement

__all__ = [
    "ARMS",
    "Arm",
    "LayerCost",
    "Phase",
    "PREFILL_TOKENS",
    "StepCost",
    "layer_cost",
    "prefill_seconds",
    "step_cost",
]

Phase = Literal["prefill", "decode"]
PREFILL_TOKENS = 2048  # of a step: mlx-lm's prefill_step_size


@dataclass(frozen=True)
class StepCost:
    """Seconds of one forward step of a model.

    Attributes:
        moe: one MoE layer; there are `num_moe_layers` of them.
        attention: projections and scores.
        dense: feed-forward layers without experts, norms and sums.
        head: logits.
        fixed: layers and the step, whatever they compute.
        communication: collectives outside of MoE layers.
        agreement: of `fixed` and `communication`, what agreeing on the ranks' token
            counts takes; 0 where nothing has to be agreed on.
        collectives: in and outside of MoE layers.
        tokens: of all ranks.
    """

    moe: LayerCost
    num_moe_layers: int
    attention: float
    dense: float
    head: float
    fixed: float
    communication: float
    agreement: float
    collectives: int
    tokens: int

    @property
    def seconds(self) -> float:
        rest = self.attention + self.dense + self.head + self.fixed
        return self.num_moe_layers * self.moe.seconds + rest + self.communication

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def communication_share(self) -> float:
        inside = self.num_moe_layers * self.moe.communication
        return (inside + self.communication) / self.seconds


def step_cost(
    profile: Profile,
    model: ModelShape,
    arm: str,
    *,
    tokens: int,
    phase: str,
    num_ranks: int = 1,
    sequences: int = 1,
    context: int = 0,
    logits: int | None = None,
    runner: str = "auto",
    link: str | None = None,
    config: EPConfig | None = None,
    placement: Placement | None = None,
) -> StepCost:
    """One forward step of a model.

    Args:
        tokens: of all ranks together. ``decode``: the number of sequences, each with
            one token behind `context` others; ``prefill``: tokens of `sequences`, an
            equal number of each, behind `context` others of it.
        phase: ``prefill`` or ``decode``.
        sequences: of a prefill. With data-parallel attention (ep-gathered,
            ep-all-to-all) a rank has whole sequences: one of them keeps one rank busy.
        logits: tokens whose logits are computed; None: all in decode, one for each
            sequence in prefill. 0: a part of a prompt of which only the caches are
            evaluated; what the last layer does behind its cache is then left out.
        profile, arm, num_ranks, runner, link, config, placement: as in `layer_cost`.
        model: its shape.

    Raises:
        ValueError: as `layer_cost`; there is no such phase.
    """
    if phase not in get_args(Phase):
        raise ValueError(f"phase must be prefill or decode; got {phase!r}.")
    check_arguments(arm, tokens, num_ranks)
    num_ranks = 1 if arm == "single" else num_ranks
    is_decode = phase == "decode"
    if not is_decode and (sequences < 1 or tokens % sequences):
        raise ValueError(
            f"The {tokens} tokens of a prefill must be equally many of each of "
            f"{sequences} sequences."
        )
    caches = tokens if is_decode else sequences
    own_caches = spread(caches, num_ranks)
    length = tokens // caches if caches else 0
    moe = layer_cost(
        profile,
        model.layer,
        arm,
        tokens=tokens,
        num_ranks=num_ranks,
        per_rank=tuple(count * length for count in own_caches),
        runner=runner,
        link=link,
        config=config,
        placement=placement,
    )
    is_split = num_ranks > 1 and arm in ("tp", "ep-tensor")
    is_sharded = num_ranks > 1 and arm in ("ep-gathered", "ep-all-to-all")
    held_caches = own_caches[0] if is_sharded else caches
    held = held_caches * length
    attention, dense = model.attention, model.dense
    if is_split:
        attention = attention.on_rank(num_ranks)
    if arm == "tp":
        dense = dense.on_rank(num_ranks)
    layers, width = model.num_layers, model.layer.width
    # A lazy graph never runs what only the logits would need; but exchanges of tokens
    # start when a layer is called.
    skipped = int(logits == 0 and not is_sharded and model.num_moe_layers > 1)
    summed = Collective("all_reduce", tokens * width * model.layer.itemsize)
    outside: list[Collective] = []
    if is_split:  # the attention's output, and with tp that of dense layers
        count = layers - skipped
        if arm == "tp":
            count += layers - model.num_moe_layers
        outside = [summed] * count
    agreeing = profile.sync_seconds if is_sharded else 0.0
    if is_sharded:  # on the ranks' token counts, once a step
        outside = [Collective("all_gather", 4)]
    outside_seconds = collectives_seconds(profile, tuple(outside), num_ranks, link)
    wanted = held_caches if logits is None else logits
    packing = model.dense_packing
    return StepCost(
        moe=moe,
        num_moe_layers=model.num_moe_layers - skipped,
        attention=dense_seconds(profile, attention, packing, held)
        + _scores(
            profile,
            model,
            held_caches,
            length,
            context,
            num_ranks if is_split else 1,
        ),
        dense=dense_seconds(profile, dense, packing, held)
        + profile.element_seconds * held * width * layers,
        head=dense_seconds(profile, model.head, packing, wanted),
        fixed=profile.layer_seconds * layers + profile.step_seconds + agreeing,
        communication=outside_seconds,
        agreement=agreeing + outside_seconds if is_sharded else 0.0,
        collectives=(model.num_moe_layers - skipped) * moe.collectives
        + (len(outside) if num_ranks > 1 else 0),
        tokens=tokens,
    )


def _scores(
    profile: Profile,
    model: ModelShape,
    caches: int,
    length: int,
    context: int,
    heads_over: int,
) -> float:
    """Scores and values: read the caches, or compute, whichever is longer.

    Args:
        caches: sequences.
        length: new tokens of each.
        context: tokens before them.
        heads_over: ranks that the heads are split over.
    """
    # A token sees itself and all before it: half of the new ones, on average.
    seen = context + (length + 1) / 2
    macs = caches * length * model.scores_macs(seen) / heads_over
    unseen = caches * length * (length - 1) / 2 * model.attention_macs / heads_over
    single, prompt, beyond = mac_seconds(profile, model)
    computing = macs * (single if length == 1 else prompt) + unseen * beyond
    num_bytes = caches * model.cache_bytes(context + length)
    num_bytes /= heads_over if model.kv_is_split else 1
    return max(computing, num_bytes / profile.memory_bandwidth)


def mac_seconds(profile: Profile, model: ModelShape) -> tuple[float, float, float]:
    """A multiply-add of scores and values, with its part of the scores themselves.

    Returns:
        s of a single query's, of a prompt's, and of one with a key that a query of a
        prompt does not see.
    """
    share = 0.0
    if model.attention_macs:
        share = model.attention_scores / model.attention_macs
    of_score = profile.score_seconds * share
    of_prompt = (profile.prompt_score_seconds or profile.score_seconds) * share
    computed = 2 / profile.attention_rate
    unseen = profile.unseen_seconds
    return (
        (profile.query_seconds or computed) + of_score,
        computed + of_prompt,
        unseen + of_prompt if unseen else 0.0,
    )


def prefill_seconds(
    profile: Profile,
    model: ModelShape,
    arm: str,
    *,
    prompt: int,
    step_tokens: int = PREFILL_TOKENS,
    **options: object,
) -> float:
    """A whole prompt, in steps of `step_tokens` as mlx-lm takes them.

    Args:
        prompt: tokens of one sequence.
        options: as in `step_cost`: num_ranks, runner, link, config.
    """
    total = 0.0
    for first in range(0, prompt, step_tokens):
        tokens = min(step_tokens, prompt - first)
        is_last = first + tokens == prompt
        total += step_cost(
            profile,
            model,
            arm,
            tokens=tokens,
            phase="prefill",
            context=first,
            logits=None if is_last else 0,
            **options,  # type: ignore[arg-type]
        ).seconds
    return total
