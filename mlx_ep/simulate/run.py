"""From what the flags say to a cluster that has served its trace."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlx_ep.cost.profile import MEASURED_ONLY, find_profile, shipped_profiles
from mlx_ep.simulate.cluster import Cluster, Instance, read_cluster
from mlx_ep.simulate.engine import Simulation
from mlx_ep.simulate.fields import read_json
from mlx_ep.simulate.flags import settings_of
from mlx_ep.simulate.group import StepTimes
from mlx_ep.simulate.memory import kv_blocks
from mlx_ep.simulate.model import find_model
from mlx_ep.simulate.placed import most_slots
from mlx_ep.simulate.routing import ExpertRouting, make_routing
from mlx_ep.simulate.settings import EngineSettings
from mlx_ep.simulate.times.bundle import find_bundle, read_bundle
from mlx_ep.simulate.times.bundle_times import BundleTimes
from mlx_ep.simulate.times.linear_times import (
    LinearTimes,
    is_step_costs,
    read_step_costs,
)
from mlx_ep.simulate.times.passes import PassTimes
from mlx_ep.simulate.times.profile_times import ProfileTimes
from mlx_ep.simulate.traces import Trace

_log = logging.getLogger("mlx_ep.simulate")


def open_cluster(args: argparse.Namespace) -> Cluster:
    """The cluster of ``--cluster-config``.

    Raises:
        ValueError: which field of which file is wrong.
    """
    folders = search_folders(args.model_dir, "models", args.cluster_config)
    cluster = read_cluster(
        args.cluster_config,
        replace(
            settings_of(args),
            placement_file=args.placement_file or "",
            replica_memory=args.replica_memory,
        ),
        lambda name: find_model(name, folders),
    )
    _warn_of_unused(cluster)
    return cluster


def _warn_of_unused(cluster: Cluster) -> None:
    """Settings that were given and that this package's server does not have."""
    defaults = EngineSettings()
    for instance in cluster.instances:
        if instance.settings.scheduler != "mlx_ep":
            continue
        for name in ("max_num_batched_tokens", "reserve_full_isl"):
            value = getattr(instance.settings, name)
            if value != getattr(defaults, name):
                _log.warning(
                    "%s: %s: %s %s has no effect with scheduler mlx_ep: the server "
                    "has prefill_step (%d) and admits by bytes",
                    cluster.file,
                    instance.where,
                    name,
                    value,
                    instance.settings.prefill_step,
                )


def search_folders(given: Path | None, name: str, file: Path) -> list[Path]:
    """Where models or bundles may be: as the flag says, else `name` here, or beside or
    above the cluster file.
    """
    if given is not None:
        return [given]
    parents = list(file.resolve().parents)[:4]
    return [Path(name), *(parent / name for parent in parents)]


def prepare(
    args: argparse.Namespace,
    cluster: Cluster,
    trace: Trace,
    note: Callable[[str], object] = lambda text: None,
) -> Simulation:
    """The engine that serves the trace, checked and ready.

    Args:
        note: is told where things are read from.

    Raises:
        ValueError: times of the hardware are not known, or a file is wrong.
    """
    times = [step_times(args, cluster, group, note) for group in cluster.groups]
    cluster = _with_whole_attention(cluster, times)
    chosen = None
    if args.request_routing_file is not None:
        chosen = _chosen(args.request_routing_file)
    if (args.request_routing_policy == "CUSTOM") != (chosen is not None):
        raise ValueError(
            "--request-routing-policy CUSTOM and --request-routing-file go together."
        )
    needs_file = args.expert_routing_policy in ("CUSTOM", "TRACE")
    if args.expert_routing_file is not None and not needs_file:
        raise ValueError(
            "--expert-routing-file goes with --expert-routing-policy CUSTOM or TRACE."
        )
    return Simulation(
        cluster,
        trace,
        times,
        policy=args.request_routing_policy,
        chosen=chosen,
        seed=args.seed,
    )


def _with_whole_attention(cluster: Cluster, times: Sequence[StepTimes]) -> Cluster:
    """The cluster with what devices hold where attention is not split over them."""
    changed = {}
    for group, own in zip(cluster.groups, times, strict=True):
        if not isinstance(own, ProfileTimes) or own.arm != "ep-replicated":
            continue
        for instance in group:
            model, settings, pool = instance.model, instance.settings, instance.pool
            slots = most_slots(instance.placement)
            weights = model.weight_bytes(1, instance.ep, 1, settings.itemsize, slots)
            limit = pool.pool_bytes + pool.weight_bytes
            token_bytes = model.kv_token_bytes(settings.kv_itemsize)
            try:
                whole = kv_blocks(
                    limit, weights, token_bytes, settings, pool.utilization
                )
            except ValueError as error:
                raise ValueError(
                    f"{cluster.file}: {instance.where}.npu_mem.mem_size: with whole "
                    f"attention {error}"
                ) from error
            changed[instance.index] = replace(instance, pool=whole)
    instances = [changed.get(i.index, i) for i in cluster.instances]
    groups = [tuple(instances[i.index] for i in group) for group in cluster.groups]
    return replace(cluster, instances=instances, groups=groups)


