"""`marsinfer methods`: which pruning methods there are, and what can be set."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.pruning.base import PruningMethod


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the pruning methods with their parameters, defaults and sources."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.pruning.registry import method_class, method_names

    described = [_describe(method_class(name)) for name in method_names()]
    if as_json:
        print(json.dumps(described))
        return
    table = Table("method", "parameter", "default", "what it does", show_lines=False)
    for method in described:
        table.add_row(method["name"], "", "", f"{method['summary']} ({method['source']})", style="bold")
        for parameter in method["parameters"]:
            table.add_row("", parameter["name"], str(parameter["default"]), parameter["help"])
    Console().print(table)


def _describe(method: type[PruningMethod]) -> dict[str, Any]:
    parameters = [
        {"name": field.name, "default": field.default, "help": field.metadata.get("help", "")}
        for field in fields(method)
    ]
    summary = (method.__doc__ or "").strip().splitlines()[0]
    return {
        "name": method.name,
        "summary": summary,
        "parameters": parameters,
        "source": method.source,
    }
