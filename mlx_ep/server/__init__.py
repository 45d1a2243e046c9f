"""An OpenAI-compatible server over all ranks: `python -m mlx_ep.server`."""
