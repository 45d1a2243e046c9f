"""Results that are under way: started now, received later, each exactly once.

MLX starts what an exchange needs and returns before a row has arrived. What is started
too early holds its buffers all the while, and what nobody receives was sent for
nothing. So there is a limit to what is under way, and a rule for each result.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, TypeVar

import mlx.core as mx

# Two micro-batches, one result each.
MOST_RESULTS = 2

Result = TypeVar("Result")


class Receive(Generic[Result]):
    """A result that is under way; call it once, where the result is needed.

    What is called gives the result itself, as a lazy array or `Rows`: it does not wait.
    Whatever is computed from it does.
    """

    def __init__(self, result: Result, name: str, in_flight: InFlight) -> None:
        self._result: Result | None = result
        self._in_flight = in_flight
        self.name = name

    def __call__(self) -> Result:
        """The result.

        Raises:
            RuntimeError: it has been received before.
        """
        if self._result is None:
            raise RuntimeError(
                f"the result of {self.name} has been received already; each result is "
                "received once. Keep what the first call returned."
            )
        result, self._result = self._result, None
        self._in_flight.results.remove(self)
        return result


class InFlight:
    """What has been started and not been received yet, at most `MOST_RESULTS`.

    A context manager: at its end nothing may be left.

    Attributes:
        results: those under way, the oldest first.
    """

    def __init__(self) -> None:
        self.results: list[Receive[Any]] = []

    def start(self, result: Result, *arrays: mx.array, name: str) -> Receive[Result]:
        """Start what `arrays` need, without waiting for it.

        Args:
            result: what is received; `arrays` are what of it is computed.
            name: for a person.

        Raises:
            RuntimeError: too much is under way.
        """
        if len(self.results) == MOST_RESULTS:
            held = " and ".join(each.name for each in self.results)
            raise RuntimeError(
                f"at most {MOST_RESULTS} results may be under way; got {held}, and "
                f"then {name}. Receive one of them first."
            )
        mx.async_eval(*arrays)
        receive = Receive(result, name, self)
        self.results.append(receive)
        return receive

    def __enter__(self) -> InFlight:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self.results:
            held = " and ".join(each.name for each in self.results)
            raise RuntimeError(
                f"the result of {held} was started and never received. Call what "
                "started it returned, once."
            )
