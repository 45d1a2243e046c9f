"""Data movement and decode experts as Metal kernels, each with a twin in mx ops.

`metal` and `ops` hold functions of the same names and signatures. `ops` runs everywhere
and says what a kernel computes; `metal` needs Metal.
"""

from mlx_ep.kernels.records import (
    Activation,
    Projection,
    ReplicaTables,
    RouteTables,
    RowFormat,
    format_words,
)

__all__ = [
    "Activation",
    "Projection",
    "ReplicaTables",
    "RouteTables",
    "RowFormat",
    "format_words",
]
