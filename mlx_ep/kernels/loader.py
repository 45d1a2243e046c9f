"""From a .metal file to a kernel that can be called.

A .metal file holds whole functions. MLX wants the body of a kernel and generates its
signature, so the file is the `header` that MLX puts first, and the body is one call of
the function that bears the file's name. metal/README.md says more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx


def source(name: str) -> str:
    """The text of a file of metal/: in the package when installed, else beside it."""
    package = Path(str(resources.files("mlx_ep")))
    installed = package / "metal" / name
    checkout = package.parent / "metal" / name
    return (installed if installed.exists() else checkout).read_text()


@cache
def header(name: str) -> str:
    """A .metal file as one text: its own includes put in place, each once.

    Compiler messages keep the names and lines of the files.
    """
    included: set[str] = set()

    def expand(file: str) -> str:
        included.add(file)
        lines = [f'#line 1 "{file}"']
        for number, line in enumerate(source(file).splitlines(), start=1):
            if line.startswith('#include "'):
                inner = line.split('"')[1]
                if inner not in included:
                    lines.append(expand(inner))
                lines.append(f'#line {number + 1} "{file}"')
            else:
                lines.append("" if line == "#pragma once" else line)
        return "\n".join(lines)

    return expand(f"{name}.metal") + f'\n#line 1 "{name}.call"\n'


KERNELS = (
    "choose_replicas",
    "dequantize_rows",
    "expert_down",
    "expert_glu",
    "pack_rows",
    "quantize_rows",
    "route_plan",
    "unpack_sum",
)


def sources_digest() -> str:
    """A short text that differs where the kernels do."""
    text = "".join(header(name) for name in KERNELS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def kernel(
    name: str,
    variant: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    body: str,
) -> Callable[..., list[mx.array]]:
    """The kernel of a .metal file, built at its first use.

    Args:
        name: of the file, without ".metal".
        variant: tells sets of inputs apart; types and template arguments MLX adds.
        inputs: names of the input arrays.
        outputs: names of the output arrays.
        body: the call of the file's function, after its threadgroup arrays.
    """
    # Not at import: before 0.32 MLX cannot build one where there is no Metal. The name
    # is its own: MLX tells kernels of one evaluation apart by name only.
    built: Any = mx.fast.metal_kernel(
        name=f"mlx_ep_{name}{variant}",
        input_names=list(inputs),
        output_names=list(outputs),
        header=header(name),
        source=body,
    )
    return built


def forget_kernels() -> None:
    """Drops what is loaded and built, for tests that replace mx.fast.metal_kernel."""
    header.cache_clear()
    kernel.cache_clear()
