"""Address spaces and vector types, checked by clang without executing anything.

The shim that executes kernels defines `device`, `threadgroup` and `constant` as
nothing. Here they are clang's address spaces, and vectors are clang's own, against
declarations of the library (shim/msl_lint.h): a pointer to the wrong memory is then a
type error.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from functools import cache

from .build import SHIM
from .translate import translate

# 17: the first that casts vectors of bfloat.
_CANDIDATES = ["clang++", *(f"clang++-{version}" for version in range(22, 16, -1))]

_FLAGS = shlex.split(
    "-x c++ -std=gnu++17 -fsyntax-only -DMSL_LINT -Wall -Wextra -Wno-unused "
    "-Wno-unknown-attributes -Wno-ignored-attributes -Wno-sign-compare "
    "-Wno-duplicate-decl-specifier -Wno-unknown-pragmas -Wno-ignored-qualifiers "
    "-Wno-literal-range -Wdouble-promotion -Wno-user-defined-literals "
    "-Wno-reserved-user-defined-literal -Wno-undefined-internal "
    "-Wno-undefined-inline"
)

_VECTOR = r"\b(bool|u?char|u?short|u?int|u?long|half|bfloat|float)([234])\s*\("
_GENERIC_VECTOR = r"\bvec<\s*([^<>,]+?)\s*,\s*([234])\s*>\s*\("


@cache
def clang() -> str | None:
    """A clang++ of version 17 or later; None when there is none."""
    for name in filter(shutil.which, _CANDIDATES):
        command = [name, "-dumpversion"]
        version = subprocess.run(command, capture_output=True, text=True).stdout
        if int(version.split(".")[0] or 0) >= 17:
            return name
    return None


def lint(function: str, source: str) -> str:
    """clang's diagnostics for a generated kernel; empty when it has none."""
    compiler = clang()
    assert compiler is not None, "no clang++ >= 17"
    text, _ = translate(function, source, lint=True)
    cut = text.index(f'#line 1 "{function}.header"')
    # clang has no float4(a, b, c, d).
    code = re.sub(_VECTOR, r"metal::msl_make<\1, \2>(", text[cut:])
    code = re.sub(_GENERIC_VECTOR, r"metal::msl_make<\1, \2>(", code)
    command = [compiler, *_FLAGS, f"-I{SHIM}", "-"]
    done = subprocess.run(
        command, input=text[:cut] + code, capture_output=True, text=True
    )
    return done.stderr
