"""Check this machine or cluster: ``mlx_ep.doctor``."""


def main() -> None:
    """``mlx_ep.doctor``; nothing is imported before it runs."""
    from mlx_ep.doctor.__main__ import main as run_command

    run_command()
