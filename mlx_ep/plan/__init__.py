"""What a cluster would hold of a model, and how fast it would be: ``mlx_ep.plan``."""
