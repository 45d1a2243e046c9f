"""Executes Metal kernels on the CPU, with checks and byte counters. See README.md."""

from .build import CompileError
from .compilers import missing
from .dropin import install, metal_kernel
from .execute import Finding, KernelError, Launch, Traffic
from .lint import lint

__all__ = [
    "install",
    "metal_kernel",
    "missing",
    "Launch",
    "Traffic",
    "Finding",
    "KernelError",
    "CompileError",
    "lint",
]
