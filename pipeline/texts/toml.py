"""Values as TOML, which the standard library only reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = 2**53  # beyond it numbers of JSON are not exact, and sums of a few leave 64 bits


def toml_of(table: Mapping[str, Any], name: str = "", *, is_entry: bool = False) -> str:
    """A table and the tables in it; `is_entry` says that it is one of an array of tables."""
    values = {key: value for key, value in table.items() if not (_is_table(value) or _is_array(value))}
    blocks = []
    if values or is_entry or not name:
        lines = [f"[[{name}]]" if is_entry else f"[{name}]"] if name else []
        blocks.append("\n".join([*lines, *(f"{toml_key(k)} = {toml_value(v)}" for k, v in values.items())]))
    for key, value in table.items():
        inner = f"{name}.{toml_key(key)}" if name else toml_key(key)
        if _is_table(value):
            blocks.append(toml_of(value, inner).rstrip("\n"))
        elif _is_array(value):
            blocks += [toml_of(each, inner, is_entry=True).rstrip("\n") for each in value]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_array(value: Any) -> bool:
    """Whether this is an array of tables."""
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_table, value))


def toml_value(value: Any) -> str:
    """A value in one line; TOML has no null, and None becomes the text `none`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(toml_value, value))}]"
    # JSON's escapes are TOML's, but for the one control character that JSON leaves alone
    return json.dumps("none" if value is None else str(value), ensure_ascii=False).replace("\x7f", "\\u007F")


def toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)
