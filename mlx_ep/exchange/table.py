"""The table of strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from mlx_ep.config import ALIASES, EPConfig, allow_strategy
from mlx_ep.exchange.base import Strategy
from mlx_ep.rows import Mover

# Makes a strategy of the configuration and of what moves its rows.
Factory = Callable[[EPConfig, Mover], Strategy]


class StrategyTable(Mapping[str, Factory]):
    """Strategy name -> what makes it."""

    def __init__(self) -> None:
        self._factories: dict[str, Factory] = {}

    def register(self, name: str, factory: Factory) -> None:
        """Add a strategy.

        Raises:
            ValueError: the name is a strategy's or an alias already.
        """
        if name in self._factories or name in ALIASES:
            raise ValueError(
                f"A strategy's name must be new; {name!r} is taken. Strategies are "
                f"{', '.join(self._factories)}, aliases {', '.join(ALIASES)}."
            )
        self._factories[name] = factory
        allow_strategy(name)

    def create(self, config: EPConfig, mover: Mover | None = None) -> Strategy:
        """The strategy that a configuration names, with its settings.

        Args:
            mover: chooses what packs and sums rows; default: MLX's ops, always.

        Raises:
            ValueError: there is no such strategy, or it does not honour
                `EPConfig.dispatch_dtype`.
        """
        if config.strategy not in self._factories:
            raise ValueError(
                f"strategy must be one of {', '.join(self._factories)}, or an alias ("
                f"{', '.join(ALIASES)}); got {config.strategy!r}."
            )
        strategy = self._factories[config.strategy](config, mover or Mover())
        asked = config.dispatch_dtype
        if asked != "model" and not getattr(strategy, "honours_dispatch_dtype", False):
            raise ValueError(
                f"dispatch_dtype={asked!r} must be honoured by the strategy, which "
                f"{config.strategy!r} does not say that it does. Use dispatch_dtype="
                "'model' with it."
            )
        return strategy

    def __getitem__(self, name: str) -> Factory:
        return self._factories[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factories)

    def __len__(self) -> int:
        return len(self._factories)
