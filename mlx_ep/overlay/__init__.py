"""A folder with which mlx-lm's own commands run expert-parallel, unmodified."""
