"""``mlx_ep.launch`` and ``python -m mlx_ep.launch``."""

from __future__ import annotations

import sys

from mlx_ep.launch.flags import make_parser
from mlx_ep.launch.mpi import run_mpi
from mlx_ep.launch.run import StartedRanks
from mlx_ep.launch.transport import transport


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.backend == "mpi":
        sys.exit(run_mpi(args))
    try:
        run = StartedRanks(args, *transport(args))
        run.start()
    except ValueError as error:
        parser.error(str(error))
    sys.exit(run.wait())


if __name__ == "__main__":
    main()
