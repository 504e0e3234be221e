"""`marsinfer methods`: which pruning methods there are, and what can be set."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the pruning methods with their parameters, defaults and sources."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.pruning.registry import method_class, method_names

    described = [_describe(method_class(name)) for name in method_names()]
    if as_json:
        print(json.dumps(described))
        return
    table = Table("method", "what it does", "parameter", "default", "source")
    for method in described:
        parameters = "\n".join(method["parameters"]) or "-"
        defaults = "\n".join(map(str, method["parameters"].values())) or "-"
        table.add_row(method["name"], method["summary"], parameters, defaults, method["source"])
    Console().print(table)


def _describe(method: type) -> dict[str, Any]:
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(method)}
    summary = (method.__doc__ or "").strip().splitlines()[0]
    return {
        "name": method.name,  # type: ignore[attr-defined]
        "summary": summary,
        "parameters": defaults,
        "source": method.source,  # type: ignore[attr-defined]
    }
