"""What a process of `fork_server.py` has imported before others are forked from it."""

from __future__ import annotations

import importlib
import pkgutil


def import_all(checks_shapes: bool) -> None:
    """Import this package and what it uses.

    Args:
        checks_shapes: as pytest checks them in its own process.
    """
    if checks_shapes:
        from tests.support import shape_checks

        shape_checks.install("mlx_ep")
    import mlx_lm.server  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    import mlx_ep
    import tests.support.tiny  # noqa: F401

    for module in pkgutil.walk_packages(mlx_ep.__path__, "mlx_ep."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    if checks_shapes:
        shape_checks.make_all()
