"""Predicted speeds of a plan: one Mac alone, tensor and expert parallelism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_ep.cost.profile import Profile, find_profile, slowest
from mlx_ep.cost.profile_store import find_calibrated
from mlx_ep.cost.shape import ModelShape
from mlx_ep.cost.step import prefill_seconds, step_cost
from mlx_ep.metrics import aligned
from mlx_ep.tune.cache import cache_folder

# What is called what: the cost model's arms, for a person.
_TITLES = {
    "single": "one Mac",
    "tp": "tp: mlx-lm's shard()",
    "ep-replicated": "ep, --attention replicated",
    "ep-tensor": "ep, --attention tensor",
    "pp": "stages of layers, --pp",
}


@dataclass(frozen=True)
class Speed:
    """What one way to run a model is predicted to do.

    Attributes:
        arm: of the cost model.
        prefill: tokens of a prompt per second.
        decode: tokens per second, of all sequences together.
        why_not: why it cannot run, or "".
        fits: whether it fits the memory; None: not known.
        chip: of one Mac alone.
    """

    arm: str
    prefill: float = 0.0
    decode: float = 0.0
    why_not: str = ""
    fits: bool | None = None
    chip: str = ""

    @property
    def runs(self) -> bool:
        return not self.why_not and self.fits is not False


def calibrated_profile(num_ranks: int) -> Profile | None:
    """The newest profile that `mlx_ep.calibrate` left here for so many ranks."""
    return find_calibrated(cache_folder(), num_ranks)


def profiles_of(names: Sequence[str], num_ranks: int) -> list[Profile]:
    """The profile of every rank.

    Args:
        names: of shipped profiles or files, one for all ranks or one per rank.

    Raises:
        ValueError: there is no such profile, or another number of them.
    """
    if len(names) not in (1, num_ranks):
        raise ValueError(
            f"--chip must name one chip, or one per rank ({num_ranks}); got "
            f"{len(names)}."
        )
    found = [find_profile(name) for name in names]
    return found * num_ranks if len(found) == 1 else found


def predict(
    profiles: Sequence[Profile],
    shape: ModelShape,
    *,
    prompt: int,
    sequences: int = 1,
    link: str | None = None,
    tensor_problem: str = "",
    fits: Mapping[str, bool] | None = None,
    fits_alone: Sequence[bool] | None = None,
    arms: Sequence[str] = ("tp", "ep-replicated", "ep-tensor"),
) -> list[Speed]:
    """Every way to run a model on a cluster.

    Args:
        profiles: of every rank; of several together the slowest counts.
        prompt: tokens of a prompt, and behind which tokens are decoded.
        sequences: that are decoded at once.
        link: between the ranks; None: the profile's first.
        tensor_problem: why the model cannot be split by its `shard()`, or "".
        fits: by arm, whether it fits the memory; None: not known.
        fits_alone: for every rank, whether it holds the whole model.
        arms: on several ranks.

    Raises:
        ValueError: the profile has no such link.
    """
    num_ranks = len(profiles)

    def speed(arm: str, profile: Profile, fits: bool | None) -> Speed:
        seconds = prefill_seconds(
            profile, shape, arm, prompt=prompt, num_ranks=num_ranks, link=link
        )
        step = step_cost(
            profile,
            shape,
            arm,
            tokens=sequences,
            phase="decode",
            context=prompt,
            num_ranks=num_ranks,
            link=link,
        )
        name = profile.name if arm == "single" else ""
        return Speed(arm, prompt / seconds, step.tokens_per_second, "", fits, name)

    # The best of those that hold the model; if none does, of all.
    alone = list(fits_alone or [True] * num_ranks)
    candidates = [p for p, holds in zip(profiles, alone) if holds] or list(profiles)
    holds_alone = None if fits_alone is None else any(fits_alone)
    singles = (speed("single", profile, holds_alone) for profile in candidates)
    speeds = [max(singles, key=lambda single: single.decode)]
    for arm in arms if num_ranks > 1 else ():
        if tensor_problem and arm != "ep-replicated":
            speeds.append(Speed(arm, why_not=tensor_problem))
        else:
            speeds.append(speed(arm, slowest(profiles), (fits or {}).get(arm)))
    return speeds


def speeds_text(
    speeds: Sequence[Speed], profiles: Sequence[Profile], prompt: int
) -> str:
    """A table, what it was predicted from, and what it says."""
    rows = [("predicted", "prefill tok/s", "decode tok/s", "")]
    for speed in speeds:
        numbers = ("-", "-")
        if not speed.why_not:
            numbers = (f"{speed.prefill:.1f}", f"{speed.decode:.1f}")
        note = "cannot" if speed.why_not else ""
        if speed.fits is not None and not note:
            note = "fits" if speed.fits else "does not fit"
        title = _TITLES[speed.arm]
        rows.append(
            (f"{title} ({speed.chip})" if speed.chip else title, *numbers, note)
        )
    sources = {
        f"{profile.name!r} ("
        + (
            "measured by mlx_ep.calibrate)"
            if profile.kind == "measured"
            else "compiled from published figures, not measured)"
        )
        for profile in profiles
    }
    return "\n".join(
        [
            aligned(rows, left=(0, 3)),
            *sorted({speed.why_not for speed in speeds if speed.why_not}),
            "Predicted, not measured: the cost model (docs/cost-model.md) with the "
            f"profile {', '.join(sorted(sources))}. Together, all wait for the "
            f"slowest, with the same number of experts on every rank. A prompt of "
            f"{prompt} tokens. {_fence(profiles)}",
            verdict(speeds),
        ]
    )


def _fence(profiles: Sequence[Profile]) -> str:
    """What each collective waits for, which decides decoding on several Macs."""
    if all(profile.kind == "measured" for profile in profiles):
        return "The fence between GPU and CPU is that of the calibration."
    return (
        "Each collective pays Metal's default fence between GPU and CPU "
        "(MLX_METAL_FAST_SYNCH is not assumed: it can hang a Mac)."
    )


def verdict(speeds: Sequence[Speed]) -> str:
    """Whether one Mac alone is the better choice."""
    single = next(speed for speed in speeds if speed.arm == "single")
    others = [s for s in speeds if s.arm != "single" and s.runs]
    if single.fits is False:
        return "One Mac alone does not hold the model."
    if not others:
        return ""
    decode = max(others, key=lambda speed: speed.decode)
    prefill = max(others, key=lambda speed: speed.prefill)
    pairs = (
        f"decode {single.decode:.1f} tok/s alone and {decode.decode:.1f} together, "
        f"prefill {single.prefill:.1f} and {prefill.prefill:.1f}."
    )
    if single.decode >= decode.decode and single.prefill >= prefill.prefill:
        say = "One Mac alone is the better choice"
    elif single.decode >= decode.decode:
        say = "One Mac alone is the better choice for decoding, several for prefill"
    else:
        say = "Several Macs are the better choice"
    if single.fits is None:
        say += " where one holds the model"
    return f"{say}: {pairs}"
