"""The flags of ``mlx_ep.plan``."""

from __future__ import annotations

from pathlib import Path

from mlx_ep import cli
from mlx_ep.cost.profile import shipped_profiles
from mlx_ep.loading.caches import PREFILL_STEP

DEFAULT_CONTEXT = 4096


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.plan",
        description="What every rank of a cluster would hold of a model, whether it "
        "fits, and predicted speeds. No launcher, and no weight is read. Exit code 1: "
        "it does not fit.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="A model folder, its config.json, a hub repository, or the model inside "
        "the package.",
    )
    parser.add_argument(
        "--revision", help="A branch, tag or commit of the hub repository."
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--ranks",
        type=cli.positive,
        help="How many Macs (default: as many as --memory).",
    )
    cluster.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="A hostfile of mlx.launch: as many ranks as it has hosts, each asked by "
        "ssh for its memory unless --memory says it.",
    )
    cli.add_config_flags(cluster, [*cli.PLACEMENT, "attention", "pp"])
    cluster.add_argument(
        "--write-placement",
        type=Path,
        metavar="FILE",
        help="Write the placement as a file for --placement.",
    )
    cluster.add_argument(
        "--record",
        metavar="FILE.npz",
        help="What mlx_ep.generate --record wrote: places by it, as --placement "
        "FILE.npz does, and is what --plot shows.",
    )
    cluster.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="With --record: draw the load of every layer and rank, with the experts "
        "in their order and as placed.",
    )
    use = parser.add_argument_group("use")
    use.add_argument(
        "--context",
        type=cli.positive,
        default=DEFAULT_CONTEXT,
        metavar="TOKENS",
        help="Tokens of a sequence.",
    )
    use.add_argument(
        "--sequences",
        type=cli.positive,
        default=1,
        help="Sequences at once.",
    )
    use.add_argument(
        "--kv-bits",
        type=int,
        choices=cli.KV_BITS,
        help="Bits of a quantized KV cache, as of mlx_lm.generate.",
    )
    use.add_argument(
        "--kv-group-size",
        type=int,
        choices=cli.KV_GROUP_SIZES,
        default=64,
        help="With --kv-bits.",
    )
    use.add_argument(
        "--quantized-kv-start",
        type=cli.at_least(0),
        default=0,
        help="With --kv-bits: from this token on.",
    )
    use.add_argument(
        "--prefill-step-size",
        type=cli.positive,
        default=PREFILL_STEP,
        help="Tokens of a step of prefill.",
    )
    speeds = parser.add_argument_group("predicted speeds")
    speeds.add_argument(
        "--profile",
        metavar="NAME_OR_FILE",
        help="A hardware profile (default: what mlx_ep.calibrate left on this machine "
        "for as many ranks).",
    )
    speeds.add_argument(
        "--chip",
        metavar="NAME[,NAME...]",
        help="Shipped profiles, of all Macs or of each; the slowest counts: "
        f"{', '.join(shipped_profiles())}.",
    )
    speeds.add_argument("--link", help="Of the profile (default: its first).")
    load = parser.add_argument_group("simulated load")
    load.add_argument(
        "--simulate",
        type=Path,
        metavar="TRACE",
        help="Serve these requests (JSON lines of mlx_ep.simulate) on 1, 2, 4 .. "
        "--ranks Macs of every --chip, in every way, in simulated time.",
    )
    load.add_argument(
        "--price",
        metavar="CHIP=NUMBER[,...]",
        help="Of one Mac, for --simulate.",
    )
    load.add_argument(
        "--most-ttft",
        type=cli.at_least_zero,
        metavar="MS",
        help="Mean that the pick must keep; the cheapest that does is picked.",
    )
    load.add_argument(
        "--most-tpot", type=cli.at_least_zero, metavar="MS", help="Likewise."
    )
    cli.add_json_flag(parser, "everything")
    return parser
