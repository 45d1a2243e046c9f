"""Makes a plan from what the flags ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_ep.config import EPConfig
from mlx_ep.cost.attention import choose_attention
from mlx_ep.cost.profile import Profile
from mlx_ep.loading import choose_placement, find_model, model_shape
from mlx_ep.loading.caches import CacheQuantization
from mlx_ep.loading.estimate import ModelOutline, RankNeed, Workload, rank_needs
from mlx_ep.models.tensor_parallel import plan_split
from mlx_ep.placement import Placement
from mlx_ep.plan.advice import advice
from mlx_ep.plan.speeds import Speed, calibrated_profile, predict, profiles_of


@dataclass(frozen=True)
class Plan:
    """What was asked, and what follows.

    Attributes:
        advice: what would fit, where it does not.
        reason: of the attention that was chosen.
        profiles: of every rank, that the speeds are predicted from.
        no_speeds: why there are none.
        speeds: predicted.
    """

    model: ModelOutline
    placement: Placement
    workload: Workload
    needs: list[RankNeed]
    advice: list[str]
    reason: str = ""
    profiles: Sequence[Profile] = ()
    no_speeds: str = ""
    speeds: Sequence[Speed] = ()

    @property
    def fits(self) -> bool:
        return not any(need.missing_bytes > 0 for need in self.needs)


def make_plan(args: argparse.Namespace) -> Plan:
    """Everything that the flags ask for.

    Raises:
        ValueError: the model, or what is asked of it, is not possible.
    """
    num_ranks = _num_ranks(args)
    path = find_model(args.model, args.revision, download="ranges")
    model = ModelOutline.open(path)
    config = EPConfig(
        memory=args.memory,
        context=args.context if args.memory else 0,
        placement_file=args.placement_file,
        ep_size=args.ep_size,
    )
    whole = Placement.contiguous(model.num_experts, 1)
    placement = choose_placement(
        config,
        model.num_experts,
        num_ranks,
        lambda: model.make(whole, 0),
        must_fit=False,
    )
    memory = None
    if args.memory is not None:
        memory = [int(gigabytes * 1e9) for gigabytes in args.memory]
    workload = Workload(
        context=args.context,
        sequences=args.sequences,
        quantization=CacheQuantization(
            args.kv_bits, args.kv_group_size, args.quantized_kv_start
        ),
        step=args.prefill_step_size,
    )
    workload, needs, reason = _attention(model, placement, workload, memory, args)
    hints = [] if memory is None else advice(model, placement, needs, workload)
    plan = Plan(model, placement, workload, needs, hints, reason)
    return _with_speeds(plan, args)


def _num_ranks(args: argparse.Namespace) -> int:
    if args.memory is None and args.ranks is None:
        raise ValueError("Say how many Macs: --ranks N, or --memory with GB of each.")
    if args.ranks and args.memory and len(args.memory) != args.ranks:
        raise ValueError(
            f"--memory must name one number per rank, {args.ranks} of them; got "
            f"{len(args.memory)}."
        )
    return args.ranks or len(args.memory)


def _attention(
    model: ModelOutline,
    placement: Placement,
    workload: Workload,
    memory: Sequence[int] | None,
    args: argparse.Namespace,
) -> tuple[Workload, list[RankNeed], str]:
    """The workload with its attention, what the ranks need then, and why."""
    if args.attention != "auto":
        workload = replace(workload, attention=args.attention)
        return workload, rank_needs(model, placement, workload, memory), ""
    needs = {"replicated": rank_needs(model, placement, workload, memory)}
    split = plan_split(model.make(placement, 0), placement.num_ranks)
    tensor = replace(workload, attention="tensor")
    if not split.problem:
        needs["tensor"] = rank_needs(model, placement, tensor, memory)
    choice = choose_attention(
        "auto",
        num_ranks=placement.num_ranks,
        problem=split.problem,
        split_bytes=split.whole_bytes,
        collectives=split.collectives,
        fits_replicated=_fits(needs["replicated"]),
        fits_tensor="tensor" in needs and _fits(needs["tensor"]),
    )
    chosen = tensor if choice.attention == "tensor" else workload
    return chosen, needs[choice.attention], choice.reason


def _fits(needs: Sequence[RankNeed]) -> bool:
    return not any(need.missing_bytes > 0 for need in needs)


def _with_speeds(plan: Plan, args: argparse.Namespace) -> Plan:
    num_ranks = plan.placement.num_ranks
    profiles = _profiles(args, num_ranks)
    if not profiles:
        if args.link:
            raise ValueError("--link is of a profile: give --chip or --profile too.")
        return replace(
            plan,
            no_speeds="--chip NAME or --profile FILE, or run mlx_ep.calibrate on the "
            "cluster first",
        )
    if plan.placement.parts is not None:
        return replace(
            plan,
            no_speeds="not predicted with --ep, as the cost model has whole experts on "
            "every rank",
        )
    try:
        shape = model_shape(plan.model.config, name=args.model)
    except ValueError as error:
        return replace(plan, no_speeds=f"not predicted: {error}")
    split = plan_split(plan.model.make(plan.placement, 0), num_ranks)
    speeds = predict(
        profiles,
        shape,
        prompt=plan.workload.context,
        sequences=plan.workload.sequences,
        link=args.link,
        tensor_problem=split.problem,
        fits=_fit_together(plan, not split.problem),
        fits_alone=_fit_alone(plan),
    )
    return replace(plan, profiles=profiles, speeds=speeds)


def _profiles(args: argparse.Namespace, num_ranks: int) -> list[Profile]:
    """Of every rank; none where nothing is known."""
    if args.profile and args.chip:
        raise ValueError("Give --profile or --chip, not both.")
    if args.profile or args.chip:
        return profiles_of((args.profile or args.chip).split(","), num_ranks)
    calibrated = calibrated_profile(num_ranks)
    return [] if calibrated is None else [calibrated] * num_ranks


def _fit_alone(plan: Plan) -> list[bool] | None:
    """For every rank, whether it holds the whole model; None: not known."""
    whole = Placement.contiguous(plan.model.num_experts, 1)
    replicated = replace(plan.workload, attention="replicated")
    need = rank_needs(plan.model, whole, replicated)[0]
    memory = [rank.memory for rank in plan.needs if rank.memory is not None]
    return [need.total_bytes <= limit for limit in memory] or None


def _fit_together(plan: Plan, can_split: bool) -> dict[str, bool]:
    """Whether each way to run it on all ranks fits the memory that was given."""
    memory = [need.memory for need in plan.needs if need.memory is not None]
    if not memory:
        return {}
    placement, model = plan.placement, plan.model
    replicated = replace(plan.workload, attention="replicated")
    fits = {"ep-replicated": _fits(rank_needs(model, placement, replicated, memory))}
    if can_split:
        tensor = replace(plan.workload, attention="tensor")
        found = rank_needs(model, placement, tensor, memory)
        fits["ep-tensor"] = _fits(found)
        # The experts' widths are split evenly, whatever a rank has.
        experts = sum(need.expert_bytes for need in found) // placement.num_ranks
        fits["tp"] = all(
            need.total_bytes - need.expert_bytes + experts <= limit
            for need, limit in zip(found, memory, strict=True)
        )
    return fits
