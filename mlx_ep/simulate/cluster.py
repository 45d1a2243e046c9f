"""The cluster file: nodes, instances, links; every error names the field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_ep.placement import Placement
from mlx_ep.simulate.fields import Fields, is_number, read_json
from mlx_ep.simulate.memory import KvPool, kv_pool
from mlx_ep.simulate.model import ModelSizes
from mlx_ep.simulate.placed import most_slots, placement_of
from mlx_ep.simulate.settings import EngineSettings, overridden

PdType = Literal["prefill", "decode"]
# Known to LLMServingSim's files and not simulated here: asked for, they are refused.
NOT_SIMULATED = {
    "placement": "where weights and caches lie beside the device's memory",
    "enable_attn_offloading": "attention on other devices",
    "enable_local_offloading": "weights outside of the device's memory",
    "enable_sub_batch_interleaving": "two halves of a batch that overlap",
    "enable_prefix_sharing": "prefixes shared by instances",
    "prefix_storage": "prefixes outside of the device's memory",
    "pim_config": "memory that computes",
    "cxl_mem": "CXL memory",
    "power": "energy",
}


@dataclass(frozen=True)
class LinkLevel:
    """One dimension of the network: ring steps with a latency and a bandwidth.

    Attributes:
        bandwidth: bytes per ns, which is GB/s.
        latency: ns.
    """

    bandwidth: float | int
    latency: float | int


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One engine.

    Attributes:
        where: it stands in the file.
        index: of all instances of the cluster.
        node: the index of its node.
        tp, pp, ep: sizes of its parallel groups; `ep` may reach over its `dp_group`.
        memory: GiB of a device.
        placement: of the experts on the `ep` ranks; None: contiguous.
    """

    where: str
    index: int
    node: int
    model: ModelSizes
    hardware: str
    memory: float | int
    pd_type: PdType | None
    tp: int
    pp: int
    ep: int
    dp_group: str | None
    settings: EngineSettings
    pool: KvPool
    placement: Placement | None = None

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster file says.

    Attributes:
        groups: instances that step together: those of one `dp_group`, in the order of
            the file, or one alone.
        devices: the link between the devices of one instance.
        instances_link: between instances of a node; `nodes_link`: between nodes.
    """

    file: str
    instances: Sequence[Instance]
    groups: Sequence[tuple[Instance, ...]]
    devices: LinkLevel
    instances_link: LinkLevel
    nodes_link: LinkLevel

    def levels_of(self, group: Sequence[Instance]) -> list[tuple[int, LinkLevel]]:
        """How many members each level of the network joins, for a group's experts:
        nodes first, then instances of a node, then devices of an instance.
        """
        first = group[0]
        if first.ep <= first.tp:
            return [(first.ep, self.devices)]
        across, local = len(group), first.ep // len(group)
        nodes = len({instance.node for instance in group})
        if nodes > 1 and across % nodes == 0:
            inside = across // nodes
            return [
                (nodes, self.nodes_link),
                (inside, self.instances_link),
                (local, self.devices),
            ]
        between = self.nodes_link if nodes > 1 else self.instances_link
        return [(across, between), (local, self.devices)]


def read_cluster(
    file: Path, settings: EngineSettings, find: Callable[[str], ModelSizes]
) -> Cluster:
    """The cluster of a file.

    Args:
        settings: what the flags say; instances may override it.
        find: the model of a name.

    Raises:
        ValueError: which field of which file is wrong.
    """
    top = Fields(str(file), "", read_json(file))
    _refuse(top)
    count = top.integer("num_nodes", least=1)
    nodes = top.objects("nodes")
    if len(nodes) != count:
        raise top.fail(
            "num_nodes", f"must be the number of nodes, {len(nodes)}; got {count}."
        )
    instances: list[Instance] = []
    for index, node in enumerate(nodes):
        _refuse(node)
        found = node.objects("instances")
        wanted = node.integer("num_instances", least=1)
        if wanted != len(found):
            raise node.fail(
                "num_instances",
                f"must be the number of instances, {len(found)}; got {wanted}.",
            )
        memory = node.object("cpu_mem")
        for key in ("mem_size", "mem_bw", "mem_latency"):
            memory.number(key)
        memory.close()
        node.close(NOT_SIMULATED)
        for fields in found:
            instances.append(_instance(fields, index, len(instances), settings, find))
    groups = _groups(top, instances)
    levels = _links(top, instances, groups)
    top.close(NOT_SIMULATED)
    return Cluster(
        file=str(file),
        instances=instances,
        groups=groups,
        devices=levels[0],
        instances_link=levels[1],
        nodes_link=levels[2],
    )


def _refuse(fields: Fields) -> None:
    for key, what in NOT_SIMULATED.items():
        if fields.value(key, False):
            raise fields.fail(key, f"is not simulated here ({what}); take it out.")


def _instance(
    fields: Fields,
    node: int,
    index: int,
    settings: EngineSettings,
    find: Callable[[str], ModelSizes],
) -> Instance:
    _refuse(fields)
    name = fields.text("model_name")
    try:
        model = find(name)
    except ValueError as error:
        raise fields.fail("model_name", str(error)) from error
    memory = fields.object("npu_mem")
    size = memory.number("mem_size", above=0)
    for key in ("mem_bw", "mem_latency"):
        memory.number(key)
    own = overridden(settings, fields, memory)
    memory.close()
    tp = fields.integer("tp_size", 1, least=1)
    pp = fields.integer("pp_size", 1, least=1)
    npus = fields.integer("num_npus", tp * pp, least=1)
    if npus != tp * pp:
        raise fields.fail(
            "num_npus", f"num_npus ({npus}) != tp_size ({tp}) * pp_size ({pp})"
        )
    if pp > model.num_layers:
        raise fields.fail("pp_size", f"must be at most {model.num_layers} layers.")
    ep = fields.integer("ep_size", tp if model.is_moe else 1, least=1)
    group = fields.text("dp_group") if fields.has("dp_group") else None
    fields.value("dp_group", None)
    _check_ep(fields, model, tp, ep, group)
    pd_type = fields.value("pd_type", None)
    if pd_type not in ("prefill", "decode", None):
        raise fields.fail(
            "pd_type", f"must be prefill, decode or null; got {pd_type!r}."
        )
    hardware = fields.text("hardware")
    fields.close(NOT_SIMULATED)
    _check_scheduler(fields, own, pp, pd_type)
    try:
        placement = placement_of(model, own, ep)
    except ValueError as error:
        raise fields.fail("expert_placement", str(error)) from error
    return Instance(
        where=fields.path,
        index=index,
        node=node,
        model=model,
        hardware=hardware,
        memory=size,
        pd_type=pd_type,
        tp=tp,
        pp=pp,
        ep=ep,
        dp_group=group,
        settings=own,
        placement=placement,
        pool=kv_pool(fields, model, own, size, tp, pp, ep, most_slots(placement)),
    )


def _check_scheduler(
    fields: Fields, settings: EngineSettings, pp: int, pd_type: str | None
) -> None:
    """What this package's server does not have."""
    if settings.scheduler != "mlx_ep":
        return
    wrong = {
        "pp_size": pp > 1,
        "pd_type": pd_type is not None,
        "skip_prefill": settings.skip_prefill,
        "long_prefill_token_threshold": settings.long_prefill_token_threshold > 0,
        "enable_chunked_prefill": not settings.enable_chunked_prefill,
    }
    for key in (key for key, is_wrong in wrong.items() if is_wrong):
        raise fields.fail(
            key, "must be left out with scheduler mlx_ep: the server has no such thing."
        )


