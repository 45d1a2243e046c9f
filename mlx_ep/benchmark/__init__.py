"""Expert against tensor parallelism, measured end to end: ``mlx_ep.benchmark``."""
