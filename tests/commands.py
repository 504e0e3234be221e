"""All commands with their flags, as Typer built them, all methods, and the guides to both, made from them.

python tests/commands.py writes the tables of examples/guides/flags.md and of method-settings.md there anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from marsinfer_cli.app import app
from marsinfer_cli.methods import describe
from pipeline.pruning.registry import method_class, method_names
from pipeline.settings.parse import as_set

GUIDE = Path(__file__).parents[1] / "examples" / "guides" / "flags.md"
SETTINGS_GUIDE = GUIDE.with_name("method-settings.md")
BEGINNING = "<!-- made by: python tests/commands.py -->\n"
END = "<!-- end of what is made -->\n"
OF_TYPER = ("--help", "--install-completion", "--show-completion")


def commands() -> dict[str, Any]:
    """Every command that does something, by its words behind `marsinfer`, but for hidden ones."""
    return dict(_below(typer.main.get_command(app), ()))


def _below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, each in getattr(command, "commands", {}).items():
        if not getattr(each, "hidden", False):
            yield from _below(each, (*words, name))
    if not hasattr(command, "commands"):
        yield " ".join(words), command


def options(command: Any) -> list[Any]:
    """Its own flags, without hidden ones and those that Typer gives to all."""
    named = [each for each in command.params if each.param_type_name == "option"]
    return [each for each in named if each.opts[0] not in OF_TYPER and not getattr(each, "hidden", False)]


def default_of(option: Any) -> str | None:
    """What --help shows as the default; None for a switch, which is off."""
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag:
        return "on" if option.default else None
    return str(option.default)


def reference() -> str:
    """A section a command: its line of words, what it does, and a table of its flags for each panel."""
    return "\n".join(_section(words, command) for words, command in commands().items())


def _section(words: str, command: Any) -> str:
    arguments = [each.metavar for each in command.params if each.param_type_name == "argument"]
    line = " ".join(("marsinfer", words, *arguments))
    panels: dict[str, list[str]] = {}
    for option in options(command):
        panels.setdefault(option.rich_help_panel, []).append(_row(option))
    does = _escaped(" ".join(command.help.partition("\n\n")[0].split()))
    blocks = [f"## marsinfer {words}\n", f"```text\n{line}\n```\n", f"{does}\n"]
    for panel, rows in panels.items():
        blocks += [f"**{panel}**\n", "| flag | default | what it does |", "|---|---|---|", *rows, ""]
    return "\n".join(blocks)


def _row(option: Any) -> str:
    """Flag, default and help; a switch that is on is given by the name that turns it off, beside its own."""
    names = " / ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.metavar:
        names = f"{names[:-1]} {option.metavar}`"
    cells = (names, default_of(option) or "off", option.help)
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    """Text that a table's cell shows as it is; what stands between backticks is code already."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def method_settings() -> str:
    """A section a method: what it does, its source, what was chosen beside that, and its settings."""
    return "\n".join(_method_section(describe(method_class(name))) for name in method_names())


def _method_section(method: dict[str, Any]) -> str:
    blocks = [f"## {method['name']}\n", f"{_escaped(method['summary'])}\n"]
    blocks += [f"{_escaped(part)}\n" for part in method["description"].split("\n\n") if part]
    rows = [
        f"| `{each['name']}` | {_escaped(as_set(each['default']))} | {_escaped(each['help'])} |"
        for each in method["parameters"]
    ]
    return "\n".join([*blocks, "| setting | default | what it is |", "|---|---|---|", *rows, ""])


def in_guide() -> str:
    return _made_part(GUIDE)


def settings_in_guide() -> str:
    return _made_part(SETTINGS_GUIDE)


def _made_part(guide: Path) -> str:
    return guide.read_text(encoding="utf-8").partition(BEGINNING)[2].partition(END)[0]


if __name__ == "__main__":
    for guide, made in ((GUIDE, reference()), (SETTINGS_GUIDE, method_settings())):
        before, _, rest = guide.read_text(encoding="utf-8").partition(BEGINNING)
        guide.write_text(before + BEGINNING + made + END + rest.partition(END)[2], encoding="utf-8")