def _check_ep(
    fields: Fields, model: ModelSizes, tp: int, ep: int, group: str | None
) -> None:
    if ep > 1 and not model.is_moe:
        raise fields.fail(
            "ep_size", f"ep_size ({ep}) must be 1: {model.name} has no experts"
        )
    if ep > tp and group is None:
        raise fields.fail(
            "ep_size", f"ep_size ({ep}) > tp_size ({tp}) requires dp_group to be set"
        )
    if model.is_moe and model.num_experts % ep:
        raise fields.fail(
            "ep_size",
            f"ep_size ({ep}) must divide the model's expert count "
            f"({model.num_experts})",
        )


def _groups(top: Fields, instances: Sequence[Instance]) -> list[tuple[Instance, ...]]:
    """Instances by `dp_group`; each must be alike in what steps together."""
    named: dict[str, list[Instance]] = {}
    groups: list[list[Instance]] = []
    for instance in instances:
        if instance.dp_group is None:
            groups.append([instance])
            continue
        if instance.dp_group not in named:
            named[instance.dp_group] = []
            groups.append(named[instance.dp_group])
        named[instance.dp_group].append(instance)
    for group in groups:
        first = group[0]
        for other in group[1:]:
            mine, its = first.settings.scheduler, other.settings.scheduler
            if mine != its:
                raise top.fail(
                    f"{other.where}.scheduler",
                    f"instances of dp_group {other.dp_group!r} must have the same "
                    f"scheduler; got {its!r} and, in {first.where}, {mine!r}",
                )
            for key in ("tp", "pp", "ep", "pd_type", "hardware", "placement"):
                ours, theirs = getattr(first, key), getattr(other, key)
                if ours != theirs:
                    name = f"{key}_size" if len(key) == 2 else key
                    if key == "placement":
                        name, ours, theirs = "expert_placement", "another", "one"
                    raise top.fail(
                        f"{other.where}.{name}",
                        f"instances of dp_group {other.dp_group!r} must have the same "
                        f"{name}; got {theirs!r} and, in {first.where}, {ours!r}",
                    )
            if first.model.name != other.model.name:
                raise top.fail(
                    f"{other.where}.model_name",
                    f"instances of dp_group {other.dp_group!r} must have the same "
                    f"model; got {other.model.name} and {first.model.name}",
                )
        _check_local_ep(top, group)
    return [tuple(group) for group in groups]


