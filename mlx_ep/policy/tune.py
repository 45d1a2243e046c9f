"""Sets what runs the experts of a model, alike on all ranks."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn

from mlx_ep.comm import Comm, gather_objects
from mlx_ep.policy.cache import cache_key, read_cache, write_cache
from mlx_ep.policy.choose import ExpertsPolicy, Measured
from mlx_ep.policy.explain import explain
from mlx_ep.policy.warmup import Result, measure
from mlx_ep.runners import (
    Backend,
    Option,
    expert_weights,
    limit_blas_threads,
    options,
    switch_runner,
)

BACKEND_VARIABLE = "MLX_EP_BACKEND"


@dataclass(frozen=True)
class Wish:
    """What the user asks for.

    Attributes:
        runner: a name in `RUNNERS` that has to be taken, or ``"auto"``.
        backend: ``"cpu"`` or ``"metal"``, or ``"auto"``; MLX_EP_BACKEND goes first.
        warmup: whether options are checked and timed; else the default rule holds.
    """

    runner: str = "auto"
    backend: str = "auto"
    warmup: bool = True


@dataclass(frozen=True)
class Layer:
    """A switch and what its router gives it.

    Attributes:
        dtype: of the rows.
        top_k: K.
    """

    switch: nn.Module
    dtype: mx.Dtype
    top_k: int

    @property
    def shape(self) -> dict[str, Any]:
        """What layers with the same policy have in common, on all ranks."""
        weights = expert_weights(self.switch)
        dtype = str(self.dtype).removeprefix("mlx.core.")
        shape: dict[str, Any] = {"rows": dtype, "top_k": self.top_k}
        if weights is None:
            return {"form": type(self.switch).__name__, **shape}
        return {
            "form": type(weights.activation).__name__,
            "width": weights.up.columns,
            "expert_width": weights.up.rows,
            "packings": [matrices.packing for matrices in weights.matrices],
            "bias": weights.up.bias is not None,
            **shape,
        }


@dataclass(frozen=True)
class ModelPolicy:
    """What runs the experts of a model, by the shape of the layers."""

    shapes: tuple[ExpertsPolicy, ...]
    top_k: tuple[int, ...]

    def explain(self, num_tokens: Iterable[int] = (1, 16, 64, 256, 1024)) -> str:
        """Every option with its times; see `mlx_ep.policy.explain`."""
        counts = list(num_tokens)
        parts = zip(self.shapes, self.top_k, strict=True)
        return "\n\n".join(explain(shape, top_k, counts) for shape, top_k in parts)


def tune(
    layers: Sequence[Layer], num_experts: int, comm: Comm, wish: Wish = Wish()
) -> ModelPolicy:
    """Decide for every layer what runs its experts. Every rank must call it.

    Each rank checks and times the options on its own weights, unless the cache knows
    them. An option that is impossible or wrong on any rank is used by none; the times
    are those of rank 0. Two exchanges, of a few hundred bytes per shape, always. Ranks
    on one host share its cores: see `limit_blas_threads`.

    Args:
        layers: of the model, in one order on all ranks.
        num_experts: E.
        comm: the ranks.
        wish: what the user asks for.

    Raises:
        ValueError: on every rank: what the configuration forces is impossible.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(str(layer.shape), []).append(layer)
    firsts = [group[0] for group in groups.values()]
    sharing = share_cores(comm)
    mine = {
        "backend": os.environ.get(BACKEND_VARIABLE, ""),
        "shapes": [_facts(layer, wish, sharing) for layer in firsts],
    }
    ranks = gather_objects(comm, mine)
    backend = _forced_backend([rank["backend"] for rank in ranks], wish)
    policies = []
    for index, group in enumerate(groups.values()):
        facts = [rank["shapes"][index] for rank in ranks]
        policy = _agree(group[0], facts, backend, num_experts, wish)
        policies.append(policy)
        for layer in group:
            switch_runner(layer.switch).choose = policy.choose
        if comm.rank == 0:
            _warn_of_wrong(policy, facts)
    return ModelPolicy(tuple(policies), tuple(first.top_k for first in firsts))


def share_cores(comm: Comm) -> int:
    """How many ranks this host has; each gets its share of the cores for NumPy.

    Every rank must call it.
    """
    host = socket.gethostname()
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
        shape |= {"options": [str(o) for o in possible], "ranks_on_host": sharing}
        key = cache_key(shape)
        results = read_cache(key) or {}
        if not results:
            measured = measure(layer.switch, layer.dtype, layer.top_k, possible)
            results = {str(o): result.to_json() for o, result in measured.items()}
            write_cache(key, results)
    impossible = {str(option): why for option, why in found.items() if why}
    return {"holds": 1, "impossible": impossible, "results": results}


