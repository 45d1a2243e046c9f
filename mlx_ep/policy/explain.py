"""A policy in words: every option, what it was measured at and is predicted to take."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ep.policy.choose import ExpertsPolicy
from mlx_ep.runners import Option


def explain(policy: ExpertsPolicy, top_k: int, num_tokens: Sequence[int]) -> str:
    """Every option with its measured and predicted times, and what is chosen.

    Measured are calls of one slot with some rows; predicted is a rank's share of a call
    with T tokens, milliseconds both. A star marks what is chosen.

    Args:
        top_k: K.
        num_tokens: the T of the columns.
    """
    lines = [f"Experts {policy.name}; {_why(policy)}."]
    for option, times in policy.measured.items():
        found = zip(times.rows, times.seconds, strict=True)
        values = ", ".join(f"{s * 1e3:.3g} ms with {m} rows" for m, s in found)
        lines.append(f"  {option}: measured per slot {values}")
    lines += [f"  {', '.join(map(str, policy.possible))}: not measured"] * (
        not policy.measured
    )
    width = max(len(str(option)) for option in policy.possible)
    lines.append(f"  {'T':<{width}}" + "".join(f"{t:>11}" for t in num_tokens))
    for option in policy.possible:
        cells = "".join(_cell(policy, option, t, top_k) for t in num_tokens)
        lines.append(f"  {option!s:<{width}}{cells}")
    lines += [f"  left out: {o}, because {why}" for o, why in policy.left_out.items()]
    return "\n".join(lines)


def _cell(policy: ExpertsPolicy, option: Option, num_tokens: int, top_k: int) -> str:
    text = "-"
    if policy.measured:
        text = f"{policy.predicted(option, num_tokens, top_k) * 1e3:.3g} ms"
    star = "*" if policy.choose(num_tokens, top_k) == option else " "
    return f"{text:>10}{star}"


def _why(policy: ExpertsPolicy) -> str:
    if policy.forced:
        return "forced by the configuration"
    if policy.measured:
        return f"by rank 0's measurements, for 1 of {policy.num_ranks} ranks"
    return "by the default rule, nothing was measured"