def _check_local_ep(top: Fields, group: Sequence[Instance]) -> None:
    """With experts over the group, each instance holds ep / members shares."""
    first = group[0]
    if first.ep <= first.tp:
        return
    local, rest = divmod(first.ep, len(group))
    if rest or local > first.tp:
        raise top.fail(
            f"{first.where}.ep_size",
            f"ep_size ({first.ep}) over the {len(group)} instances of dp_group "
            f"{first.dp_group!r} makes local_ep {first.ep / len(group):g}, which must "
            f"be a whole number from 1 to tp_size ({first.tp})",
        )


def _links(
    top: Fields, instances: Sequence[Instance], groups: Sequence[tuple[Instance, ...]]
) -> tuple[LinkLevel, LinkLevel, LinkLevel]:
    """Between devices, instances and nodes: one for all, or one per level that exists.

    A level exists where it joins more than one member.
    """
    shared = [group for group in groups if len(group) > 1]
    inside = any(
        len({i.node for i in group}) < len(group) or len(group) == 1 for group in shared
    )
    exists = [
        any(instance.num_devices > 1 for instance in instances),
        inside,
        len({instance.node for instance in instances}) > 1,
    ]
    wanted = max(1, sum(exists))
    found = {}
    for key, least in (("link_bw", 1e-9), ("link_latency", 0.0)):
        value = top.value(key)
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and len(values) not in (1, wanted):
            raise top.fail(
                key,
                f"must be one number, or exactly {wanted}: one per level of the "
                f"network; got {len(values)}",
            )
        for number in values:
            if not is_number(number) or not least <= number < float("inf"):
                what = "above 0" if least else "0 or more"
                raise top.fail(key, f"must be numbers {what}; got {number!r}.")
        found[key] = values
    if isinstance(top.value("link_bw"), list) != isinstance(
        top.value("link_latency"), list
    ):
        raise top.fail(
            "link_latency",
            "both of link_bw and link_latency must be one number, or both lists",
        )
    levels, taken = [], 0
    for present in exists:
        position = min(taken, wanted - 1)
        levels.append(
            LinkLevel(
                *(values[min(position, len(values) - 1)] for values in found.values())
            )
        )
        taken += present
    return levels[0], levels[1], levels[2]
