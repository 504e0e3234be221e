"""`marsinfer methods`: which pruning methods there are, and what can be set."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from marsinfer_cli.signature import takes
from pipeline.settings.console_settings import MethodsSwitches
from pipeline.settings.parse import as_set

if TYPE_CHECKING:
    from pipeline.pruning.base import PruningMethod


@takes(MethodsSwitches)
def methods(switches: MethodsSwitches) -> None:
    """List the pruning methods, or tell what one does and what can be set."""
    from pipeline.pruning.registry import method_class, method_names

    name = switches.name
    described = [describe(method_class(each)) for each in ([name] if name else method_names())]
    if switches.as_json:
        print(json.dumps(described[0] if name else described))
    elif name:
        _print_method(described[0])
    else:
        _print_table(["method", "what it does"], [[m["name"], _headline(m)] for m in described])


def _print_method(method: dict[str, Any]) -> None:
    print(f"{method['name']}: {_headline(method)}\n")
    if method["description"]:
        print(f"{method['description']}\n")
    rows = [[p["name"], as_set(p["default"]), p["help"]] for p in method["parameters"]]
    if rows:
        _print_table(["parameter", "default", "what it is"], rows)
    else:
        print("It has no parameters.")


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from marsinfer_cli.console import Console

    Console().table(columns, rows, words=range(len(columns)))


def _headline(method: dict[str, Any]) -> str:
    source = f" ({method['source']})" if method["source"] else ""
    return f"{method['summary'] or 'its class has no docstring'}{source}"


def describe(method: type[PruningMethod]) -> dict[str, Any]:
    """What its class says of it: name, summary, description, source, and its parameters."""
    parameters = [
        {"name": field.name, "default": field.default, "help": field.metadata.get("help", "")}
        for field in fields(method)
    ]
    own = inspect.getdoc(method) or ""
    if own.startswith(f"{method.__name__}("):  # a dataclass without a docstring has its signature there
        own = ""
    summary, _, description = own.partition("\n\n")
    if not description:  # of a method of one's own, say, it often stands above the class
        description = inspect.getdoc(inspect.getmodule(method)) or ""
    return {
        "name": method.name,
        "summary": summary,
        "description": description,
        "parameters": parameters,
        "source": method.source,
    }
