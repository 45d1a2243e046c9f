"""Whether the dense part is replicated or split over the ranks: by fit, then by time.

Pure. What differs between the two in one step of one token is

    replicated   split bytes / memory bandwidth
    tensor       split bytes / (P * memory bandwidth) + collectives * latency

where the split bytes are those of the weights that mlx-lm's `shard` splits, and the
collectives those that attention and dense layers then need. What the two have in
common (experts, their collectives, layers that stay whole) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlx_ep.types import LMHead


class Speeds(NamedTuple):
    """What a choice is computed from.

    Attributes:
        bandwidth: of the memory of one rank, bytes/s.
        latency: of one small all_sum over all ranks, s.
        source: where the two come from, for a person.
        is_measured: on this cluster, by all its ranks together.
    """

    bandwidth: float
    latency: float
    source: str
    is_measured: bool = False


# A Mac between M-Max and M-Ultra, and a hop over the CPU for each collective on Metal.
ASSUMED = Speeds(400e9, 200e-6, "assumed: no profile of this machine is known")


def cluster_speeds(ranks: Sequence[Speeds]) -> Speeds:
    """What holds for a cluster: what was measured on it, else the slowest of its ranks.

    Args:
        ranks: what every rank knows, in rank order; a measurement counts on rank 0,
            which keeps it.
    """
    if ranks[0].is_measured:
        return ranks[0]
    return Speeds(
        min(rank.bandwidth for rank in ranks),
        max(rank.latency for rank in ranks),
        "; ".join(sorted({rank.source for rank in ranks})),
    )


@dataclass(frozen=True)
class AttentionChoice:
    """How the dense part runs, and why.

    Attributes:
        attention: ``replicated`` or ``tensor``.
        reason: for a person.
        replicated_seconds: predicted, of what differs in a step of one token; None
            where nothing was predicted.
        tensor_seconds: likewise.
        lm_head: what is asked of `split_dense` about it; ``whole`` where the dense part
            is.
    """

    attention: str
    reason: str
    replicated_seconds: float | None = None
    tensor_seconds: float | None = None
    lm_head: LMHead = "whole"

    def __str__(self) -> str:
        return f"attention: {self.attention} ({self.reason})"


REPLICATED = AttentionChoice("replicated", "as asked for")


def choose_attention(
    wish: str,
    *,
    num_ranks: int,
    problem: str,
    split_bytes: int,
    collectives: int,
    fits_replicated: bool,
    fits_tensor: bool,
    speeds: Speeds = ASSUMED,
) -> AttentionChoice:
    """What every rank takes, given the same arguments.

    Args:
        wish: ``replicated``, ``tensor`` or ``auto``.
        num_ranks: P.
        problem: why the model cannot be split, or "".
        split_bytes: of the weights that would be split, whole.
        collectives: of a step beside those of the MoE layers, when they are.
        fits_replicated: whether all ranks' weights fit, with the dense part whole.
        fits_tensor: whether they do when it is split.
        speeds: of the slowest rank.

    Raises:
        ValueError: `tensor` is wished and cannot be.
    """
    if wish == "replicated":
        return REPLICATED
    if wish == "tensor":
        if problem:
            raise ValueError(problem)
        return AttentionChoice("tensor", "as asked for")
    if problem:
        return AttentionChoice("replicated", problem)
    whole = split_bytes / speeds.bandwidth
    split = whole / num_ranks + collectives * speeds.latency
    if num_ranks == 1:
        return AttentionChoice("replicated", "there is one rank", whole, whole)
    times = (
        f"predicted per token, of what differs: replicated {whole * 1e3:.2f} ms, "
        f"tensor {split * 1e3:.2f} ms = {split_bytes / 1e9:.3g} GB over {num_ranks} "
        f"ranks at {speeds.bandwidth / 1e9:.0f} GB/s and {collectives} collectives of "
        f"{speeds.latency * 1e6:.0f} us; {speeds.source}"
    )
    if fits_tensor and not fits_replicated:
        return AttentionChoice(
            "tensor", f"replicated does not fit the memory; {times}", whole, split
        )
    # Where they are equal, the one that has fewer collectives to go wrong.
    chosen = "tensor" if split < whole else "replicated"
    return AttentionChoice(chosen, times, whole, split)
