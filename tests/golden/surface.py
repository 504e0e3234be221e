"""The commands with their flags, and their --help, as plain values."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from typing import Any, get_args

import pytest
import typer.main
from commands import commands, default_of, options

from marsinfer_cli.app import app, run

WIDTH = 100
TOP = "marsinfer"  # stands for the command without words
OF_CLICK = {"text": "str", "integer": "int", "integer range": "int", "float": "float", "boolean": "bool"}
# by any of these rich or Typer would take a file for a terminal, or give it another width
OF_TERMINALS = ("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH", "TTY_COMPATIBLE")


def versions() -> dict[str, str]:
    """Of the packages that lay out --help and word the messages about flags that cannot be parsed."""
    return {name: version(name) for name in ("typer", "rich")}


@contextmanager
def plain_surroundings() -> Iterator[None]:
    """Neither the terminal, nor settings in the environment, nor models in the hub's cache are seen."""
    import typer.rich_utils

    ours = [name for name in os.environ if name.startswith("MARSINFER_")]
    with pytest.MonkeyPatch.context() as patch:
        for name in (*OF_TERMINALS, *ours):
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", str(WIDTH))
        patch.setenv("HF_HUB_CACHE", os.path.join(os.sep, "nowhere"))
        # Typer has read the environment when it was imported
        patch.setattr(typer.rich_utils, "MAX_WIDTH", WIDTH)
        patch.setattr(typer.rich_utils, "FORCE_TERMINAL", None)
        yield


def all_commands() -> dict[str, Any]:
    """Those of `commands`, and the two that only hold others."""
    root = typer.main.get_command(app)
    return {TOP: root, "bench": root.commands["bench"], **commands()}


def flags() -> dict[str, Any]:
    """Arguments with their places and options by name, of every command; what is not said is none or no."""
    with plain_surroundings():
        return {words: _described(command) for words, command in sorted(all_commands().items())}


def _described(command: Any) -> dict[str, Any]:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    return {
        "arguments": {each.metavar: _said(_argument(n, each)) for n, each in enumerate(arguments)},
        "options": {
            each.opts[0]: _said(_option(each))
            for each in sorted(options(command), key=lambda each: each.opts[0])
        },
    }


def _said(description: dict[str, Any]) -> dict[str, Any]:
    """Zero says something."""
    return {
        key: value for key, value in description.items() if value is not False and value not in (None, [])
    }


def _argument(place: int, argument: Any) -> dict[str, Any]:
    return {
        "place": place,
        "type": _type(argument),
        "repeatable": argument.nargs == -1,
        "required": argument.required,
        "hidden": argument.hidden,
        "help": argument.help,
    }


def _option(option: Any) -> dict[str, Any]:
    return {
        "spellings": [*option.opts, *option.secondary_opts],
        "metavar": option.metavar,
        "type": _type(option),
        "least": _bound(option, "min"),
        "most": _bound(option, "max"),
        "switch": option.is_flag,
        "repeatable": option.multiple,
        "required": option.required,
        "hidden": option.hidden,
        "default": default_of(option),
        "panel": option.rich_help_panel,
        "help": option.help,
        "completes": [item.value for item in option.shell_complete(None, "")],
    }


def _type(parameter: Any) -> str:
    """Of one value. Older versions of Typer keep a type of Click's, newer ones the annotation."""
    if hasattr(parameter, "type"):
        return OF_CLICK[parameter.type.name]
    annotation = parameter.type_descriptor.annotation
    return next(iter(get_args(annotation)), annotation).__name__


def _bound(option: Any, name: str) -> float | None:
    return getattr(getattr(option, "type", option), name, None)


def help_texts() -> dict[str, str]:
    """What --help prints, by the name of the file that holds it; without the spaces that pad its lines."""
    return {f"{words.replace(' ', '-')}.txt": _help(words) for words in all_commands()}


def _help(words: str) -> str:
    printed = io.StringIO()
    before = [] if words == TOP else words.split()
    with plain_surroundings(), redirect_stdout(printed):
        assert run([*before, "--help"]) == 0
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
