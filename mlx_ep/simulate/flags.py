"""The flags of ``mlx_ep.simulate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_ep import cli
from mlx_ep.simulate.engine import ROUTING_POLICIES
from mlx_ep.simulate.plot import check_can_plot
from mlx_ep.simulate.routing import EXPERT_POLICIES
from mlx_ep.simulate.settings import DTYPES, KV_DTYPES, SCHEDULERS, EngineSettings
from mlx_ep.simulate.times.exchanges import EXCHANGES


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """What an engine is told; the defaults are those of `EngineSettings`."""
    defaults = EngineSettings()
    group = parser.add_argument_group(
        "engine (an instance of the cluster may override)"
    )
    group.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default=defaults.scheduler,
        help="vllm: one budget of tokens a step; mlx_ep: as mlx_ep.server does, with "
        "--prefill-step (default: %(default)s).",
    )
    group.add_argument(
        "--prefill-step-size",
        "--prefill-step",
        type=cli.positive,
        default=defaults.prefill_step,
        metavar="TOKENS",
        help="With --scheduler mlx_ep: tokens of prompts beside a decoded token "
        "(default: %(default)s).",
    )
    group.add_argument(
        "--max-num-seqs",
        type=cli.positive,
        default=defaults.max_num_seqs,
        help="Sequences that run at once (default: %(default)s).",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=cli.at_least(0),
        default=defaults.max_num_batched_tokens,
        help="Tokens of one step; 0: no limit (default: %(default)s).",
    )
    group.add_argument(
        "--long-prefill-token-threshold",
        type=cli.at_least(0),
        default=defaults.long_prefill_token_threshold,
        help="Prompt tokens of one request in a step; 0: no limit (default: "
        "%(default)s).",
    )
    for name, text in (
        ("enable-chunked-prefill", "Cut a prompt to what is left of a step"),
        ("enable-prefix-caching", "Compute blocks of equal tokens once"),
        ("reserve-full-isl", "Admit a request where its whole prompt has blocks"),
        ("async-scheduling", "Schedule a step while the one before runs"),
        ("graphs", "Run small steps as captured graphs of some batch sizes"),
    ):
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=getattr(defaults, name.replace("-", "_")),
            help=f"{text} (default: %(default)s).",
        )
    group.add_argument(
        "--npu-memory-utilization",
        type=cli.part,
        default=defaults.memory_utilization,
        metavar="PART",
        help="Of a device's memory, for weights and KV blocks (default: %(default)s).",
    )
    group.add_argument(
        "--block-size",
        type=cli.positive,
        default=defaults.block_size,
        help="Tokens of a KV block (default: %(default)s).",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default=defaults.dtype,
        help="Of weights and activations (default: %(default)s).",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=KV_DTYPES,
        default=defaults.kv_cache_dtype,
        help="auto: as --dtype (default: %(default)s).",
    )
    group.add_argument(
        "--skip-prefill",
        action="store_true",
        help="Prompts are in the cache when they arrive; only decode runs.",
    )


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """The cluster, where its models and times are, and how requests and tokens go."""
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--cluster-config",
        type=Path,
        required=True,
        metavar="FILE",
        help="Nodes, instances and links, as JSON.",
    )
    group.add_argument(
        "--model-dir",
        type=Path,
        metavar="DIR",
        help="Where <model_name>.json is (default: models/ here, or beside or above "
        "the cluster file).",
    )
    group.add_argument(
        "--profile-dir",
        type=Path,
        metavar="DIR",
        help="Where <hardware>/<model_name>/<dtype> is (default: perf/, likewise). An "
        "instance's hardware may also be a profile of mlx_ep.calibrate: a file, or the "
        "name of a shipped one.",
    )
    group.add_argument(
        "--request-routing-policy",
        choices=ROUTING_POLICIES,
        default="LOAD",
        help="Which instance takes a request. LOAD: the least 4 * waiting + running "
        "(default: %(default)s).",
    )
    group.add_argument(
        "--request-routing-file",
        type=Path,
        metavar="FILE",
        help="With CUSTOM: a JSON list of an instance per request.",
    )
    group.add_argument(
        "--expert-routing-policy",
        choices=EXPERT_POLICIES,
        default="COPY",
        help="Which experts tokens take. COPY: uniform, one layer stands for all; "
        "BALANCED: uniform, and all ranks alike; RR: in turns; RAND: drawn in every "
        "step; CUSTOM: by weights; TRACE: as recorded (default: %(default)s).",
    )
    group.add_argument(
        "--expert-routing-file",
        type=Path,
        metavar="FILE",
        help="With CUSTOM weights as JSON, with TRACE a recording (.npz).",
    )
    group.add_argument(
        "--expert-exchange",
        choices=EXCHANGES,
        default="allgather",
        help="How tokens meet experts of other ranks. allgather: as vLLM does; none: "
        "for nothing; the others are this package's strategies (default: %(default)s).",
    )
    cli.add_config_flags(group, ["placement_file", "replica_memory", "overlap"])
    group.add_argument(
        "--link",
        metavar="NAME",
        help="With a profile: which of its links (default: its first).",
    )
    group.add_argument(
        "--seed",
        type=cli.at_least(0),
        default=0,
        help="Of RAND (default: %(default)s).",
    )


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.simulate",
        description="Serving on a cluster, in simulated time: no device, no weights. "
        "Further commands: mlx_ep.simulate validate, mlx_ep.simulate calibrate.",
    )
    add_cluster_flags(parser)
    add_settings_flags(parser)
    load = parser.add_argument_group("load and output")
    load.add_argument(
        "--dataset",
        type=Path,
        required=True,
        metavar="FILE",
        help="Requests, as JSON lines.",
    )
    load.add_argument(
        "--num-reqs",
        type=cli.at_least(0),
        default=0,
        help="The first so many requests; 0: all (default: %(default)s).",
    )
    load.add_argument(
        "--output",
        metavar="FILE",
        help="Write a CSV line per request; {run_id} is replaced.",
    )
    load.add_argument(
        "--run-id", default="", help="In the name of --output (default: none)."
    )
    cli.add_json_flag(load, "totals")
    load.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="Draw TTFT, ITL, requests and KV blocks over time, as PNG.",
    )
    load.add_argument(
        "--log-interval",
        type=cli.above_zero,
        default=1.0,
        metavar="SECONDS",
        help="Of simulated time between log lines; --log-level warning leaves them out "
        "(default: %(default)s).",
    )
    return parser


def settings_of(args: argparse.Namespace) -> EngineSettings:
    """The engine settings that the flags say."""
    return EngineSettings(
        scheduler=args.scheduler,
        prefill_step=args.prefill_step_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        long_prefill_token_threshold=args.long_prefill_token_threshold,
        block_size=args.block_size,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        enable_chunked_prefill=args.enable_chunked_prefill,
        enable_prefix_caching=args.enable_prefix_caching,
        reserve_full_isl=args.reserve_full_isl,
        memory_utilization=args.npu_memory_utilization,
        skip_prefill=args.skip_prefill,
        async_scheduling=args.async_scheduling,
        graphs=args.graphs,
    )


def check_files(args: argparse.Namespace, *names: str) -> None:
    """Whether the files that are written at the end can be.

    Args:
        names: of the flags that name them, as attributes of `args`.

    Raises:
        ValueError: one cannot, or --plot cannot draw here.
    """
    for name in names:
        file = getattr(args, name)
        if file is not None and not (name == "json" and str(file) == "-"):
            endings = cli.PICTURES if name == "plot" else ()
            cli.check_output(f"--{name}", Path(file), endings)
    if "plot" in names and args.plot is not None:
        check_can_plot()
