"""What all ranks use, from what each of them found out: pure, the same everywhere."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from mlx_ep.rows import Backend, Option
from mlx_ep.tune.choose import Measured
from mlx_ep.tune.warmup import Result

BACKEND_VARIABLE = "MLX_EP_BACKEND"

# What one rank knows of its options, as JSON can hold it: why some are impossible
# there, and what the warm-up found out about others.
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Agreed:
    """What the ranks agree on.

    Attributes:
        possible: the options that every rank has, that are right on all of them and
            that the configuration allows.
        left_out: the others, with the reason.
        measured: times of the first rank that has any; empty unless of all possible.
        wrong: those that are left out because a check failed.
    """

    possible: tuple[Option, ...]
    left_out: Mapping[Option, str]
    measured: Mapping[Option, Measured]
    wrong: tuple[Option, ...]


def agree(
    options: Iterable[Option],
    ranks: Sequence[Facts],
    excluded: Callable[[Option], str],
    *,
    checks_count: bool = True,
) -> Agreed:
    """Which options all ranks use.

    Args:
        options: in one order on all ranks.
        ranks: the facts of each rank, in rank order.
        excluded: why the configuration does not allow an option, or "".
        checks_count: whether an option that is wrong is left out.
    """
    results = [
        {name: result_from_json(found) for name, found in rank["results"].items()}
        for rank in ranks
    ]
    possible, left_out, wrong = [], {}, []
    for option in options:
        name = str(option)
        whys = [rank["impossible"].get(name, "") for rank in ranks]
        failed = [found.get(name, Result()).left_out for found in results]
        if checks_count:
            whys = [a or b for a, b in zip(whys, failed, strict=True)]
        if any(failed):
            wrong.append(option)
        if why := _joined(whys) or excluded(option):
            left_out[option] = why
        else:
            possible.append(option)
    # Rank 0 may hold no expert where there are more ranks than experts.
    timed = next((found for found in results if found), {})
    measured = {
        option: Measured(timed[str(option)].rows, timed[str(option)].seconds)
        for option in possible
        if str(option) in timed and timed[str(option)].rows
    }
    if len(measured) < len(possible):
        measured = {}
    return Agreed(tuple(possible), left_out, measured, tuple(wrong))


def forced_backend(variables: Sequence[str], configured: str) -> Backend | None:
    """What rank 0's environment says, else the configuration; None: neither.

    Args:
        variables: MLX_EP_BACKEND of every rank, "" where it is not set.
        configured: the field `backend` of the configuration.

    Raises:
        ValueError: it is none of the backends.
    """
    wanted = variables[0] or configured
    if any(variable != variables[0] for variable in variables):
        warnings.warn(
            f"{BACKEND_VARIABLE} differs between ranks ({', '.join(variables)}); rank "
            "0's is used on all.",
            stacklevel=4,
        )
    for backend in get_args(Backend):
        if wanted == backend:
            return backend
    if wanted != "auto":
        raise ValueError(
            f"{BACKEND_VARIABLE} must be cpu, metal or auto; got {wanted!r}."
        )
    return None


def backend_variable() -> str:
    """MLX_EP_BACKEND of this process, or ""."""
    return os.environ.get(BACKEND_VARIABLE, "")


def result_from_json(found: Mapping[str, Any]) -> Result:
    """What `Result.to_json` gave."""
    times = {name: tuple(found[name]) for name in ("rows", "seconds")}
    return Result(**{**found, **times})


def _joined(whys: Sequence[str]) -> str:
    """One reason where all ranks agree, else each with its ranks."""
    different = sorted(set(whys))
    if len(different) == 1:
        return different[0]
    return "; ".join(f"rank {r}: {why}" for r, why in enumerate(whys) if why)
