"""What packs and sums the rows of a model, alike on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ep.rows import Backend, Job, Option, movement_options
from mlx_ep.tune.agree import Agreed, agree
from mlx_ep.tune.cache import cache_key, read_cache, write_cache
from mlx_ep.tune.choose import Measured, default_movement
from mlx_ep.tune.warmup import WARMUP_VERSION
from mlx_ep.tune.warmup_movement import MovementShape, measure_movement


@dataclass(frozen=True)
class JobPolicy:
    """Which movement does one job.

    Attributes:
        possible: the options that every rank has, and that are right.
        left_out: the others, with the reason.
        measured: times of rank 0 by the tokens of a call; none: nothing was measured.
    """

    possible: tuple[Option, ...]
    left_out: Mapping[Option, str]
    measured: Mapping[Option, Measured]

    def predicted(self, option: Option, num_tokens: int) -> float:
        """Seconds of a call."""
        return self.measured[option].per_slot(num_tokens)

    def choose(self, num_tokens: int, row_bytes: int) -> Option:
        """What does a call of so many tokens; the same on every rank."""
        if not self.measured:
            return default_movement(num_tokens, row_bytes, self.possible)
        # `min` takes the first of equals, and `possible` has one order on all ranks.
        return min(self.possible, key=lambda o: self.predicted(o, num_tokens))


@dataclass(frozen=True)
class MovementPolicy:
    """Which movement does which job, for rows of one shape.

    Attributes:
        name: the shape, for a person.
        width: D.
        itemsize: bytes of a number of a row.
        top_k: K.
        jobs: the choice for each job.
        forced: a backend is forced by the configuration or MLX_EP_BACKEND.
    """

    name: str
    width: int
    itemsize: int
    top_k: int
    jobs: Mapping[Job, JobPolicy]
    forced: bool

    @property
    def row_bytes(self) -> int:
        return self.width * self.itemsize

    def choose(self, job: Job, num_tokens: int) -> Option:
        """A `MovementChoice`."""
        return self.jobs[job].choose(num_tokens, self.row_bytes)


def movement_facts(
    shape: MovementShape, warmup: bool, sharing: int
) -> dict[Job, dict[str, Any]]:
    """What this rank knows of its options, by job; anything JSON can hold.

    Where there is one option only, as without Metal, nothing is measured.

    Args:
        warmup: whether options are checked and timed.
        sharing: ranks on this host.
    """
    found = movement_options(shape.width, shape.placement)
    possible = [option for option, why in found.items() if not why]
    impossible = {str(option): why for option, why in found.items() if why}
    results: dict[Job, Mapping[str, Any]] = {job: {} for job in shape.jobs}
    if warmup and len(possible) > 1:
        key = cache_key(
            {
                "movement": shape.name,
                "checks": WARMUP_VERSION,
                "jobs": list(shape.jobs),
                "experts": shape.placement.num_experts,
                "placement": shape.placement.digest,
                "rank": shape.rank,
                "options": [str(option) for option in possible],
                "ranks_on_host": sharing,
            }
        )
        stored = read_cache(key)
        if not stored:
            stored = {}
            for job in shape.jobs:
                measured = measure_movement(shape, job, possible)
                stored[job] = {str(o): r.to_json() for o, r in measured.items()}
            write_cache(key, stored)
        results = {job: stored[job] for job in shape.jobs}
    return {
        job: {"impossible": impossible, "results": results[job]} for job in shape.jobs
    }


def agree_movement(
    shape: MovementShape,
    ranks: Sequence[Mapping[str, Any]],
    backend: Backend | None,
) -> tuple[MovementPolicy, dict[Job, Agreed]]:
    """The policy that follows from the facts of all ranks: a pure function of them.

    Raises:
        ValueError: nothing on the backend that is forced can move the rows.
    """

    def excluded(option: Option) -> str:
        is_other = backend not in (None, option.backend)
        return f"backend {backend} is forced" if is_other else ""

    options = movement_options(shape.width, shape.placement)
    agreed, jobs = {}, {}
    for job in shape.jobs:
        found = agree(options, [rank[job] for rank in ranks], excluded)
        if not found.possible:
            reasons = "; ".join(f"{o}: {why}" for o, why in found.left_out.items())
            raise ValueError(
                f"Nothing can move the rows of {shape.name} with backend="
                f"{backend or 'auto'!r} ({reasons}). Use backend='auto'."
            )
        agreed[job] = found
        jobs[job] = JobPolicy(found.possible, found.left_out, found.measured)
    policy = MovementPolicy(
        name=shape.name,
        width=shape.width,
        itemsize=shape.dtype.size,
        top_k=shape.top_k,
        jobs=jobs,
        forced=backend is not None,
    )
    return policy, agreed
