"""All commands with their flags, as Typer built them; and the README's section of flags, made from them.

python tests/commands.py writes that section anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from marsinfer_cli.app import app

README = Path(__file__).parents[1] / "README.md"
BEGINNING = "<!-- made by: python tests/commands.py -->\n"
END = "<!-- end of what is made -->\n"
OF_TYPER = ("--help", "--install-completion", "--show-completion")


def commands() -> dict[str, Any]:
    """Every command that does something, by its words behind `marsinfer`."""
    return dict(_below(typer.main.get_command(app), ()))


def _below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, each in getattr(command, "commands", {}).items():
        yield from _below(each, (*words, name))
    if not hasattr(command, "commands"):
        yield " ".join(words), command


def options(command: Any) -> list[Any]:
    """Its own flags, without those that Typer gives to all."""
    named = [each for each in command.params if each.param_type_name == "option"]
    return [each for each in named if each.opts[0] not in OF_TYPER]


def default_of(option: Any) -> str | None:
    """What --help shows as the default; None for a switch, which is off."""
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag:
        return "on" if option.default else None
    return str(option.default)


def reference() -> str:
    """The flags of every command by panel, with metavariables and defaults."""
    blocks = []
    for words, command in commands().items():
        arguments = [each.metavar for each in command.params if each.param_type_name == "argument"]
        panels: dict[str, list[str]] = {}
        for option in options(command):
            panels.setdefault(option.rich_help_panel, []).append(_shown(option))
        heading = " ".join(("marsinfer", words, *arguments))
        lines = [f"- {panel}: {', '.join(shown)}" for panel, shown in panels.items()]
        blocks.append("\n".join((f"**`{heading}`**\n", *lines)))
    return "\n\n".join(blocks) + "\n"


def _shown(option: Any) -> str:
    metavar = f" {option.metavar}" if option.metavar else ""
    default = default_of(option)
    return f"`{option.opts[0]}{metavar}`" + ("" if default is None else f" ({default})")


def in_readme() -> str:
    return README.read_text(encoding="utf-8").partition(BEGINNING)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGINNING)
    README.write_text(before + BEGINNING + reference() + END + rest.partition(END)[2], encoding="utf-8")
