"""Run mlx-lm's own commands expert-parallel, unmodified: ``mlx_ep.overlay``.

It makes a folder that mlx-lm takes for a model: links to the model's files, and a
config.json whose ``model_file`` names a Python file. From there mlx-lm gets the model's
class (with --trust-remote-code), that of `mlx_ep.overlay.model`: the architecture's
own, which gives a rank its part of the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlx_ep import cli
from mlx_ep.comm import Comm, agreed, gather_objects, host_id
from mlx_ep.config import EPConfig
from mlx_ep.loading import OVERLAY_FILE, find_model, read_config
from mlx_ep.loading.local import count_experts, model_class, refuse_dense
from mlx_ep.overlay.model import OverlaySettings

MODEL_FILE = "ep_model.py"
_MODEL_SOURCE = """\
# Made by mlx_ep.overlay; mlx-lm takes the model's class from here.
from mlx_ep.overlay.model import model_classes

Model, ModelArgs = model_classes(__file__)
"""


def make_overlay(
    model: str,
    output: Path | None = None,
    config: EPConfig = EPConfig(),  # noqa: B008, it is frozen
    *,
    revision: str | None = None,
    ranks: int | None = None,
) -> Path:
    """Make the folder with which mlx-lm's commands run a model expert-parallel.

    Args:
        model: a model folder, a hub repository, or ``jargon-moe``.
        output: the folder; default: the model's name with ``-ep``, in the working
            folder. An overlay that is there already is made anew.
        config: how the model is made expert-parallel.
        revision: a branch, tag or commit of a repository.
        ranks: the number of ranks that the model must run on; None is any.

    Returns:
        The full path of the folder.

    Raises:
        ValueError: the model cannot be made expert-parallel so, or the folder holds
            something else.
    """
    if config.strategy != "replicated":
        raise ValueError(
            "mlx-lm's commands give every rank the same tokens: an overlay goes with "
            f"--strategy replicated only, got {config.strategy}."
        )
    if config.overlap in ("two", "auto"):
        raise ValueError(
            "An overlay's model keeps its class, and steps in two need one of their "
            f"own: it goes with --overlap none or single, got {config.overlap}."
        )
    if (Path(model).expanduser() / OVERLAY_FILE).exists():
        raise ValueError(f"{model} is an overlay already; give the model itself.")
    source = find_model(model, revision).resolve()
    model_config = read_config(source)
    model_class(model_config)
    refuse_dense(count_experts(model_config), "an overlay")
    folder = (output or Path(f"{Path(model).name}-ep")).expanduser().resolve()
    _make_empty(folder)
    made_here = ("config.json", MODEL_FILE, OVERLAY_FILE, "__pycache__")
    for entry in source.iterdir():
        if entry.name not in made_here:
            (folder / entry.name).symlink_to(entry)
    values = json.loads((source / "config.json").read_text())
    values["model_file"] = MODEL_FILE
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    (folder / MODEL_FILE).write_text(_MODEL_SOURCE)
    OverlaySettings(source, config, ranks).save(folder)
    return folder


def _make_empty(folder: Path) -> None:
    """An empty folder, or an overlay's with its links taken away."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = list(folder.iterdir())
    if entries and not (folder / OVERLAY_FILE).exists():
        raise ValueError(
            f"--output must be a new or empty folder, or an overlay; {folder} holds "
            f"{entries[0].name}."
        )
    for entry in entries:
        if entry.is_symlink():
            entry.unlink()


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="mlx_ep.overlay",
        description="Make a folder with which mlx_lm.server, mlx_lm.chat, "
        "mlx_lm.generate and mlx_lm.benchmark run a model expert-parallel. Under "
        "mlx.launch every host makes its own.",
    )
    parser.add_argument(
        "model", help="A model folder, a hub repository, or jargon-moe."
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="The folder to make (default: the model's name with -ep, here).",
    )
    parser.add_argument(
        "--revision", help="A branch, tag or commit of the hub repository."
    )
    cli.add_ep_flags(parser)
    return parser


def main() -> None:
    cli.run(make_parser(), _overlay)


def _overlay(args: argparse.Namespace, comm: Comm) -> None:
    with cli.usage_errors():
        folder = _make_on_hosts(args, comm)
    if comm.rank == 0:
        print(_HOW_TO_RUN.format(folder=folder, model_file=MODEL_FILE))


def _make_on_hosts(args: argparse.Namespace, comm: Comm) -> str:
    """Make the overlay once on every host, at the same path, which is returned.

    Raises:
        ValueError: on every rank: a host cannot, or its path is another.
    """
    hosts = gather_objects(comm, host_id())

    def make() -> str:
        if hosts.index(hosts[comm.rank]) != comm.rank:  # not the first of its host
            return ""
        try:
            made = make_overlay(
                args.model,
                args.output,
                args.config,
                revision=args.revision,
                ranks=args.ranks,
            )
        except OSError as error:
            raise ValueError(
                f"--output must be a folder that can be written: {error}."
            ) from error
        return str(made)

    folder = agreed(comm, make)
    folders = sorted({path for path in gather_objects(comm, folder) if path})
    if len(folders) > 1:
        raise ValueError(
            "An overlay must be at the same path on every host; got "
            f"{', '.join(folders)}. Give it with --output."
        )
    return folders[0]


_HOW_TO_RUN = """\
{folder}
is an overlay: on every host, at this path, mlx-lm runs it expert-parallel:

    mlx.launch --hostfile hosts.json -- mlx_lm.server --model {folder} \\
        --trust-remote-code
    mlx.launch --hostfile hosts.json -- mlx_lm.chat --model {folder} \\
        --trust-remote-code
    mlx.launch --hostfile hosts.json -- mlx_lm.generate --model {folder} \\
        --trust-remote-code --prompt "..."
    mlx.launch --hostfile hosts.json -- mlx_lm.benchmark --model {folder} \\
        --trust-remote-code

On one host: mlx.launch -n 2 -- mlx_lm.server ... The -- keeps mlx.launch from taking
flags of the command for its own. --trust-remote-code lets mlx-lm run {model_file}."""
