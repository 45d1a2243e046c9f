"""A profile for a person."""

from __future__ import annotations

from mlx_ep.cost.profile import Profile
from mlx_ep.metrics import format_bytes


def profile_table(profile: Profile) -> str:
    """Its numbers in units that are easy to read, one line each."""
    lines = [profile.name, ""]
    numbers = {
        "memory_bandwidth": ("GB/s", 1e-9),
        "copy_bandwidth": ("GB/s", 1e-9),
        "matmul_rate": ("GFLOP/s", 1e-9),
        "expert_rate": ("GFLOP/s", 1e-9),
        "unsorted_rate": ("GFLOP/s", 1e-9),
        "attention_rate": ("GFLOP/s", 1e-9),
        "block_seconds": ("us", 1e6),
        "layer_seconds": ("us", 1e6),
        "step_seconds": ("us", 1e6),
        "sync_seconds": ("us", 1e6),
        "loop_seconds": ("us", 1e6),
        "loop_layer_seconds": ("us", 1e6),
        "sequence_seconds": ("us", 1e6),
        "logit_seconds": ("ns", 1e9),
        "query_seconds": ("ns", 1e9),
        "unseen_seconds": ("ns", 1e9),
        "score_seconds": ("ns", 1e9),
        "prompt_score_seconds": ("ns", 1e9),
        "element_seconds": ("ns", 1e9),
        "route_seconds": ("ns", 1e9),
    }
    for name, (unit, scale) in numbers.items():
        lines.append(f"{name:<18}{getattr(profile, name) * scale:>12.4g} {unit}")
    lines += ["", "ns per weight, by rows of an expert or matrix"]
    costs = {**profile.experts, **{f"dense|{k}": c for k, c in profile.dense.items()}}
    for key, cost in costs.items():
        points = zip(cost.rows, cost.seconds, strict=True)
        series = ", ".join(f"{rows:.0f}: {s * 1e9:.3g}" for rows, s in points)
        lines.append(f"{key.replace('|', ', ')}: {series}")
        if cost.call_seconds:
            lines.append(
                f"    and {cost.call_seconds * 1e6:.3g} us a call, "
                f"{cost.visit_seconds * 1e6:.3g} us an expert, "
                f"{cost.pair_seconds * 1e9:.3g} ns for each number of a row"
            )
    for name, link in profile.links.items():
        lines += ["", f"{name}, us by bytes that a rank hands over"]
        for operation, times in link.tables.items():
            points = zip(times.bytes, times.seconds, strict=True)
            series = ", ".join(f"{n:.0f}: {s * 1e6:.4g}" for n, s in points)
            lines.append(f"{operation}: {series}")
        lines.append(f"crossing: {link.crossing_seconds * 1e6:.3g} us a collective")
    lines += ["", f"memory_bytes {format_bytes(int(profile.memory_bytes))} a rank"]
    return "\n".join(lines)
