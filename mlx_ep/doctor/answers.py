"""Answers to what goes wrong on clusters, out of what was found. Pure.

Each answer is sentences; the numbers in them are those of this run.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ep.cost.expected import expected_distinct
from mlx_ep.doctor.facts import MachineFacts
from mlx_ep.measure import Check
from mlx_ep.measure.links import LinkTime
from mlx_ep.metrics import format_bytes

# Qwen3-30B-A3B and its kind: what the examples are computed for.
EXPERTS, TOP_K, LAYERS = 128, 8, 48
UNEQUAL = 1.25  # ranks whose experts take so much longer than the fastest's


def is_wrong(check: Check) -> bool:
    """Whether it must not be relied on; MLX's own precision is only reported."""
    return check.is_ours and not check.is_right


def answers(
    facts: Sequence[MachineFacts],
    checks: Sequence[Sequence[Check]],
    links: Sequence[LinkTime],
    model_problem: str,
) -> dict[str, list[str]]:
    """What to look at, by question."""
    return {
        "backend not working": _backend(facts, checks, model_problem),
        "poor load balance": _balance(facts, checks),
        "low throughput": _throughput(facts, checks, links),
    }


def _backend(
    facts: Sequence[MachineFacts], checks: Sequence[Sequence[Check]], model_problem: str
) -> list[str]:
    found = []
    first = facts[0]
    if first["transport"] == "none":
        found.append(
            "One rank, no transport: nothing between ranks was tried. Start it with "
            "mlx_ep.launch -n 2 or --hostfile."
        )
    else:
        wrong = {
            check.what.split()[0]
            for rank in checks
            for check in rank
            if check.num_bytes and is_wrong(check)
        }
        said = f"wrong: {', '.join(sorted(wrong))}" if wrong else "all right"
        found.append(
            f"{first['transport']} connects {first['size']} ranks; its collectives are "
            f"{said}."
        )
    hosts = {rank["host_id"] for rank in facts}
    if len(hosts) > 1 and first["transport"] == "ring" and _are_apple(facts):
        found.append(
            "The ring goes over TCP. Macs with Thunderbolt 5 have JACCL, with about a "
            "tenth of the latency: rdma_ctl enable in recovery, --backend jaccl."
        )
    versions = {str(rank["versions"]) for rank in facts}
    if len(versions) > 1:
        found.append("Versions differ: install the same ones on every host.")
    for rank in facts:
        if not rank["metal"] and rank["system"].startswith("Darwin"):
            found.append(
                f"Rank {rank['rank']} does not compute through Metal: its Python is "
                "for x86, or MLX's device is the CPU."
            )
        if rank["variables"].get("MLX_METAL_FAST_SYNCH", "0") not in ("", "0"):
            found.append(
                f"Rank {rank['rank']} has MLX_METAL_FAST_SYNCH set, which can hang its "
                "GPU. Unset it."
            )
    if model_problem:
        found.append(f"The model: {model_problem.splitlines()[0]}")
    return found


def _balance(
    facts: Sequence[MachineFacts], checks: Sequence[Sequence[Check]]
) -> list[str]:
    num_ranks = len(facts)
    if num_ranks == 1:
        return ["One rank has all experts: there is nothing to balance."]
    busiest = expected_distinct(EXPERTS, TOP_K, 1, num_ranks)
    even = TOP_K / num_ranks
    found = [
        f"By chance: with {TOP_K} of {EXPERTS} experts a token makes the busiest of "
        f"{num_ranks} ranks read {busiest:.1f} where even would be {even:.1f}, "
        f"{busiest / even:.2f} times as many. --replica-memory lowers it."
    ]
    times = experts_seconds(checks)
    if all(times):
        ratio = max(times) / min(times)
        slow, fast = times.index(max(times)), times.index(min(times))
        text = (
            f"By speed: the same experts take {max(times) * 1e3:.2f} ms on rank {slow} "
            f"and {min(times) * 1e3:.2f} ms on rank {fast}, {ratio:.2f} times as long."
        )
        if ratio > UNEQUAL:
            text += (
                " They share a host: what else runs there, not its speed."
                if facts[slow]["host_id"] == facts[fast]["host_id"]
                else " Give the slower less: --memory, or --placement with a file."
            )
        found.append(text)
    limits = [rank["limit_bytes"] for rank in facts]
    if max(limits) > UNEQUAL * min(limits):
        found.append(
            f"By memory: {format_bytes(min(limits))} to {format_bytes(max(limits))} a "
            "rank. Without --memory all ranks hold the same number of experts."
        )
    found.append(
        "By your prompts: mlx_ep.generate --record FILE.npz, then mlx_ep.plan --record "
        "FILE.npz --plot shows the load of every rank, --placement FILE.npz evens it."
    )
    return found


