"""What the process of `forked.py` has imported before ranks are forked from it."""

from __future__ import annotations

import importlib
import pkgutil

from jaxtyping import install_import_hook

# Shapes are checked as pytest checks them in its own process.
install_import_hook("mlx_ep", "beartype.beartype")

import mlx_ep  # noqa: E402
import tests.support.tiny  # noqa: E402, F401

for module in pkgutil.walk_packages(mlx_ep.__path__, "mlx_ep."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
