"""Generate text with an expert-parallel model: one prompt, streamed, or many."""


def main() -> None:
    """``mlx_ep.generate``; nothing is imported before it runs."""
    from mlx_ep.generate.__main__ import main as run_command

    run_command()