def step_times(
    args: argparse.Namespace,
    cluster: Cluster,
    group: Sequence[Instance],
    note: Callable[[str], object],
) -> StepTimes:
    """What a group's steps take: its hardware's bundle, or a profile of that name.

    Raises:
        ValueError: there is neither, or what is wrong with it.
    """
    first = group[0]
    folders = search_folders(args.profile_dir, "perf", args.cluster_config)
    folder = find_bundle(
        folders, first.hardware, first.model.name, first.settings.dtype
    )
    if folder is None:
        return _profile_times(args, cluster, group, folders, note)
    if first.model.latents:
        raise ValueError(
            f"{cluster.file}: {first.where}.hardware: {folder} is a bundle, whose "
            f"kernels are of grouped-query attention; {first.model.name} has latents. "
            "Use a profile."
        )
    _refuse_overlap(args, cluster, first, f"the kernels of the bundle {folder}")
    note(f"{first.where}: times from {folder}")
    times = BundleTimes(
        cluster,
        group,
        read_bundle(folder, first.tp, first.model.is_moe),
        _routing(args, first),
        args.expert_exchange,
    )
    return PassTimes(times) if first.settings.scheduler == "mlx_ep" else times


def _profile_times(
    args: argparse.Namespace,
    cluster: Cluster,
    group: Sequence[Instance],
    folders: Sequence[Path],
    note: Callable[[str], object],
) -> StepTimes:
    first = group[0]
    beside = Path(cluster.file).parent / first.hardware
    name = str(beside) if beside.is_file() else first.hardware
    if name not in shipped_profiles() and not Path(name).expanduser().is_file():
        raise ValueError(
            f"{cluster.file}: {first.where}.hardware: {first.hardware!r} has no bundle "
            f"of {first.model.name} as {first.settings.dtype} in "
            f"{', '.join(map(str, folders[:3]))} (--profile-dir says where), and is no "
            f"profile: a file, or one of {', '.join(shipped_profiles())}."
        )
    if name not in shipped_profiles() and is_step_costs(Path(name).expanduser()):
        _refuse_overlap(args, cluster, first, f"the step costs {name}")
        note(f"{first.where}: times from the step costs {name}")
        return LinearTimes(read_step_costs(Path(name).expanduser()))
    if args.expert_routing_policy not in ("COPY", "RAND"):
        raise ValueError(
            "--expert-routing-policy: the cost model of a profile has uniform routing, "
            f"COPY; got {args.expert_routing_policy}."
        )
    if args.expert_exchange == "none":
        raise ValueError(
            "--expert-exchange none: a profile's cost model counts the exchange."
        )
    from mlx_ep.loading import model_shape  # mlx-lm's models: slow to load

    dtype = first.settings.dtype if first.settings.dtype in _FLOATS else "bfloat16"
    note(f"{first.where}: times from the profile {name}")
    profile = find_profile(name)
    if absent := [n for n in MEASURED_ONLY if n not in profile.sources]:
        _log.info(
            "the profile %s has no %s: for query_seconds attention_rate is assumed, "
            "for others 0",
            name,
            ", ".join(absent),
        )
    return ProfileTimes(
        group,
        profile,
        model_shape(first.model.config, dtype=dtype, name=first.model.name),
        args.expert_exchange,
        args.link,
        args.overlap,
    )


def _refuse_overlap(
    args: argparse.Namespace, cluster: Cluster, first: Instance, times: str
) -> None:
    if args.overlap != "none":
        raise ValueError(
            f"{cluster.file}: {first.where}.hardware: --overlap {args.overlap} is of "
            f"this package's steps, which {times} do not tell apart. Use a profile, or "
            "--overlap none."
        )


_FLOATS = ("float32", "bfloat16", "float16")


def _routing(args: argparse.Namespace, first: Instance) -> ExpertRouting | None:
    if not first.model.is_moe:
        return None
    return make_routing(
        args.expert_routing_policy,
        first.model.num_experts,
        first.model.top_k,
        first.ep,
        file=args.expert_routing_file,
        seed=args.seed,
        placement=first.placement,
    )


def _chosen(file: Path) -> list[int]:
    content = read_json(file)
    if not isinstance(content, list) or not all(type(i) is int for i in content):
        raise ValueError(
            f"{file}: must be a list of instance numbers; got "
            f"{json.dumps(content)[:40]}."
        )
    return content
