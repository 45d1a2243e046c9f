"""Compiling: the runner once, each kernel once; both kept in a cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SHIM = HERE / "shim"
RUNNER = HERE / "runner"

WARNINGS = shlex.split(
    "-Wall -Wextra -Wdouble-promotion -Werror=vla -Wno-unused -Wno-attributes "
    "-Wno-unknown-pragmas -Wno-sign-compare -Wno-ignored-qualifiers -Wno-comment "
    "-Wno-parentheses"
)

# Instrumentation whose callbacks the runner defines: linked without the sanitizers.
CHECKS = ["-fsanitize=thread,shift,integer-divide-by-zero,bounds,alignment,return"]

KERNEL_FLAGS = shlex.split(
    "-std=gnu++17 -O1 -g1 -fPIC -fno-exceptions -fno-rtti -fno-strict-aliasing "
    "-ffp-contract=off"
)


class CompileError(Exception):
    """The kernel's source is not accepted; the message holds the diagnostics."""


@cache
def compiler() -> str | None:
    """The C++ compiler: $MSLHOST_CXX, else g++ or clang++; None when there is none."""
    if name := os.environ.get("MSLHOST_CXX"):
        return name
    # The first versions that have _Float16 in C++.
    for name, least in (("g++", 12), ("clang++", 15)):
        if shutil.which(name):
            command = [name, "-dumpversion"]
            version = subprocess.run(command, capture_output=True, text=True).stdout
            if int(version.split(".")[0]) >= least:
                return name
    return None


def missing() -> str | None:
    """Why nothing can be executed here; None when it can."""
    if sys.platform != "linux":
        return "host execution of Metal kernels runs on Linux only"
    if compiler() is None:
        return "host execution of Metal kernels needs g++ >= 12 or clang++ >= 15"
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
    """$MSLHOST_CACHE, else a folder of this user in the system's temp folder."""
    default = Path(tempfile.gettempdir()) / f"mslhost-{os.getuid()}"
    folder = Path(os.environ.get("MSLHOST_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def runner() -> Path:
    """The program that executes kernels."""
    # -rdynamic lets a kernel's module find the runner's functions.
    command = [_compiler(), "-std=c++17", "-O2", "-g1", "-rdynamic"]
    source = RUNNER / "main.cpp"
    built, _ = _built("runner", [*command, str(source), "-ldl"], _stamp(RUNNER), None)
    return built


def kernel(name: str, text: str) -> tuple[Path, str]:
    """Compiles a translated kernel.

    Args:
        name: for the file names.
        text: the C++ translation unit.

    Returns:
        The module, and the compiler's warnings.

    Raises:
        CompileError: the compiler rejects it.
    """
    is_clang = _is_clang(_compiler())
    dialect = ["-fsingle-precision-constant"]  # a literal is float in Metal
    checks = list(CHECKS)
    if is_clang:
        dialect = ["-Wno-ignored-attributes", "-Wno-unknown-attributes"]
        checks += ["-mllvm", "-tsan-instrument-read-before-write=1"]
    include = [f"-I{SHIM}", f"-I{mlx_headers()}"]
    compile_ = [
        _compiler(),
        *KERNEL_FLAGS,
        *WARNINGS,
        *dialect,
        *checks,
        *include,
        "-c",
    ]
    built, warnings = _built(name, compile_, _stamp(SHIM), text, ".o")
    linked, _ = _built(name, [_compiler(), "-shared", str(built)], "", None, ".so")
    return linked, warnings


def source_line(module: Path, address: int) -> str:
    """``file:line`` of an instruction: of its innermost frame outside the shim."""
    if not shutil.which("addr2line"):
        return ""
    command = ["addr2line", "-e", str(module), "-i", hex(address - 1)]
    frames = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    named = [frame.split(" ")[0] for frame in frames if frame]
    ours = [frame for frame in named if "/shim/" not in frame]
    return os.path.basename((ours or named or [""])[0])


def _compiler() -> str:
    name = compiler()
    assert name is not None, missing()
    return name


@cache
def _is_clang(name: str) -> bool:
    version = subprocess.run([name, "--version"], capture_output=True, text=True)
    return "clang" in version.stdout


@cache
def _stamp(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _built(
    name: str, command: list[str], stamp: str, text: str | None, suffix: str = ""
) -> tuple[Path, str]:
    """The output of `command`, from the cache where it has been run before."""
    key = "\0".join([*command, stamp, text or ""])
    digest = hashlib.sha256(key.encode()).hexdigest()[:20]
    target = cache_folder() / f"{name}-{digest}{suffix}"
    log = target.with_name(target.name + ".log")
    if target.exists() and log.exists():
        return target, log.read_text()
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        output = Path(folder) / "output"
        if text is not None:
            unit = Path(folder) / "kernel.cpp"
            unit.write_text(text)
            command = [*command, str(unit)]
        command = [*command, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"$ {' '.join(command)}\n{done.stderr}")
        # Log first: a module without its log is built again.
        (Path(folder) / "log").write_text(done.stderr)
        os.replace(Path(folder) / "log", log)
        os.replace(output, target)
    return target, done.stderr
