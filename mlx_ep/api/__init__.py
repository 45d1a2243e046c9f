"""Where all parts meet: a model becomes expert-parallel."""

from mlx_ep.api.calls import load, parallelize
from mlx_ep.api.install import ExpertParallel
from mlx_ep.api.prepared import PreparedModel, prepare

__all__ = ["ExpertParallel", "PreparedModel", "load", "parallelize", "prepare"]
