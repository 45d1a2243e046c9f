"""``mlx_ep.overlay`` and ``python -m mlx_ep.overlay``."""

from mlx_ep.overlay.make import main

if __name__ == "__main__":
    main()
