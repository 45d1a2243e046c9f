"""A choice in words: every option, what it was measured at and is predicted to take."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ep.comm import Transport
from mlx_ep.exchange import Auto, ExchangeShape, Strategy, layer_traffic
from mlx_ep.metrics import format_bytes
from mlx_ep.tune.choose import Choice
from mlx_ep.tune.movement import MovementShape
from mlx_ep.tune.problem import counted
from mlx_ep.types import TokenCounts


def explain(choice: Choice, num_tokens: Sequence[int]) -> str:
    """Every option with its measured and predicted times, and what is chosen.

    Measured are parts of a call (slots with some rows, whole movements); predicted are
    calls, of experts a rank's share of one with T tokens, in milliseconds. A star marks
    what is chosen.

    Args:
        num_tokens: the T of the columns.
    """
    return "\n".join(
        [
            f"{choice.title}; {_why(choice)}.",
            *_measured_lines(choice),
            *_table(choice, num_tokens),
            *(f"  left out: {o}, because {why}" for o, why in choice.left_out.items()),
        ]
    )


def explain_exchange(
    strategy: Strategy,
    rows: MovementShape,
    num_ranks: int,
    transport: Transport,
    num_tokens: Sequence[int],
) -> str:
    """What the strategy `auto` takes for T tokens on every rank, with the reason.

    And how many bytes a rank hands over with it and with the others. "" for other
    strategies, which have nothing to choose by this rule.
    """
    if not isinstance(strategy, Auto):
        return ""
    lines = [
        f"Exchange of {rows.name}; strategy auto, {num_ranks} ranks, {transport}; "
        "bytes that a rank hands over."
    ]
    for tokens in num_tokens:
        counts = TokenCounts((tokens,) * num_ranks)
        shape = ExchangeShape(
            tokens=counts,
            width=rows.width,
            top_k=rows.top_k,
            itemsize=rows.dtype.size,
            transport=transport,
            dispatch_dtype=rows.dispatch_dtype,
        )
        moved = ", ".join(
            f"{name} {format_bytes(layer_traffic(option, shape).num_bytes)}"
            for name, option in strategy.options.items()
        )
        chosen = strategy.explain(counts, rows.top_k, transport)
        lines.append(f"  T={tokens}: {chosen} ({moved})")
    return "\n".join(lines)


def _measured_lines(choice: Choice) -> list[str]:
    if not choice.measured:
        return [f"  {', '.join(map(str, choice.possible))}: not measured"]
    unit, part = choice.problem.unit, choice.problem.part
    lines = []
    for option, finding in choice.measured.items():
        found = zip(finding.sizes, finding.seconds, strict=True)
        values = ", ".join(
            f"{s * 1e3:.3g} ms with {counted(n, unit)}" for n, s in found
        )
        lines.append(f"  {option}: measured per {part} {values}")
    return lines


def _table(choice: Choice, num_tokens: Sequence[int]) -> list[str]:
    """A line an option, a column a T; a star marks what is chosen."""
    width = max(len(str(option)) for option in choice.possible)
    lines = [f"  {'T':<{width}}" + "".join(f"{t:>11}" for t in num_tokens)]
    for option in choice.possible:
        cells = ""
        for tokens in num_tokens:
            text = "-"
            if choice.measured:
                text = f"{choice.predicted(option, tokens) * 1e3:.3g} ms"
            cells += f"{text:>10}" + ("*" if choice.choose(tokens) == option else " ")
        lines.append(f"  {option!s:<{width}}{cells}")
    return lines


def _why(choice: Choice) -> str:
    if choice.forced:
        return "forced by the configuration"
    if choice.measured:
        return "by rank 0's measurements, for one rank"
    return "by the default rule, nothing was measured"
