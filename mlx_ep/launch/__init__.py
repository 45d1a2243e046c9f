"""Start a command on every rank, with an exit code that one can trust.

As mlx.launch does, but the code is that of the rank that failed first. Rank 0 on this
machine has the terminal to itself (a chat can be typed, a bar drawn); what the other
ranks print is marked with their number.
"""


def main() -> None:
    """``mlx_ep.launch``; nothing is imported before it runs."""
    from mlx_ep.launch.__main__ import main as run_command

    run_command()
