"""Address spaces and vector types, checked by zig's clang without executing anything.

The shim that executes kernels defines `device`, `threadgroup` and `constant` as
nothing. Here they are clang's address spaces, and vectors are clang's own, against
declarations of the library (shim/msl_lint.h): a pointer to the wrong memory is then a
type error.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path

from .build import SHIM
from .compilers import cache_folder, run_compiler, zig
from .translate import translate

# zig has no -fsyntax-only.
_FLAGS = shlex.split(
    "-c -std=gnu++17 -DMSL_LINT -Wall -Wextra -Wno-unused "
    "-Wno-unknown-attributes -Wno-ignored-attributes -Wno-sign-compare "
    "-Wno-duplicate-decl-specifier -Wno-unknown-pragmas -Wno-ignored-qualifiers "
    "-Wno-literal-range -Wdouble-promotion -Wno-user-defined-literals "
    "-Wno-reserved-user-defined-literal -Wno-undefined-internal "
    "-Wno-undefined-inline"
)

_VECTOR = r"\b(bool|u?char|u?short|u?int|u?long|half|bfloat|float)([234])\s*\("
_GENERIC_VECTOR = r"\bvec<\s*([^<>,]+?)\s*,\s*([234])\s*>\s*\("


def lint(function: str, source: str) -> str:
    """clang's diagnostics for a generated kernel; empty when it has none."""
    compiler = zig()
    assert compiler is not None, "the address-space lint needs: pip install ziglang"
    text, _ = translate(function, source, lint=True)
    cut = text.index(f'#line 1 "{function}.header"')
    # clang has no float4(a, b, c, d).
    code = re.sub(_VECTOR, r"metal::msl_make<\1, \2>(", text[cut:])
    code = re.sub(_GENERIC_VECTOR, r"metal::msl_make<\1, \2>(", code)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        unit, output = Path(folder) / "kernel.cpp", Path(folder) / "output"
        unit.write_text(text[:cut] + code)
        command = [*compiler, *_FLAGS, f"-I{SHIM}", str(unit), "-o", str(output)]
        return run_compiler(command).stderr
