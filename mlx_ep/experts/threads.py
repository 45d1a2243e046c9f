"""How many threads NumPy's BLAS uses."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

# What the user may have set; then it stays.
VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS")


def limit_blas_threads(num_threads: int) -> bool:
    """Limit the OpenBLAS that comes with NumPy's wheels, for this process.

    Its threads wait for one another by spinning: where ranks on one host have more of
    them than there are cores, a layer took 7 to 70 times as long (measured, 2 processes
    with 2 threads each on 2 cores that others used too). macOS's own BLAS has no such
    setting.

    Returns:
        Whether there was anything to limit.
    """
    if any(os.environ.get(name) for name in VARIABLES):
        return False
    library = _openblas()
    if library is None:
        return False
    library.scipy_openblas_set_num_threads64_(num_threads)
    return True


def blas_threads() -> int | None:
    """The threads that it uses now, None where that cannot be told."""
    library = _openblas()
    return None if library is None else library.scipy_openblas_get_num_threads64_()


def _openblas() -> ctypes.CDLL | None:
    libraries = Path(np.__file__).parent.parent / "numpy.libs"
    for file in libraries.glob("libscipy_openblas64_*"):
        library = ctypes.CDLL(str(file))  # loaded already: this only finds it
        if hasattr(library, "scipy_openblas_set_num_threads64_"):
            return library
    return None
