"""Sets what runs the experts of a model, alike on all ranks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ep.comm import Comm, Transport, gather_objects, host_id
from mlx_ep.exchange import Strategy
from mlx_ep.experts import expert_weights, limit_blas_threads, options, switch_runner
from mlx_ep.placement import Placement
from mlx_ep.rows import Backend, MovesRows, Option
from mlx_ep.tune.agree import Agreed, agree, backend_variable, forced_backend
from mlx_ep.tune.cache import cache_key, read_cache, write_cache
from mlx_ep.tune.choose import ExpertsPolicy
from mlx_ep.tune.explain import explain, explain_exchange, explain_movement
from mlx_ep.tune.layer import Layer, Wish
from mlx_ep.tune.move import (
    MovementPolicy,
    MovementShape,
    agree_movement,
    movement_facts,
)
from mlx_ep.tune.warmup import WARMUP_VERSION, measure


@dataclass(frozen=True)
class ModelPolicy:
    """What runs the experts of a model, by the shape of the layers.

    Attributes:
        shapes: of experts.
        top_k: K of each of them.
        movement: what packs and sums rows, by their shape; the first one's is the
            exchange's.
        strategy: what exchanges rows; None: the caller has not said.
        num_ranks: P.
        transport: what carries the rows.
    """

    shapes: tuple[ExpertsPolicy, ...]
    top_k: tuple[int, ...]
    movement: tuple[MovementPolicy, ...] = ()
    strategy: Strategy | None = None
    num_ranks: int = 1
    transport: Transport = "none"

    def explain(self, num_tokens: Iterable[int] = (1, 16, 64, 256, 1024)) -> str:
        """Every option with its times; see `mlx_ep.tune.explain`."""
        counts = list(num_tokens)
        pairs = list(zip(self.shapes, self.top_k, strict=True))
        parts = [explain(shape, top_k, counts) for shape, top_k in pairs]
        parts += [explain_movement(policy, counts) for policy in self.movement]
        if self.strategy is not None and self.movement:
            rows = self.movement[0]
            parts.append(
                explain_exchange(
                    self.strategy, rows, self.num_ranks, self.transport, counts
                )
            )
        return "\n\n".join(part for part in parts if part)


def tune(
    layers: Sequence[Layer],
    num_experts: int,
    comm: Comm,
    wish: Wish = Wish(),  # noqa: B008, it is frozen
    *,
    strategy: Strategy | None = None,
    placement: Placement | None = None,
) -> ModelPolicy:
    """Decide for every layer what runs its experts and moves its rows.

    Every rank must call it. Each rank checks and times the options on its own weights,
    unless the cache knows them. An option that is impossible or wrong on any rank is
    used by none; the times are those of rank 0. Two exchanges, of a few hundred bytes
    per shape, always. Ranks on one host share its cores: see `limit_blas_threads`.

    Args:
        layers: of the model, in one order on all ranks.
        num_experts: E.
        comm: the ranks.
        wish: what the user asks for.
        strategy: what exchanges rows; its mover is set, where it has one.
        placement: of the experts; default: contiguous.

    Raises:
        ValueError: on every rank: what the configuration forces is impossible.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(str(layer.shape), []).append(layer)
    firsts = [group[0] for group in groups.values()]
    placement = placement or Placement.contiguous(num_experts, comm.size)
    exchanges = isinstance(strategy, MovesRows) and comm.size > 1
    moved = _movement_shapes(firsts, placement, comm.rank, exchanges)
    sharing = share_cores(comm)
    mine = {
        "backend": backend_variable(),
        "shapes": [_facts(layer, wish, sharing) for layer in firsts],
        "movement": [
            movement_facts(shape, wish.warmup, sharing) for shape in moved.values()
        ],
    }
    ranks = gather_objects(comm, mine)
    backend = forced_backend([rank["backend"] for rank in ranks], wish.backend)
    policies = []
    for index, group in enumerate(groups.values()):
        facts = [rank["shapes"][index] for rank in ranks]
        agreed = _agree(group[0], facts, backend, wish)
        forced = backend is not None or wish.runner != "auto"
        policy = _experts_policy(group[0], agreed, len(ranks), num_experts, forced)
        policies.append(policy)
        for layer in group:
            switch_runner(layer.switch).choose = policy.choose
        if comm.rank == 0:
            _warn_of_wrong(f"Experts of {policy.name}", agreed)
    movement = _set_movement(layers, moved, ranks, backend, comm)
    if exchanges and movement and isinstance(strategy, MovesRows):
        strategy.mover.choose = movement[0].choose
    return ModelPolicy(
        tuple(policies),
        tuple(first.top_k for first in firsts),
        movement,
        strategy,
        comm.size,
        comm.transport,
    )


