"""What fields of `EPConfig` must be, seen together."""

from __future__ import annotations

from mlx_ep.types import DispatchDtype


def check_dispatch(
    dispatch_dtype: DispatchDtype, strategy: str, reduction: str
) -> None:
    """Whether there are rows that may travel in another dtype than the model's.

    Raises:
        ValueError: there are none, or they may not.
    """
    if strategy == "replicated":
        raise ValueError(
            f"dispatch_dtype={dispatch_dtype!r} needs rows that travel to the "
            "experts, which there are with strategy='gathered', 'all_to_all' and "
            "'auto'; got strategy='replicated'. Leave dispatch_dtype out with it."
        )
    if reduction == "per_slot":
        raise ValueError(
            "reduction='per_slot' must be bit-identical to one process, which rows "
            f"in another dtype are not; got dispatch_dtype={dispatch_dtype!r}."
            " Give one of the two."
        )
