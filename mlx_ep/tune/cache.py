"""Results of the warm-up in the user's cache folder, one small file a shape."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_ep
from mlx_ep.kernels.loader import sources_digest
from mlx_ep.tune.check import Finding

# Whose Python source decides what an option does and how it is timed.
TIMED_ROOMS = ("rows", "experts", "kernels", "tune")


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
        "code": _code_digest(),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
    }


def read_findings(key: Mapping[str, Any]) -> dict[str, Finding] | None:
    """What was stored under a key, or None; warns of a file that is not readable."""
    file = _file(key)
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or content.get("key") != dict(key):
            raise ValueError("it is of another key")
        results = content.get("results")
        if not isinstance(results, dict):
            raise ValueError("it has no results")
        return {name: Finding.from_json(found) for name, found in results.items()}
    except OSError:  # there is none, or no such folder: what is said when one writes
        return None
    except (ValueError, RecursionError) as error:
        warnings.warn(
            f"{file} is not what a warm-up has written ({error}); it is ignored, and "
            "the warm-up measures again.",
            stacklevel=2,
        )
        return None


def write_findings(key: Mapping[str, Any], results: Mapping[str, Finding]) -> None:
    """Store under a key. Ranks of one host may write the same at the same time."""
    file = _file(key)
    part = file.with_suffix(f".{os.getpid()}")
    content = {"key": key, "results": {n: f.to_json() for n, f in results.items()}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(file)
    except OSError as error:
        warnings.warn(
            f"The warm-up's results cannot be kept for the next start ({error}). Set "
            "XDG_CACHE_HOME to a folder that can be written to.",
            stacklevel=2,
        )


@cache
def _code_digest() -> str:
    """Of the package's code that is timed and of that which times it."""
    digest = hashlib.sha256()
    for room in TIMED_ROOMS:
        for file in sorted((Path(mlx_ep.__file__).parent / room).rglob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:24]


def _file(key: Mapping[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True).encode()
    return cache_folder() / "experts" / f"{hashlib.sha256(text).hexdigest()[:24]}.json"
