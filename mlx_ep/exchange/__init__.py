"""Strategies: how tokens meet the experts of other ranks, one strategy a file.

A new one is a file like `gathered.py` and a line below; docs/add-a-strategy.md.
"""

from __future__ import annotations

from mlx_ep.exchange.all_to_all import AllToAll
from mlx_ep.exchange.auto import Auto
from mlx_ep.exchange.base import (
    Collective,
    Exchange,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
    Strategy,
    agree_tokens,
    check_tokens,
    layer_traffic,
    sends_nothing,
)
from mlx_ep.exchange.counted import CountedComm
from mlx_ep.exchange.functions import (
    moe_combine_exchange,
    moe_combine_start,
    moe_dispatch_exchange,
    moe_dispatch_start,
)
from mlx_ep.exchange.gathered import Gathered
from mlx_ep.exchange.local import Local
from mlx_ep.exchange.names import backend_line
from mlx_ep.exchange.receive import InFlight, Receive
from mlx_ep.exchange.replicated import Replicated
from mlx_ep.exchange.table import StrategyTable

STRATEGIES = StrategyTable()
STRATEGIES.register("replicated", lambda config, mover: Replicated())
STRATEGIES.register(
    "gathered", lambda config, mover: Gathered(config.round_tokens, mover)
)
STRATEGIES.register("all_to_all", AllToAll)
STRATEGIES.register("local", lambda config, mover: Local())
STRATEGIES.register("auto", Auto)

__all__ = [
    "moe_dispatch_exchange",
    "moe_combine_exchange",
    "moe_dispatch_start",
    "moe_combine_start",
    "backend_line",
    "Exchange",
    "ExchangeRequest",
    "InFlight",
    "Receive",
    "agree_tokens",
    "check_tokens",
    "STRATEGIES",
    "Strategy",
    "StrategyTable",
    "Replicated",
    "Gathered",
    "AllToAll",
    "Local",
    "Auto",
    "Collective",
    "ExchangeShape",
    "ExchangeTraffic",
    "layer_traffic",
    "sends_nothing",
    "CountedComm",
]