def _forced_backend(variables: Sequence[str], wish: Wish) -> Backend | None:
    """What rank 0's environment says, else the configuration; None: neither."""
    wanted = variables[0] or wish.backend
    if any(variable != variables[0] for variable in variables):
        warnings.warn(
            f"{BACKEND_VARIABLE} differs between ranks ({', '.join(variables)}); rank "
            "0's is used on all.",
            stacklevel=3,
        )
    for backend in get_args(Backend):
        if wanted == backend:
            return backend
    if wanted != "auto":
        raise ValueError(
            f"{BACKEND_VARIABLE} must be cpu, metal or auto; got {wanted!r}."
        )
    return None


def _agree(
    layer: Layer,
    facts: Sequence[Mapping[str, Any]],
    backend: Backend | None,
    num_experts: int,
    wish: Wish,
) -> ExpertsPolicy:
    """The policy that follows from the facts of all ranks: a pure function of them."""
    results = [
        {name: _result(found) for name, found in rank["results"].items()}
        for rank in facts
    ]
    possible, left_out = [], {}
    for option in options(layer.switch):
        name = str(option)
        whys = [rank["impossible"].get(name, "") for rank in facts]
        # Who asks for MLX's own gets it, with MLX's own precision.
        if wish.runner != "gather":
            wrong = [found.get(name, Result()).left_out for found in results]
            whys = [a or b for a, b in zip(whys, wrong, strict=True)]
        if why := _joined(whys):
            left_out[option] = why
        elif backend not in (None, option.backend):
            left_out[option] = f"backend {backend} is forced"
        elif wish.runner not in ("auto", option.runner):
            left_out[option] = f"runner {wish.runner} is forced"
        else:
            possible.append(option)
    if not possible:
        raise ValueError(_impossible(layer, left_out, backend, wish))
    # Rank 0 may hold no expert where there are more ranks than experts.
    timed = next((found for found in results if found), {})
    measured = {
        option: Measured(timed[str(option)].rows, timed[str(option)].seconds)
        for option in possible
        if str(option) in timed and timed[str(option)].rows
    }
    return ExpertsPolicy(
        name=_title(layer),
        num_experts=num_experts,
        num_ranks=len(facts),
        row_bytes=layer.dtype.size * int(layer.shape.get("width", 0)),
        possible=tuple(possible),
        left_out=left_out,
        measured=measured if len(measured) == len(possible) else {},
        forced=backend is not None or wish.runner != "auto",
    )


def _result(found: Mapping[str, Any]) -> Result:
    times = {name: tuple(found[name]) for name in ("rows", "seconds")}
    return Result(**{**found, **times})


def _joined(whys: Sequence[str]) -> str:
    """One reason where all ranks agree, else each with its ranks."""
    different = sorted(set(whys))
    if len(different) == 1:
        return different[0]
    return "; ".join(f"rank {r}: {why}" for r, why in enumerate(whys) if why)


def _impossible(
    layer: Layer,
    left_out: Mapping[Option, str],
    backend: Backend | None,
    wish: Wish,
) -> str:
    reasons = "; ".join(f"{option}: {why}" for option, why in left_out.items())
    return (
        f"Nothing can run the experts of {_title(layer)} with runner="
        f"{wish.runner!r} and backend={backend or 'auto'!r} ({reasons}). Use "
        "runner='auto' and backend='auto'."
    )


def _title(layer: Layer) -> str:
    shape = layer.shape
    if "width" not in shape:
        return f"{shape['form']}, {shape['rows']} rows"
    packings = " / ".join(dict.fromkeys(shape["packings"]))
    return (
        f"{shape['width']} x {shape['expert_width']}, {packings}, {shape['form']}, "
        f"{shape['rows']} rows, top {shape['top_k']}"
    )


def _warn_of_wrong(policy: ExpertsPolicy, facts: Sequence[Mapping[str, Any]]) -> None:
    wrong = {
        name for rank in facts for name, r in rank["results"].items() if r["left_out"]
    }
    for option, why in policy.left_out.items():
        # MLX's own are known to sum 16-bit rows in 16 bits on a CPU: no surprise.
        if str(option) in wrong and option.runner != "gather":
            warnings.warn(
                f"Experts of {policy.name}: {option} is left out, because {why}.",
                stacklevel=3,
            )
