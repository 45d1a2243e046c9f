"""The control channel: what ranks say to one another beside `mx.distributed`.

    rank 0 ===== watch 0 ----TCP---- watch 1 ===== rank 1
                    \\-------TCP---- watch 2 ===== rank 2

Each rank starts a small process of its own, its watch (`watch.py`), which holds the
network connections, a star around the watch of rank 0 (`hub.py`). Why a process and
not a thread: MLX holds the interpreter's lock while it connects, so no thread of the
rank runs then; a rank that is stopped (SIGSTOP) or dead cannot speak for itself; and a
signal that arrives meanwhile has to be heeded. The watch is the rank's child, in a
session of its own: Ctrl-C and Ctrl-Z in the terminal do not reach it, and it sees its
parent stop, die, or lose its launcher, and can kill it. It needs no compiled code of
ours, on macOS and Linux alike: a socket pair carries words, a page of shared memory
carries progress without a system call (`progress.py`), and Python's C signal handler
writes the number of a signal straight to the watch, even while the lock is held.

Nothing here may import mlx: a watch must start in milliseconds and hold little memory.
"""
