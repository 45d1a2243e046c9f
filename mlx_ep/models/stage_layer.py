"""The mark of a layer that is on another rank."""

from __future__ import annotations


class StandInLayer:
    """In the place of a layer of another stage; see `mlx_ep.models.pipeline`."""
