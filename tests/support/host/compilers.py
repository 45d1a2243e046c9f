"""Which compiler builds kernels for the CPU, which one checks address spaces.

The `ziglang` wheel holds a clang with the headers and libraries of a Linux, so that a
machine without any compiler can do both.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.support.private import private_folder, user_folder

# The first versions that have _Float16 in C++.
_BUILDERS = (("g++", 12), ("clang++", 15))


@cache
def builder() -> tuple[str, ...] | None:
    """The C++ compiler's command: $MSLHOST_CXX, else g++, clang++ or zig's clang.

    $MSLHOST_CXX is a command line, or "zig". None where there is no compiler.
    """
    if command := os.environ.get("MSLHOST_CXX"):
        return zig() if command == "zig" else tuple(shlex.split(command))
    for name, least in _BUILDERS:
        if shutil.which(name) and _version(name) >= least:
            return (name,)
    return zig()


@cache
def zig() -> tuple[str, ...] | None:
    """The command of zig's clang, which builds libraries as it needs them; or None."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    # A named target is built with zig's own headers, not with what the system has.
    target = f"{platform.machine()}-linux-gnu".replace("arm64", "aarch64")
    return (str(Path(spec.origin).parent / "zig"), "c++", "-target", target)


@cache
def is_clang(command: tuple[str, ...]) -> bool:
    return "clang" in run_compiler([*command, "--version"]).stdout


def missing() -> str | None:
    """Why nothing can be executed here; None when it can."""
    if sys.platform != "linux":
        return "host execution of Metal kernels runs on Linux only"
    if builder() is None:
        return "no g++ >= 12, no clang++ >= 15: pip install ziglang"
    if mlx_headers() is None:
        return "this mlx build ships no Metal headers (utils.h)"
    return None


@cache
def mlx_headers() -> Path | None:
    """The include folder of the installed mlx, where it has the Metal headers."""
    spec = importlib.util.find_spec("mlx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        include = Path(folder) / "include"
        if (include / "mlx/backend/metal/kernels/utils.h").exists():
            return include
    return None


def cache_folder() -> Path:
    """$MSLHOST_CACHE, else a folder of this user in the system's temp folder.

    What lies there is executed: no other user can write to it.
    """
    if folder := os.environ.get("MSLHOST_CACHE"):
        return private_folder(Path(folder))
    return user_folder("mslhost")


def run_compiler(
    command: Sequence[str], text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a compiler, with `text` as its input; zig keeps its libraries with ours."""
    folder = str(cache_folder() / "zig")
    variables = {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}
    return subprocess.run(
        command, input=text, capture_output=True, text=True, env=os.environ | variables
    )


def _version(name: str) -> int:
    return int(run_compiler([name, "-dumpversion"]).stdout.split(".")[0] or 0)
