"""What all ranks use, from what each of them found out: pure, the same everywhere."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from mlx_ep.rows import Backend, Option
from mlx_ep.tune.cache import cache_key, read_findings, write_findings
from mlx_ep.tune.check import CHECKS_VERSION, Finding, measure
from mlx_ep.tune.choose import MLX_OWN, Choice
from mlx_ep.tune.problem import Problem

BACKEND_VARIABLE = "MLX_EP_BACKEND"

# What one rank knows of its options, as JSON can hold it: why some are impossible
# there, and what the warm-up found out about others.
OptionFacts = Mapping[str, Any]


def facts(problem: Problem, warmup: bool, sharing: int) -> OptionFacts:
    """What this rank knows of its options: measured here, or at an earlier start.

    Args:
        warmup: whether options are checked and timed.
        sharing: ranks on this host.
    """
    if not problem.is_held:
        return {"impossible": {}, "results": {}}
    found = problem.options()
    possible = [option for option, why in found.items() if not why]
    results: Mapping[str, Finding] = {}
    if warmup and problem.is_worth_checking(possible):
        key = cache_key(
            {
                **problem.key,
                "checks": CHECKS_VERSION,
                "options": [str(option) for option in possible],
                "ranks_on_host": sharing,
            }
        )
        results = read_findings(key) or {}
        if not results:
            results = {str(o): f for o, f in measure(problem, possible).items()}
            write_findings(key, results)
    return {
        "impossible": {str(option): why for option, why in found.items() if why},
        "results": {name: finding.to_json() for name, finding in results.items()},
    }


def agree(
    problem: Problem, ranks: Sequence[OptionFacts], backend: Backend | None = None
) -> Choice:
    """What the ranks do a problem with: a pure function of what they found out.

    Args:
        problem: the same on all ranks, but for the weights.
        ranks: the facts of each rank, in rank order.
        backend: the one that is forced.

    Raises:
        ValueError: nothing that is allowed is possible and right on all ranks.
    """
    results = [
        {name: Finding.from_json(found) for name, found in rank["results"].items()}
        for rank in ranks
    ]
    excluded = _excluded(problem.runner, backend)
    possible, left_out, wrong = [], {}, []
    for option in problem.options():
        name = str(option)
        whys = [rank["impossible"].get(name, "") for rank in ranks]
        failed = [found.get(name, Finding()).left_out for found in results]
        # Who asks for MLX's own gets it, with MLX's own precision.
        if problem.runner not in MLX_OWN:
            whys = [a or b for a, b in zip(whys, failed, strict=True)]
        if any(failed):
            wrong.append(option)
        if why := _joined(whys) or excluded(option):
            left_out[option] = why
        else:
            possible.append(option)
    if not possible:
        raise ValueError(_impossible(problem, left_out, backend))
    # Rank 0 may hold no expert where there are more ranks than experts.
    timed = next((found for found in results if found), {})
    measured = {
        option: timed[str(option)]
        for option in possible
        if str(option) in timed and timed[str(option)].sizes
    }
    if len(measured) < len(possible):
        measured = {}
    is_forced = backend is not None or problem.runner != "auto"
    return Choice(
        problem.title,
        tuple(possible),
        left_out,
        measured,
        tuple(wrong),
        is_forced,
        problem,
    )


def warn_of_wrong(choice: Choice) -> None:
    """Name what this package does wrongly here, and so does not use."""
    for option in choice.wrong:
        # MLX's own are known to sum 16-bit rows in 16 bits on a CPU: no surprise.
        if option in choice.left_out and option.runner != "gather":
            warnings.warn(
                f"{choice.title}: {option} is left out, because "
                f"{choice.left_out[option]}.",
                stacklevel=3,
            )


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


def _excluded(runner: str, backend: Backend | None) -> Callable[[Option], str]:
    """Why the configuration does not allow an option, or ""."""

    def why(option: Option) -> str:
        if backend not in (None, option.backend):
            return f"backend {backend} is forced"
        if runner not in ("auto", option.runner):
            return f"runner {runner} is forced"
        return ""

    return why


def _impossible(
    problem: Problem, left_out: Mapping[Option, str], backend: Backend | None
) -> str:
    reasons = "; ".join(f"{option}: {why}" for option, why in left_out.items())
    return (
        f"Nothing can {problem.task} with runner={problem.runner!r} and "
        f"backend={backend or 'auto'!r} ({reasons}). Use runner='auto' and "
        "backend='auto'."
    )


def _joined(whys: Sequence[str]) -> str:
    """One reason where all ranks agree, else each with its ranks."""
    different = sorted(set(whys))
    if len(different) == 1:
        return different[0]
    return "; ".join(f"rank {r}: {why}" for r, why in enumerate(whys) if why)
