"""A plan of stages of layers: ``--pp N``, cut as `mlx_ep.generate --pp` cuts them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_ep.config import EPConfig
from mlx_ep.cost.profile import Profile
from mlx_ep.cost.shape import ModelShape
from mlx_ep.cost.stages import PipelineCost, StageSize, pipeline_cost
from mlx_ep.loading import choose_placement
from mlx_ep.loading.estimate import ModelOutline, RankNeed, Workload, fits, rank_needs
from mlx_ep.loading.stages import model_stages
from mlx_ep.metrics import aligned
from mlx_ep.models import find_moe_sites
from mlx_ep.placement import Placement, StageLayers, check_stages
from mlx_ep.plan.speeds import Speed


@dataclass(frozen=True)
class StagePlan:
    """Stages of a pipeline, and what every rank needs with them.

    Attributes:
        placement: of the experts in each stage.
        layers: of each stage.
        sizes: how many of them have experts.
        needs: in the order of the ranks.
        cost: predicted; None: no profile.
    """

    placement: Placement
    layers: list[StageLayers]
    sizes: list[StageSize]
    needs: list[RankNeed]
    cost: PipelineCost | None = None

    @property
    def fits(self) -> bool:
        return fits(self.needs)

    @property
    def members(self) -> int:
        """Ranks of each stage."""
        return self.placement.num_ranks

    def ranks(self, stage: int) -> range:
        return range(stage * self.members, (stage + 1) * self.members)


def check_stage_flags(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: a flag asks for what mlx_ep.generate --pp does not do.
    """
    if args.pp == 1:
        return
    for name in (
        "simulate", "kv_bits", "write_placement", "record", "plot",
    ):  # fmt: skip
        if getattr(args, name) is not None:
            raise ValueError(
                f"--pp {args.pp} does not go with --{name.replace('_', '-')}. Leave "
                "one of the two out."
            )
    if args.sequences != 1:
        raise ValueError(
            f"--pp {args.pp} runs one sequence; got --sequences {args.sequences}. "
            "Leave one of the two out."
        )


def plan_stages(
    model: ModelOutline,
    config: EPConfig,
    num_ranks: int,
    workload: Workload,
    memory: Sequence[int] | None,
) -> StagePlan:
    """The stages that the flags of `config` make.

    Raises:
        ValueError: as `mlx_ep.generate --pp`: the ranks or layers cannot be divided,
            or the weights have no room.
    """
    members = check_stages(config.pp, num_ranks)
    whole = Placement.contiguous(model.num_experts, 1)
    placement = choose_placement(
        replace(config, memory=None),
        model.num_experts,
        members,
        lambda: model.make(whole, 0),
    )
    stages = model_stages(model.make(placement, 0), config, num_ranks)
    sizes = [
        StageSize(
            each.stop - each.start,
            len(find_moe_sites(model.make(replace(placement, stage=each), 0))),
        )
        for each in stages
    ]
    needs = rank_needs(model, placement, workload, memory, stages)
    return StagePlan(placement, stages, sizes, needs)


def with_cost(
    plan: StagePlan,
    profiles: Sequence[Profile],
    shape: ModelShape,
    workload: Workload,
    link: str | None,
) -> tuple[StagePlan, Speed]:
    """The plan with its predicted times, and the speed that they make."""
    cost = pipeline_cost(
        profiles,
        shape,
        plan.sizes,
        prompt=workload.context,
        step_tokens=workload.step,
        link=link,
    )
    has_memory = plan.needs[0].memory is not None
    speed = Speed(
        "pp",
        workload.context / cost.prompt,
        1 / cost.token,
        fits=plan.fits if has_memory else None,
    )
    return replace(plan, cost=cost), speed


def stages_table(plan: StagePlan) -> str:
    """One line a stage: its ranks and layers, and what they take."""
    head: tuple[str, ...] = ("stage", "ranks", "layers", "with experts", "weights GB")
    if plan.cost is not None:
        head += ("ms a token", "s a prompt")
    rows = [head]
    for index, (layers, size) in enumerate(zip(plan.layers, plan.sizes, strict=True)):
        ranks = plan.ranks(index)
        weights = max(plan.needs[rank].weight_bytes for rank in ranks)
        row: tuple[str, ...] = (
            str(index),
            " ".join(map(str, ranks)),
            f"{layers.start}..{layers.stop - 1}",
            str(size.moe_layers),
            f"{weights / 1e9:.4g}",
        )
        if plan.cost is not None:
            row += (
                f"{plan.cost.decode[index] * 1e3:.3f}",
                f"{plan.cost.prefill[index]:.3f}",
            )
        rows.append(row)
    text = aligned(rows, left=(1, 2)) + "\n(weights: of the rank that holds most)"
    if plan.cost is None:
        return text
    return text + (
        f"\nFrom stage to stage {plan.cost.hop * 1e3:.3f} ms a token, behind the last "
        f"one {plan.cost.last * 1e3:.3f} ms (predicted)."
    )


def stages_json(plan: StagePlan) -> list[dict[str, Any]]:
    """What `stages_table` says, exactly."""
    return [
        {
            "stage": index,
            "ranks": list(plan.ranks(index)),
            "layers": [layers.start, layers.stop],
            "moe_layers": size.moe_layers,
            "decode_seconds": plan.cost and plan.cost.decode[index],
            "prefill_seconds": plan.cost and plan.cost.prefill[index],
        }
        for index, (layers, size) in enumerate(
            zip(plan.layers, plan.sizes, strict=True)
        )
    ]
