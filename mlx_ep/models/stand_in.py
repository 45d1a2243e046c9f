"""What stands for the outputs of a switch, in blocks that weight and sum them at once.

Most blocks of mlx-lm do ``(switch(x, ids) * gates[..., None]).sum(axis=-2)``. Given a
stand-in for the outputs, this line says the routing without computing anything, and its
result can be the sum over the experts of all ranks: the block's code runs once, as it
is, and nothing is added to its graph. What it does with the sum is not looked at. A
block that uses the outputs in another way fails on them, when `find_probe` tries it.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from jaxtyping import Float, Integer

# x [..., D], ids [..., K], gates [..., K, 1], the sum's dtype -> the sum [..., D].
RoutedSum = Callable[[mx.array, mx.array, mx.array, mx.Dtype], mx.array]


class OutputsStandIn:
    """Stands for ``[..., K, D]`` outputs: takes gates, and is summed over K.

    Attributes:
        dtype: that of the outputs, with gates that of their product.
    """

    __slots__ = ("_gates", "_ids", "_routed_sum", "_x", "dtype")

    def __init__(
        self,
        x: Float[mx.array, "... D"],
        ids: Integer[mx.array, "... K"],
        routed_sum: RoutedSum,
        gates: Float[mx.array, "... K 1"] | None = None,
        dtype: mx.Dtype | None = None,
    ) -> None:
        self._x, self._ids, self._routed_sum = x, ids, routed_sum
        self._gates, self.dtype = gates, dtype or x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self._ids.shape, self._x.shape[-1])

    @property
    def ndim(self) -> int:
        return self._ids.ndim + 1

    def __mul__(self, gates: Float[mx.array, "... K 1"]) -> OutputsStandIn:
        """The outputs with their gates.

        Raises:
            TypeError: it is not one gate per output, or they have gates already.
        """
        if not isinstance(gates, mx.array) or self._gates is not None:
            raise TypeError("experts' outputs are multiplied by what are not gates")
        if gates.shape != (*self._ids.shape, 1):
            raise TypeError("experts' outputs are not multiplied by one gate each")
        dtype = self.dtype if self.dtype == gates.dtype else mx.float32
        return OutputsStandIn(self._x, self._ids, self._routed_sum, gates, dtype)

    def astype(self, dtype: mx.Dtype) -> OutputsStandIn:
        """The same, to be summed in another dtype."""
        return OutputsStandIn(self._x, self._ids, self._routed_sum, self._gates, dtype)

    def sum(self, axis: int) -> mx.array:
        """The sum over the experts of all ranks.

        Raises:
            TypeError: it is another sum, or one without gates.
        """
        if self._gates is None or (axis != -2 and axis != self.ndim - 2):
            raise TypeError("experts' outputs are not summed with their gates")
        return self._routed_sum(self._x, self._ids, self._gates, self.dtype)

    def squeeze(self, axis: int) -> mx.array:
        """The one expert's output of each token, where K is 1.

        Raises:
            TypeError: it is not the axis K, or there are gates.
        """
        if axis not in (-2, self.ndim - 2) or self._gates is not None:
            raise TypeError("experts' outputs are squeezed elsewhere than over K")
        if self._ids.shape[-1] != 1:
            raise TypeError("outputs of more than one expert are squeezed")
        ones = mx.ones((*self._ids.shape, 1), mx.float32)
        return self._routed_sum(self._x, self._ids, ones, self.dtype)
