"""Results of the warm-up in the user's cache folder, one small file a shape."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_ep
from mlx_ep.kernels.loader import sources_digest


def cache_folder() -> Path:
    """``mlx_ep`` in XDG_CACHE_HOME, ~/Library/Caches or ~/.cache."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "mlx_ep"
    is_mac = sys.platform == "darwin"
    return Path.home() / ("Library/Caches" if is_mac else ".cache") / "mlx_ep"


def cache_key(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The shape and all else that a result depends on."""
    device = mx.device_info()
    return {
        **shape,
        "chip": [device.get("device_name"), device.get("architecture")],
        "cores": os.cpu_count(),
        "system": [platform.system(), platform.machine(), platform.release()],
        "versions": [version("mlx"), version("numpy"), mlx_ep.__version__],
        "kernels": sources_digest(),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
    }


def read_cache(key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was stored under a key, or None."""
    try:
        content = json.loads(_file(key).read_text())
    except (OSError, ValueError):  # none, or not a whole file
        return None
    if not isinstance(content, dict) or content.get("key") != dict(key):
        return None
    results: dict[str, Any] | None = content.get("results")
    return results


def write_cache(key: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Store under a key. Ranks of one host may write the same at the same time."""
    file = _file(key)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"key": key, "results": results}, indent=1) + "\n")
        part.replace(file)
    except OSError as error:
        warnings.warn(
            f"The warm-up's results cannot be kept for the next start ({error}). Set "
            "XDG_CACHE_HOME to a folder that can be written to.",
            stacklevel=2,
        )


def _file(key: Mapping[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True).encode()
    return cache_folder() / "experts" / f"{hashlib.sha256(text).hexdigest()[:24]}.json"
