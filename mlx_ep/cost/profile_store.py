"""Profiles that `mlx_ep.calibrate` left here: where they lie, which is whose.

A cluster is described by what connects its ranks and by their chips, in any order. So a
profile of a cluster of different chips is found again on the same cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mlx_ep.cost.profile import Profile, read_profile, write_profile


def profile_file(folder: Path, transport: str, chips: Sequence[str]) -> Path:
    """Where the profile of a cluster lies.

    Args:
        folder: the user's cache folder.
        transport: that connects the ranks.
        chips: of every rank, as MLX calls the devices.
    """
    key = json.dumps([transport, sorted(chips)]).encode()
    digest = hashlib.sha256(key).hexdigest()[:12]
    return folder / "profiles" / f"{transport}-{len(chips)}-{digest}.json"


def store_profile(
    profile: Profile,
    folder: Path,
    transport: str,
    chips: Sequence[str],
    quick: bool = False,
) -> Path:
    """Keep what was measured on a cluster; other arguments as of `profile_file`.

    Args:
        quick: of few samples: kept beside the others, where nothing looks for it.
    """
    file = profile_file(folder, transport, chips)
    if quick:
        file = file.parent.parent / "profiles-quick" / file.name
    write_profile(profile, file)
    return file


def find_calibrated(
    folder: Path,
    num_ranks: int,
    transport: str | None = None,
    chips: Sequence[str] | None = None,
) -> Profile | None:
    """What was measured on a cluster; the newest of those that may be meant.

    Args:
        folder: the user's cache folder.
        num_ranks: P.
        transport: None: any.
        chips: of every rank; None: any.

    Raises:
        ValueError: the profile is not in order.
    """
    if transport is not None and chips is not None:
        file = profile_file(folder, transport, chips)
        return read_profile(file) if file.exists() else None
    found = list((folder / "profiles").glob(f"{transport or '*'}-{num_ranks}-*.json"))
    if not found:
        return None
    return read_profile(max(found, key=lambda file: file.stat().st_mtime))
