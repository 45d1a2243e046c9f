"""What InfiniLM calls the strategy that runs."""

from __future__ import annotations

from mlx_ep.config import EPConfig

# What InfiniLM has no name for keeps ours.
_BACKENDS = {
    "replicated": "local_allreduce",
    "gathered": "allgather_reducescatter",
    "all_to_all": "deepep",
}


def backend_line(config: EPConfig, num_ranks: int, is_dense: bool = False) -> str:
    """The strategy and its sizes, in the words that InfiniLM prints.

    TP is the number of ranks that hold the same tokens, DP that of ranks with tokens of
    their own, EP that of parts that the experts are divided in. Where no expert is
    apart from another one (one rank, or ``ep_size=1``: all share every width), the
    backend is ``disabled``; and so it is for a dense model. Of a pipeline these are the
    sizes of a stage, and PP is the number of stages.

    >>> backend_line(EPConfig(strategy="replicated"), 2)
    'MoE EP backend: local_allreduce  TP=2  DP=1  EP=2'
    """
    num_ranks //= config.pp
    experts = min(config.ep_size or num_ranks, num_ranks)
    if is_dense or config.strategy == "local":
        experts = 1
    is_shared = config.strategy == "replicated"
    same, own = (num_ranks, 1) if is_shared else (1, num_ranks)
    backend = _BACKENDS.get(config.strategy, config.strategy)
    if experts == 1:
        backend = "disabled"
    stages = f"  PP={config.pp}" if config.pp > 1 else ""
    return f"MoE EP backend: {backend}  TP={same}  DP={own}  EP={experts}{stages}"
