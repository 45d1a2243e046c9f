"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_ep.loading.estimate import ModelOutline, RankNeed, Workload
from mlx_ep.metrics import aligned, format_bytes


def needs_table(needs: Sequence[RankNeed]) -> str:
    """One line a rank, in GB, and whether it fits."""
    rows: list[tuple[str, ...]] = [
        (
            "rank",
            "dense",
            "experts",
            "KV",
            "working",
            "total",
            "memory",
            "",
            "held",
        )
    ]
    for need in needs:
        cells = (
            need.dense_bytes,
            need.expert_bytes,
            need.cache_bytes,
            need.working_bytes,
            need.total_bytes,
        )
        rows.append(
            (
                str(need.rank),
                *map(_gigabytes, cells),
                "-" if need.memory is None else _gigabytes(need.memory),
                _verdict(need),
                _short(need.experts),
            )
        )
    return (
        aligned(rows, left=(7, 8)) + "\n(GB, 10^9 bytes; held: experts of every layer)"
    )


def _gigabytes(num_bytes: int) -> str:
    gigabytes = num_bytes / 1e9
    return f"{gigabytes:.2f}" if gigabytes >= 0.1 else f"{gigabytes:.4f}"


def _short(experts: str) -> str:
    """``0..7`` of "experts 0..7 (8 of 16 per layer)"."""
    held = experts.removeprefix("experts ")
    return held if "width" in held else held.partition(" (")[0]


def _verdict(need: RankNeed) -> str:
    if need.memory is None:
        return ""
    if need.missing_bytes > 0:
        return f"lacks {format_bytes(need.missing_bytes)}"
    return "fits"


def workload_lines(workload: Workload, growth: float) -> list[str]:
    """What is assumed of the use.

    Args:
        growth: bytes by which the caches of a sequence grow with each token there.
    """
    count = workload.sequences
    who = "1 sequence" if count == 1 else f"{count} sequences"
    quantized = ""
    if workload.quantization.kv_bits is not None:
        quantized = f", in {workload.quantization.kv_bits} bits"
    return [
        f"context: {who} of {workload.context} tokens; the KV cache of one grows by "
        f"{growth:.0f} bytes per token there{quantized}",
        f"dense part: {workload.attention}",
        f"working memory: an estimate for prefill in steps of {workload.step} tokens "
        "(docs/plan.md has the formula)",
    ]


def needs_json(
    model: ModelOutline, needs: Sequence[RankNeed], workload: Workload
) -> dict[str, Any]:
    """What `needs_table` says, exactly."""
    return {
        "model_type": model.config["model_type"],
        "num_experts": model.num_experts,
        "sizes_from": model.source,
        "context": workload.context,
        "sequences": workload.sequences,
        "attention": workload.attention,
        "kv_bits": workload.quantization.kv_bits,
        "prefill_step": workload.step,
        "ranks": [
            {
                "rank": need.rank,
                "experts": need.experts,
                "dense_bytes": need.dense_bytes,
                "expert_bytes": need.expert_bytes,
                "weight_bytes": need.weight_bytes,
                "cache_bytes": need.cache_bytes,
                "working_bytes": need.working_bytes,
                "total_bytes": need.total_bytes,
                "memory_bytes": need.memory,
                "fits": None if need.memory is None else need.missing_bytes <= 0,
            }
            for need in needs
        ],
    }
