"""``python -m mlx_ep``: the commands, and ``python -m mlx_ep COMMAND`` to run one."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "generate": "one prompt, streamed; or many from a file",
    "chat": "several turns, in a terminal",
    "server": "an OpenAI- and Anthropic-compatible endpoint",
    "plan": "what every Mac would hold, if it fits, how fast it is",
    "launch": "start a command on every rank",
    "doctor": "check this cluster: kernels, links, tokens; answers",
    "benchmark": "measure expert against tensor parallelism",
    "calibrate": "measure this cluster's hardware profile",
    "simulate": "serving on a cluster that you do not have",
    "perplexity": "perplexity on a text file",
    "cache_prompt": "keep a prompt's KV cache in a file",
    "overlay": "let mlx-lm's own commands run expert-parallel",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"mlx_ep.{name}", *sys.argv[2:]]
        runpy.run_module(f"mlx_ep.{name}", run_name="__main__", alter_sys=True)
        return
    if name == "--version":
        from mlx_ep.cli.say import versions

        print(versions())
        return
    lines = [f"  mlx_ep.{command:<13} {what}" for command, what in COMMANDS.items()]
    listed = "\n".join(["Commands of mlx_ep (--help of each lists its flags):", *lines])
    if name not in ("-h", "--help"):
        print(
            f"python -m mlx_ep: error: there is no command {name!r}.", file=sys.stderr
        )
        print(listed, file=sys.stderr)
        sys.exit(2)
    print(listed)


if __name__ == "__main__":
    main()
