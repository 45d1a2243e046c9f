"""The names of the strategies: those of this package, added ones, aliases."""

from __future__ import annotations

from typing import Literal, get_args

# The strategies of this package; `STRATEGIES.register` adds others.
StrategyName = Literal["replicated", "gathered", "all_to_all", "local", "auto"]
AllToAllMode = Literal["auto", "low_latency", "normal"]

_strategies = list(get_args(StrategyName))


def allow_strategy(name: str) -> None:
    """`EPConfig` takes a strategy of this name; `STRATEGIES.register` calls it."""
    if name not in _strategies:
        _strategies.append(name)


_REPLICATED = ["disabled", "none", "off", "standard", "0", "tp_ep", "vllm_tp", "dp1"]
_REPLICATED += ["local_allreduce", "local_all_reduce"]
_GATHERED = ["allgather_reducescatter", "all_gather_reduce_scatter", "naive", "ag_rs"]
# What SGLang, DeepEP, vLLM and InfiniLM call them -> (strategy, mode).
ALIASES: dict[str, tuple[str, AllToAllMode | None]] = {
    **dict.fromkeys(_REPLICATED, ("replicated", None)),
    **dict.fromkeys(_GATHERED, ("gathered", None)),
    **dict.fromkeys(["deepep", "deep_ep"], ("all_to_all", None)),
    "low_latency": ("all_to_all", "low_latency"),
    "normal": ("all_to_all", "normal"),
}


def canonical(strategy: str, mode: AllToAllMode) -> tuple[str, AllToAllMode]:
    """Strategy and mode where the former may be an alias; anything else as it is.

    Raises:
        ValueError: the alias means a mode, and another one is asked for.
    """
    if not isinstance(strategy, str) or strategy not in ALIASES:
        return strategy, mode
    name, meant = ALIASES[strategy]
    if meant is not None and mode not in ("auto", meant):
        raise ValueError(
            f"strategy={strategy!r} is all_to_all with mode={meant!r}; got "
            f"mode={mode!r}. Give one of the two."
        )
    return name, meant or mode


def check_strategy(name: str) -> None:
    """Raises:
    ValueError: there is no strategy of this name.
    """
    if name not in _strategies:
        known = f"{', '.join(_strategies)}, or an alias ({', '.join(ALIASES)})"
        raise ValueError(f"strategy must be one of {known}; got {name!r}.")
