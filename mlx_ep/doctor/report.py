"""What the doctor found, as text of at most 80 columns. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

from mlx_ep.doctor.answers import is_wrong
from mlx_ep.doctor.facts import RISKY_VARIABLES, MachineFacts
from mlx_ep.measure import Check
from mlx_ep.measure.links import LinkTime
from mlx_ep.metrics import aligned, format_bytes

WIDTH = 79


def wrapped(text: str, indent: str = "") -> str:
    """A sentence in lines of at most 79 characters."""
    return fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def machine_lines(rank: MachineFacts, sharing: int = 1) -> list[str]:
    """One rank: where it is, its memory, its versions.

    Args:
        sharing: ranks on its host, which have its memory together.
    """
    gpu = (
        "computes on the GPU through Metal" if rank["metal"] else "computes on the CPU"
    )
    wired = rank["wired_limit_mb"]
    limit = f"{format_bytes(rank['limit_bytes'])} for weights"
    if sharing > 1:
        limit += f" of the {sharing} ranks here"
    if wired is not None:
        limit += f" (iogpu.wired_limit_mb {wired or '0, the default'})"
    versions = ", ".join(f"{name} {v}" for name, v in rank["versions"].items())
    system = f"macOS {rank['macos']}" if rank["macos"] else rank["system"]
    return [
        wrapped(
            f"rank {rank['rank']} of {rank['size']}: {rank['host']}, {rank['chip']}, "
            f"{rank['cores']} cores, {system}, {gpu}; transport {rank['transport']}"
        ),
        wrapped(
            f"memory {format_bytes(rank['memory_bytes'])}, "
            f"{format_bytes(rank['available_bytes'])} free, {limit}; load "
            f"{rank['load_average']}",
            "  ",
        ),
        wrapped(f"{versions}, Python {rank['python']}", "  "),
    ]


def environment_lines(facts: Sequence[MachineFacts], table: str) -> list[str]:
    """Variables with a risk, and what is not the same on all ranks."""
    lines = []
    for rank in facts:
        for name, value in rank["variables"].items():
            if name in RISKY_VARIABLES and value not in ("", "0"):
                where = f"{name}={value} on rank {rank['rank']}"
                lines.append(wrapped(f"WARNING: {where}: {RISKY_VARIABLES[name]}."))
    if len({str(rank["versions"]) for rank in facts}) > 1:
        lines.append("WARNING: the ranks have different versions.")
    if table:
        lines += ["Not the same on all ranks (chips and memory may differ):", table]
    return lines


def report_table(checks: Sequence[Check]) -> str:
    """One line a check: difference, times, verdict; below it why one is wrong.

    Plain are the ms of what a check is compared with.
    """
    rows = [("check", "diff", "ms", "plain", "GB/s", "")]
    notes: list[str] = []
    for check in checks:
        plain = check.plain_seconds
        rate = check.num_bytes / check.seconds / 1e9 if check.seconds else 0.0
        rows.append(
            (
                check.what,
                f"{check.error:.0e}" if check.error else "0",
                _milliseconds(check.seconds) if check.seconds else "-",
                "-" if plain is None else _milliseconds(plain),
                _rate(rate) if check.num_bytes else "-",
                _word(check),
            )
        )
        if is_wrong(check):
            why = check.why or f"at most {check.tolerance:.1e} is right"
            notes.append(wrapped(f"WRONG: {check.what}: {why}"))
    if any(not check.is_right and not check.is_ours for check in checks):
        notes.append("rough: MLX's own sums in 16 bits; imprecise, and not used")
    return "\n".join([aligned(rows, left=(0, len(rows[0]) - 1)), *notes])


def _milliseconds(seconds: float) -> str:
    """Three digits, in at most six columns."""
    number = seconds * 1e3
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _rate(rate: float) -> str:
    """Two digits of GB/s, which a small message needs as much as a large one."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def _word(check: Check) -> str:
    if check.is_right:
        return "ok"
    return "WRONG" if check.is_ours else "rough"


def link_table(links: Sequence[LinkTime]) -> str:
    """One line a link: measured, expected, verdict."""
    rows = [("ranks", "us", "expected", "GB/s", "expected", "")]
    for link in links:
        late, wide = link.expected_latency, link.expected_bandwidth
        rows.append(
            (
                "-".join(map(str, link.ranks)),
                f"{link.latency * 1e6:.0f}",
                "-" if late is None else f"{late * 1e6:.0f}",
                "-" if link.bandwidth is None else f"{link.bandwidth / 1e9:.2f}",
                "-" if wide is None else f"{wide / 1e9:.1f}",
                "SLOW" if link.is_slow else "" if late is None else "ok",
            )
        )
    sources = dict.fromkeys(link.source for link in links)
    notes = [wrapped(f"({source})") for source in sources if source]
    title = "links: a message of 256 bytes one way, and the rate up to 4 MiB"
    return "\n".join([title, aligned(rows, left=(0, 5)), *notes])


def answer_lines(answers: Mapping[str, Sequence[str]]) -> list[str]:
    """What to look at."""
    lines = []
    for question, sentences in answers.items():
        lines += ["", f"{question}?"]
        lines += [wrapped(sentence, "  ") for sentence in sentences]
    return lines


def _named(ranks: Sequence[str]) -> str:
    """rank 0; ranks 0, 1."""
    return f"rank{'s' if ranks[1:] else ''} {', '.join(ranks)}"


def verdict(
    facts: Sequence[MachineFacts], checks: Sequence[Sequence[Check]], model_problem: str
) -> str:
    """What was found, and what could not be checked."""
    lines = []
    without = [str(rank["rank"]) for rank in facts if not rank["metal"]]
    if without:
        lines.append(
            f"Not checked: the Metal kernels on {_named(without)}, where MLX "
            "does not compute on a GPU through Metal. They are not used there either."
        )
    if len(facts) == 1:
        lines.append(
            "Not checked: collectives, as there is one rank. Start several with "
            "mlx_ep.launch -n 2 -- mlx_ep.doctor, or on the hosts of your cluster."
        )
    wrong = [
        f"rank {r}: {check.what}"
        for r, found in enumerate(checks)
        for check in found
        if is_wrong(check)
    ]
    count = sum(check.is_ours or check.is_right for found in checks for check in found)
    if wrong:
        lines.append(f"{len(wrong)} of {count} checks disagree: {'; '.join(wrong)}.")
    else:
        lines.append(f"All {count} checks agree.")
    if model_problem:
        first, *table = model_problem.split("\n")
        lines.append(f"The model cannot be loaded: {first}")
        return "\n".join([*map(wrapped, lines), *table])
    return "\n".join(map(wrapped, lines))
