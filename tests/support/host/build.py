"""Compiling: the runner once, each kernel once; both kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
from functools import cache
from pathlib import Path

from .compilers import (
    builder,
    cache_folder,
    is_clang,
    missing,
    mlx_headers,
    run_compiler,
)

HERE = Path(__file__).parent
SHIM = HERE / "shim"
RUNNER = HERE / "runner"

WARNINGS = shlex.split(
    "-Wall -Wextra -Wdouble-promotion -Werror=vla -Wno-unused -Wno-attributes "
    "-Wno-unknown-pragmas -Wno-sign-compare -Wno-ignored-qualifiers -Wno-comment "
    "-Wno-parentheses"
)

# Instrumentation whose callbacks the runner defines: linked without the sanitizers.
# Two flags, as zig drops what stands beside "thread".
CHECKS = [
    "-fsanitize=shift,integer-divide-by-zero,{bounds},alignment,return",
    "-fsanitize=thread",
]

KERNEL_FLAGS = shlex.split(
    "-std=gnu++17 -O1 -g1 -fPIC -fno-exceptions -fno-rtti -fno-strict-aliasing "
    "-ffp-contract=off"
)


class CompileError(Exception):
    """The kernel's source is not accepted; the message holds the diagnostics."""


def runner() -> Path:
    """The program that executes kernels."""
    # -rdynamic lets a kernel's module find the runner's functions.
    command = [*_builder(), "-std=c++17", "-O2", "-g1", "-rdynamic"]
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
    dialect = ["-fsingle-precision-constant"]  # a literal is float in Metal
    bounds = "bounds"
    checks = list(CHECKS)
    if is_clang(_builder()):
        dialect = ["-Wno-ignored-attributes", "-Wno-unknown-attributes"]
        bounds = "array-bounds"  # clang's other half of "bounds" reports by SIGILL
        checks += ["-mllvm", "-tsan-instrument-read-before-write=1"]
    command = [
        *_builder(),
        *KERNEL_FLAGS,
        *WARNINGS,
        *dialect,
        *(check.format(bounds=bounds) for check in checks),
        f"-I{SHIM}",
        f"-I{mlx_headers()}",
        "-c",
    ]
    built, warnings = _built(name, command, _stamp(SHIM), text, ".o")
    link = [*_builder(), "-O1", "-shared", str(built)]
    linked, _ = _built(name, link, "", None, ".so")
    return linked, warnings


def _builder() -> tuple[str, ...]:
    command = builder()
    assert command is not None, missing()
    return command


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
        done = run_compiler(command)
        if done.returncode:
            raise CompileError(f"$ {' '.join(command)}\n{done.stderr}")
        # Log first: a module without its log is built again.
        (Path(folder) / "log").write_text(done.stderr)
        os.replace(Path(folder) / "log", log)
        os.replace(output, target)
    return target, done.stderr
