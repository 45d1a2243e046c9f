"""Makes a plan from what the flags ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_ep.cli.hosts import read_hostfile
from mlx_ep.config import EPConfig
from mlx_ep.cost.attention import choose_attention
from mlx_ep.cost.profile import Profile
from mlx_ep.loading import find_model, model_shape
from mlx_ep.loading.caches import CacheQuantization
from mlx_ep.loading.estimate import ModelOutline, RankNeed, Workload, fits, rank_needs
from mlx_ep.models.tensor_parallel import plan_split
from mlx_ep.placement import Placement
from mlx_ep.plan.advice import advice, memory_advice
from mlx_ep.plan.launch_line import launch_line, memory_of
from mlx_ep.plan.speeds import Speed, calibrated_profile, predict, profiles_of
from mlx_ep.plan.split import Split, SplitOf, split_of
from mlx_ep.plan.stages import StagePlan, plan_stages, with_cost


@dataclass(frozen=True)
class Plan:
    """What was asked, and what follows.

    Attributes:
        advice: what would fit, where it does not.
        launch: the words of a command that runs it.
        reason: of the attention that was chosen.
        profiles: of every rank, that the speeds are predicted from.
        no_speeds: why there are none.
        speeds: predicted.
        stages: of layers, with --pp; `placement` is then that of one stage.
    """

    model: ModelOutline
    placement: Placement
    workload: Workload
    needs: list[RankNeed]
    advice: list[str]
    launch: list[str]
    reason: str = ""
    profiles: Sequence[Profile] = ()
    no_speeds: str = ""
    speeds: Sequence[Speed] = ()
    stages: StagePlan | None = None

    @property
    def fits(self) -> bool:
        return fits(self.needs)


def make_plan(args: argparse.Namespace) -> Plan:
    """Everything that the flags ask for.

    Raises:
        ValueError: the model, or what is asked of it, is not possible.
    """
    _ask_hosts(args)
    num_ranks = _num_ranks(args)
    path = find_model(args.model, args.revision, download="ranges")
    model = ModelOutline.open(path)
    config = EPConfig(
        memory=args.memory,
        replica_memory=args.replica_memory,
        placement_file=args.placement_file,
        ep_size=args.ep_size,
        pp=args.pp,
        attention=args.attention if args.pp > 1 else "replicated",
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
    if config.pp > 1:
        stages = plan_stages(model, config, num_ranks, workload, memory)
        hints = [] if stages.fits else [memory_advice(stages.needs)]
        line = launch_line(args, workload, num_ranks, 0)
        plan = Plan(model, stages.placement, workload, stages.needs, hints, line)
        return _with_speeds(replace(plan, stages=stages), args)
    split = split_of(model, config, num_ranks, memory)
    workload, found, reason = _attention(model, split, workload, args.attention)
    hints = []
    if memory is not None and not found.fits:
        hints = advice(model, found, workload, split)
    line = launch_line(args, workload, num_ranks, found.context)
    placement, needs = found.placement, found.needs
    plan = Plan(model, placement, workload, needs, hints, line, reason)
    return _with_speeds(plan, args)


def _ask_hosts(args: argparse.Namespace) -> None:
    """Put the number of hosts, and their memory, in the place of flags not given.

    Raises:
        ValueError: they do not fit the flags, or cannot be asked.
    """
    if args.hostfile is None:
        return
    hosts = read_hostfile(args.hostfile)
    if args.ranks not in (None, len(hosts.ranks)):
        raise ValueError(
            f"--hostfile has {len(hosts.ranks)} hosts, a rank on each; got --ranks "
            f"{args.ranks}. Leave --ranks out."
        )
    args.ranks = len(hosts.ranks)
    if args.memory is None:
        args.memory = memory_of(hosts)


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
    model: ModelOutline, split: SplitOf, workload: Workload, wish: str
) -> tuple[Workload, Split, str]:
    """The workload with its attention, its split, and why."""
    if wish != "auto":
        workload = replace(workload, attention=wish)
        return workload, split(workload), ""
    found = {"replicated": split(workload)}
    placement = found["replicated"].placement
    parts = plan_split(model.make(placement, 0), placement.num_ranks)
    tensor = replace(workload, attention="tensor")
    if not parts.problem:
        found["tensor"] = split(tensor)
    choice = choose_attention(
        "auto",
        num_ranks=placement.num_ranks,
        problem=parts.problem,
        split_bytes=parts.whole_bytes,
        collectives=parts.collectives,
        fits_replicated=found["replicated"].fits,
        fits_tensor="tensor" in found and found["tensor"].fits,
    )
    chosen = tensor if choice.attention == "tensor" else workload
    return chosen, found[choice.attention], choice.reason


def _with_speeds(plan: Plan, args: argparse.Namespace) -> Plan:
    num_ranks = len(plan.needs)
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
    if plan.stages is not None:
        alone = predict(
            profiles,
            shape,
            prompt=plan.workload.context,
            link=args.link,
            fits_alone=_fit_alone(plan),
            arms=(),
        )
        stages, speed = with_cost(
            plan.stages, profiles, shape, plan.workload, args.link
        )
        return replace(plan, profiles=profiles, speeds=[*alone, speed], stages=stages)
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
    found = {"ep-replicated": fits(rank_needs(model, placement, replicated, memory))}
    if can_split:
        tensor = replace(plan.workload, attention="tensor")
        needs = rank_needs(model, placement, tensor, memory)
        found["ep-tensor"] = fits(needs)
        # The experts' widths are split evenly, whatever a rank has.
        experts = sum(need.expert_bytes for need in needs) // placement.num_ranks
        found["tp"] = all(
            need.total_bytes - need.expert_bytes + experts <= limit
            for need, limit in zip(needs, memory, strict=True)
        )
    return found
