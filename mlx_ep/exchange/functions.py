"""One exchange by hand: dispatch, experts of the caller's own, combine."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from jaxtyping import Float, Float32

from mlx_ep.comm import Comm
from mlx_ep.exchange.base import Exchange, ExchangeRequest, Strategy, agree_tokens
from mlx_ep.exchange.receive import InFlight, Receive
from mlx_ep.placement import Placement
from mlx_ep.types import DispatchDtype, Routing, Rows, TokenCounts


def moe_dispatch_exchange(
    x: Float[mx.array, "T D"],
    routing: Routing,
    placement: Placement,
    comm: Comm,
    strategy: Strategy,
    *,
    tokens: TokenCounts | None = None,
    sum_dtype: mx.Dtype | None = None,
    dispatch_dtype: DispatchDtype = "model",
    handle: Exchange | None = None,
) -> tuple[Rows, Exchange]:
    """Send every token to the ranks that hold its experts.

    Every rank calls it, also with no tokens, and computes from the rows

        partial[m] = sum of gates[m, k] * expert(slot_ids[m, k])(x[m])  where slot >= 0

    in float32. All at once: the caller cuts long inputs into rounds.

    Args:
        x: this rank's tokens, in float32, float16 or bfloat16.
        routing: their experts; -1 is none, the same expert twice is two terms.
        placement: where the experts are.
        comm: the ranks.
        strategy: from `STRATEGIES`.
        tokens: T of every rank, where the caller has agreed on it for this step;
            else strategies that need it agree here, one more collective.
        sum_dtype: what sums travel back in, where the strategy adds them at home;
            default: the dtype of x.
        dispatch_dtype: what rows travel in, see `EPConfig`.
        handle: of an earlier dispatch with the same routing, which keeps its dtypes.

    Returns:
        The rows of this rank, and the handle that `moe_combine_exchange` takes: the
        strategy's exchange.

    Raises:
        ValueError: more tokens than the strategy takes, or `tokens` do not fit.
    """
    if handle is None:
        if tokens is None and strategy.needs_tokens:
            tokens = agree_tokens(x.shape[0], comm)
        request = ExchangeRequest(
            routing,
            placement,
            comm,
            sum_dtype or x.dtype,
            tokens,
            dispatch_dtype=dispatch_dtype,
        )
        handle = strategy.exchange(request)
    return handle.dispatch(x), handle


def moe_combine_exchange(
    partial: Float32[mx.array, "M D"], handle: Exchange
) -> Float32[mx.array, "T D"]:
    """The finished sum of this rank's tokens, from the sums of every rank's rows.

    Args:
        partial: this rank's gate-weighted sum of each row, in the order of the rows.
        handle: from the dispatch.
    """
    return handle.combine(partial)


def moe_dispatch_start(
    x: Float[mx.array, "T D"],
    routing: Routing,
    placement: Placement,
    comm: Comm,
    strategy: Strategy,
    in_flight: InFlight,
    **options: Any,
) -> tuple[Receive[Rows], Exchange]:
    """`moe_dispatch_exchange`, started: it returns before rows have arrived.

    Args:
        in_flight: what is under way on this rank.
        **options: of `moe_dispatch_exchange`.

    Returns:
        What gives the rows when it is called, once; and the handle.

    Raises:
        RuntimeError: too much is under way.
    """
    rows, handle = moe_dispatch_exchange(
        x, routing, placement, comm, strategy, **options
    )
    return in_flight.start(rows, rows.x, rows.slot_ids, name="a dispatch"), handle


def moe_combine_start(
    partial: Float32[mx.array, "M D"], handle: Exchange, in_flight: InFlight
) -> Receive[mx.array]:
    """`moe_combine_exchange`, started; what it returns gives the sums, once.

    Raises:
        RuntimeError: too much is under way.
    """
    total = moe_combine_exchange(partial, handle)
    return in_flight.start(total, total, name="a combine")
