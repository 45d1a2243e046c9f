"""Start a command on every rank: ``mlx_ep.launch``.

As mlx.launch, with an exit code that one can trust: that of the rank that failed first.
Rank 0 on this machine has the terminal to itself (a chat can be typed, a bar drawn);
what the other ranks print is marked with their number.
"""
