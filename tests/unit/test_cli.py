"""Flags: made of EPConfig's fields, one configuration, defaults in the help."""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from mlx_ep.__main__ import COMMANDS, main
from mlx_ep.cli import Parser, add_ep_flags
from mlx_ep.config import EPConfig, settings

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {
    "generate": "mlx_ep.generate.flags",
    "chat": "mlx_ep.chat",
    "server": "mlx_ep.server.flags",
    "perplexity": "mlx_ep.perplexity",
    "plan": "mlx_ep.plan.flags",
    "overlay": "mlx_ep.overlay.make",
    "cache_prompt": "mlx_ep.cache_prompt",
    "launch": "mlx_ep.launch.flags",
    "doctor": "mlx_ep.doctor.__main__",
    "calibrate": "mlx_ep.calibrate",
    "benchmark": "mlx_ep.benchmark.flags",
}

REQUIRED = {
    "cache_prompt": ["--prompt-cache-file", "x", "--prompt", "x"],
    "overlay": ["jargon-moe"],
}


def make_parser(command: str) -> argparse.ArgumentParser:
    return import_module(PARSERS[command]).make_parser()


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="test")
    add_ep_flags(parser, has_data=True, has_stages=True)
    return parser


def test_the_defaults_are_those_of_the_configuration(parser: Parser) -> None:
    args = parser.parse_args([])
    assert args.config == EPConfig()
    # What a command does with a field goes through the configuration.
    assert not {setting.name for setting in settings()} & set(vars(args))


VALUES = {
    "strategy": ("deepep", "all_to_all"),
    "attention": ("auto", "auto"),
    "memory": ("5,6.5", (5.0, 6.5)),
    "warmup": (None, False),
    "eval_layers": ("4", 4),
    "check_nan": (None, True),
    "rebalance_below": ("0.5", 0.5),
    "placement_file": ("FILE", "FILE"),
    "memory_limit_gb": ("2.5", 2.5),
    "capacity": ("3", 3),
    "replica_memory": ("24GB", "24GB"),
}


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize("setting", settings(), ids=lambda s: s.name)
def test_each_field_has_a_flag(setting, parser: Parser) -> None:
    """And it sets that field."""
    by_default = getattr(EPConfig(), setting.name)
    if setting.name in VALUES:
        text, value = VALUES[setting.name]
    elif isinstance(by_default, int) or setting.name == "ep_size":
        text, value = "7", 7
    else:  # another of its choices
        choices = parser._option_string_actions[setting.flag_name].choices
        text = value = next(choice for choice in choices if choice != by_default)
    line = [setting.flag_name, *([] if text is None else [text])]
    if setting.name == "dispatch_dtype":  # rows travel with it
        line += ["--strategy", "gathered"]
    found = getattr(parser.parse_args(line).config, setting.name)
    assert found == value != by_default


@pytest.mark.parametrize(
    ("command", "line"),
    [
        *((name, "--dispatch-dtype int8")
          for name in ("chat", "perplexity", "cache_prompt", "overlay")),
        *((name, "--pp 2")
          for name in ("chat", "perplexity", "cache_prompt", "overlay", "server")),
    ],
)  # fmt: skip
def test_a_flag_that_a_command_cannot_honour_is_not_there(
    command: str, line: str, capsys
) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser(command).parse_args([*REQUIRED.get(command, []), *line.split()])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {line}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "--prompts-file x", "--prompt-cache-file x", "--draft-model x", "--kv-bits 4",
        "--max-kv-size 9", "--record x.npz", "--timings", "--attention tensor",
        "--overlap two", "--overlap auto", "--ep 2", "--replica-memory 1GB",
    ],
)  # fmt: skip
def test_generate_refuses_what_stages_do_not_do(line: str, capsys) -> None:
    """When flags are read, so before a model is looked for."""
    with pytest.raises(SystemExit) as ended:
        make_parser("generate").parse_args(["--pp", "2", *line.split()])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"--pp 2 does not go with {line.split()[0]}" in said


@pytest.mark.parametrize("command", PARSERS)
def test_the_help_shows_every_default(command: str) -> None:
    parsers = [make_parser(command)]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    checked = 0
    for parser in parsers:
        text = parser.format_help()
        formatter = parser._get_formatter()
        for action in parser._actions:
            has_default = action.default is not argparse.SUPPRESS
            if not action.option_strings or action.required or not has_default:
                continue
            said = formatter._expand_help(action)
            assert re.search(r"default[^)]*: ", said), (action.option_strings, said)
            assert action.option_strings[0] in text
            checked += 1
    assert checked >= 2


def test_the_list_of_commands() -> None:
    # simulate has LLMServingSim's flags, and a parser of its own.
    assert set(COMMANDS) == {*PARSERS, "simulate"}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {f"mlx_ep.{command}" for command in COMMANDS}
    for target in scripts.values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name))


def test_python_m_mlx_ep(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mlx_ep"])
    main()
    listed = capsys.readouterr().out
    assert all(f"mlx_ep.{command} " in listed for command in COMMANDS)
    assert max(map(len, listed.splitlines())) <= 80
    monkeypatch.setattr(sys, "argv", ["mlx_ep", "generat"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "there is no command 'generat'" in capsys.readouterr().err


@pytest.mark.parametrize("command", PARSERS)
def test_version(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser(command).parse_args(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("mlx-ep ")