def _throughput(
    facts: Sequence[MachineFacts],
    checks: Sequence[Sequence[Check]],
    links: Sequence[LinkTime],
) -> list[str]:
    found = []
    reduce_seconds = _slowest(checks, "all_reduce")
    experts = experts_seconds(checks)
    if reduce_seconds:
        step = LAYERS * reduce_seconds
        found.append(
            f"A small all_reduce takes {reduce_seconds * 1e6:.0f} us. With one in each "
            f"of {LAYERS} MoE layers that is {step * 1e3:.1f} ms a token, so at most "
            f"{1 / step:.0f} tokens/s of one sequence, whatever computes."
        )
        if all(experts) and reduce_seconds > max(experts):
            found.append(
                f"That is more than the experts of a layer take "
                f"({max(experts) * 1e3:.2f} ms): the link is what counts here. Several "
                "sequences at once share it (--prompts-file)."
            )
    slow = [link for link in links if link.is_slow]
    for link in slow:
        ends = " and ".join(map(str, link.ranks))
        late, wide = link.expected_latency or 0.0, link.expected_bandwidth or 0.0
        given = "-" if link.bandwidth is None else f"{link.bandwidth / 1e9:.2f}"
        found.append(
            f"The link of ranks {ends} is slow: {link.latency * 1e6:.0f} us and "
            f"{given} GB/s, expected {late * 1e6:.0f} us and "
            f"{wide / 1e9:.1f} GB/s ({link.source}). Look at the cable, the port, and "
            "which address the hostfile names."
        )
    if links and not slow:
        known = any(link.expected_latency is not None for link in links)
        found.append(
            "The links give what their transport should."
            if known
            else "Of the links there is no expectation here; compare them with others."
        )
    for host in dict.fromkeys(rank["host_id"] for rank in facts):
        here = [rank for rank in facts if rank["host_id"] == host]
        if len(here) > here[0]["cores"]:
            found.append(
                f"{here[0]['host']} has {len(here)} ranks on {here[0]['cores']} cores: "
                "they wait for each other."
            )
        elif here[0]["load_average"] > here[0]["cores"] + len(here):
            found.append(
                f"{here[0]['host']} had a load of {here[0]['load_average']} on "
                f"{here[0]['cores']} cores when this began: something else runs."
            )
    for rank in facts:
        if rank["available_bytes"] < 0.2 * rank["memory_bytes"]:
            found.append(
                f"Rank {rank['rank']}: {format_bytes(rank['available_bytes'])} of "
                f"{format_bytes(rank['memory_bytes'])} memory are free: swapping is "
                "slow."
            )
        wired = rank["wired_limit_mb"]
        if wired and wired * 1e6 > 0.85 * rank["memory_bytes"]:
            found.append(
                f"Rank {rank['rank']}: iogpu.wired_limit_mb is {wired}, above 0.85 of "
                "the memory, which Macs are reported to collapse with; set about 0.75."
            )
    return found or ["Nothing here says why."]


def experts_seconds(checks: Sequence[Sequence[Check]]) -> list[float]:
    """Of every rank, its fastest right way to run packed experts; 0: none."""
    return [
        min(
            (
                c.seconds
                for c in rank
                if c.what.startswith("experts") and "4 bit" in c.what and c.is_right
            ),
            default=0.0,
        )
        for rank in checks
    ]


def _slowest(checks: Sequence[Sequence[Check]], name: str) -> float:
    """Of the smallest size of a collective, the slowest rank."""
    times = [
        min((c for c in rank if c.what.startswith(name)), key=lambda c: c.num_bytes)
        for rank in checks
        if any(c.what.startswith(name) for c in rank)
    ]
    return max((check.seconds for check in times), default=0.0)


def _are_apple(facts: Sequence[MachineFacts]) -> bool:
    return all(rank["chip"].startswith("Apple") for rank in facts)