def _set_movement(
    layers: Sequence[Layer],
    moved: Mapping[str, MovementShape],
    ranks: Sequence[Mapping[str, Any]],
    backend: Backend | None,
    comm: Comm,
) -> tuple[MovementPolicy, ...]:
    """What moves the rows of each shape, set for its layers' pairs."""
    policies = {}
    for index, (key, shape) in enumerate(moved.items()):
        facts = [rank["movement"][index] for rank in ranks]
        policies[key], by_job = agree_movement(shape, facts, backend)
        if comm.rank == 0:
            for job, agreed in by_job.items():
                _warn_of_wrong(f"Movement of {shape.name}, {job}", agreed)
    for layer in layers:
        if found := policies.get(layer.moved_as):
            switch_runner(layer.switch).mover.choose = found.choose
    return tuple(policies.values())


def _movement_shapes(
    firsts: Sequence[Layer], placement: Placement, rank: int, exchanges: bool
) -> dict[str, MovementShape]:
    return {
        key: MovementShape(
            width=int(layer.shape["width"]),
            dtype=layer.dtype,
            top_k=layer.top_k,
            placement=placement,
            rank=rank,
            exchanges=exchanges,
        )
        for layer in firsts
        if (key := layer.moved_as)
    }


def share_cores(comm: Comm) -> int:
    """How many ranks this host has; each gets its share of the cores for NumPy.

    Every rank must call it.
    """
    host = host_id()
    sharing = gather_objects(comm, host).count(host)
    if sharing > 1:
        limit_blas_threads(max(1, (os.cpu_count() or 1) // sharing))
    return sharing


def _facts(layer: Layer, wish: Wish, sharing: int) -> dict[str, Any]:
    """What this rank knows of a shape, for all ranks; anything JSON can hold."""
    weights = expert_weights(layer.switch)
    if weights is not None and not weights.num_slots:
        return {"holds": 0, "impossible": {}, "results": {}}
    found = options(layer.switch)
    possible = [option for option, why in found.items() if not why]
    results: Mapping[str, Any] = {}
    if wish.warmup and weights is not None:
        shape = {**layer.shape, "slots": min(weights.num_slots, layer.top_k)}
        shape["checks"] = WARMUP_VERSION
        shape |= {"options": [str(o) for o in possible], "ranks_on_host": sharing}
        key = cache_key(shape)
        results = read_cache(key) or {}
        if not results:
            measured = measure(layer.switch, layer.dtype, layer.top_k, possible)
            results = {str(o): result.to_json() for o, result in measured.items()}
            write_cache(key, results)
    impossible = {str(option): why for option, why in found.items() if why}
    return {"holds": 1, "impossible": impossible, "results": results}


def _agree(
    layer: Layer,
    facts: Sequence[Mapping[str, Any]],
    backend: Backend | None,
    wish: Wish,
) -> Agreed:
    """What the ranks can run the experts of a shape with.

    Raises:
        ValueError: nothing.
    """

    def excluded(option: Option) -> str:
        if backend not in (None, option.backend):
            return f"backend {backend} is forced"
        if wish.runner not in ("auto", option.runner):
            return f"runner {wish.runner} is forced"
        return ""

    # Who asks for MLX's own gets it, with MLX's own precision.
    checks_count = wish.runner != "gather"
    found = agree(options(layer.switch), facts, excluded, checks_count=checks_count)
    if not found.possible:
        raise ValueError(_impossible(layer, found.left_out, backend, wish))
    return found


def _experts_policy(
    layer: Layer, agreed: Agreed, num_ranks: int, num_experts: int, forced: bool
) -> ExpertsPolicy:
    return ExpertsPolicy(
        name=layer.title,
        num_experts=num_experts,
        num_ranks=num_ranks,
        row_bytes=layer.dtype.size * int(layer.shape.get("width", 0)),
        possible=agreed.possible,
        left_out=agreed.left_out,
        measured=agreed.measured,
        forced=forced,
    )


def _impossible(
    layer: Layer,
    left_out: Mapping[Option, str],
    backend: Backend | None,
    wish: Wish,
) -> str:
    reasons = "; ".join(f"{option}: {why}" for option, why in left_out.items())
    return (
        f"Nothing can run the experts of {layer.title} with runner="
        f"{wish.runner!r} and backend={backend or 'auto'!r} ({reasons}). Use "
        "runner='auto' and backend='auto'."
    )


def _warn_of_wrong(what: str, agreed: Agreed) -> None:
    for option in agreed.wrong:
        # MLX's own are known to sum 16-bit rows in 16 bits on a CPU: no surprise.
        if option in agreed.left_out and option.runner != "gather":
            warnings.warn(
                f"{what}: {option} is left out, because {agreed.left_out[option]}.",
                stacklevel=3,
            )
