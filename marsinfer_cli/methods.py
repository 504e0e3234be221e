"""`marsinfer methods`: which pruning methods there are, and what can be set."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from marsinfer_cli.signature import takes
from pipeline.settings.console import MethodsSwitches

if TYPE_CHECKING:
    from pipeline.pruning.base import PruningMethod


@takes(MethodsSwitches)
def methods(switches: MethodsSwitches) -> None:
    """List the pruning methods, or tell what one does and what can be set."""
    from pipeline.pruning.registry import method_class, method_names

    name = switches.name
    described = [_describe(method_class(each)) for each in ([name] if name else method_names())]
    if switches.as_json:
        print(json.dumps(described[0] if name else described))
    elif name:
        _print_method(described[0])
    else:
        _print_table(["method", "what it does"], [[m["name"], _headline(m)] for m in described])


def _print_method(method: dict[str, Any]) -> None:
    print(f"{method['name']}: {_headline(method)}\n\n{method['description']}\n")
    rows = [[p["name"], _as_set(p["default"]), p["help"]] for p in method["parameters"]]
    _print_table(["parameter", "default", "what it is"], rows)


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _headline(method: dict[str, Any]) -> str:
    return f"{method['summary']} ({method['source']})"


def _as_set(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_as_set, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _describe(method: type[PruningMethod]) -> dict[str, Any]:
    parameters = [
        {"name": field.name, "default": field.default, "help": field.metadata.get("help", "")}
        for field in fields(method)
    ]
    summary, _, description = (inspect.getdoc(method) or "").partition("\n\n")
    return {
        "name": method.name,
        "summary": summary,
        "description": description,
        "parameters": parameters,
        "source": method.source,
    }
