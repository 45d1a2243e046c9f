"""A policy in words: every option, what it was measured at and is predicted to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mlx_ep.comm import Transport
from mlx_ep.exchange import Auto, ExchangeShape, Strategy, layer_traffic
from mlx_ep.metrics import format_bytes
from mlx_ep.rows import Job, Option
from mlx_ep.tune.choose import ExpertsPolicy, Measured
from mlx_ep.tune.move import JobPolicy, MovementPolicy
from mlx_ep.types import TokenCounts

_JOBS: dict[Job, str] = {
    "rows": "an all-to-all's rows: plan, pack, sum",
    "ranks": "sums of all ranks",
    "pairs": "sums of this rank's pairs (runner gather)",
}


def explain(policy: ExpertsPolicy, top_k: int, num_tokens: Sequence[int]) -> str:
    """Every option with its measured and predicted times, and what is chosen.

    Measured are calls of one slot with some rows; predicted is a rank's share of a call
    with T tokens, milliseconds both. A star marks what is chosen.

    Args:
        top_k: K.
        num_tokens: the T of the columns.
    """

    def time_of(option: Option, tokens: int) -> float:
        return policy.predicted(option, tokens, top_k)

    why = _why(policy.forced, bool(policy.measured))
    if policy.measured and not policy.forced:
        why += f", for 1 of {policy.num_ranks} ranks"
    return "\n".join(
        [
            f"Experts {policy.name}; {why}.",
            *_measured_lines(policy.measured, policy.possible, "per slot", "row"),
            *_table(
                policy.possible,
                num_tokens,
                time_of if policy.measured else None,
                lambda tokens: policy.choose(tokens, top_k),
            ),
            *_left_out_lines(policy.left_out),
        ]
    )


def explain_movement(policy: MovementPolicy, num_tokens: Sequence[int]) -> str:
    """As `explain`, for what packs and sums rows: one table a job, T of one call."""
    lines = []
    for job, choice in policy.jobs.items():
        why = _why(policy.forced, bool(choice.measured))
        lines += [
            f"Movement of {policy.name}; {_JOBS[job]}; {why}.",
            *_measured_lines(choice.measured, choice.possible, "per call", "token"),
            *_table(
                choice.possible,
                num_tokens,
                choice.predicted if choice.measured else None,
                _chooser(choice, policy.row_bytes),
            ),
            *_left_out_lines(choice.left_out),
        ]
    return "\n".join(lines)


def explain_exchange(
    strategy: Strategy,
    rows: MovementPolicy,
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
            itemsize=rows.itemsize,
            transport=transport,
        )
        moved = ", ".join(
            f"{name} {format_bytes(layer_traffic(option, shape).num_bytes)}"
            for name, option in strategy.options.items()
        )
        chosen = strategy.explain(counts, rows.top_k, transport)
        lines.append(f"  T={tokens}: {chosen} ({moved})")
    return "\n".join(lines)


def _chooser(choice: JobPolicy, row_bytes: int) -> Callable[[int], Option]:
    return lambda tokens: choice.choose(tokens, row_bytes)


def _measured_lines(
    measured: Mapping[Option, Measured],
    possible: Sequence[Option],
    of_what: str,
    unit: str,
) -> list[str]:
    if not measured:
        return [f"  {', '.join(map(str, possible))}: not measured"]
    lines = []
    for option, times in measured.items():
        found = zip(times.rows, times.seconds, strict=True)
        values = ", ".join(
            f"{s * 1e3:.3g} ms with {n} {unit}{'s' * (n > 1)}" for n, s in found
        )
        lines.append(f"  {option}: measured {of_what} {values}")
    return lines


def _table(
    possible: Sequence[Option],
    num_tokens: Sequence[int],
    time_of: Callable[[Option, int], float] | None,
    choose: Callable[[int], Option],
) -> list[str]:
    """A line an option, a column a T; a star marks what is chosen."""
    width = max(len(str(option)) for option in possible)
    lines = [f"  {'T':<{width}}" + "".join(f"{t:>11}" for t in num_tokens)]
    for option in possible:
        cells = ""
        for tokens in num_tokens:
            text = "-" if time_of is None else f"{time_of(option, tokens) * 1e3:.3g} ms"
            cells += f"{text:>10}" + ("*" if choose(tokens) == option else " ")
        lines.append(f"  {option!s:<{width}}{cells}")
    return lines


def _left_out_lines(left_out: Mapping[Option, str]) -> list[str]:
    return [f"  left out: {option}, because {why}" for option, why in left_out.items()]


def _why(forced: bool, measured: bool) -> str:
    if forced:
        return "forced by the configuration"
    if measured:
        return "by rank 0's measurements"
    return "by the default rule, nothing was measured"
