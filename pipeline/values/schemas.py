"""JSON schemas that users give: in a file, or as they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

BYTE_ORDER_MARK = "\ufeff"


def read_schema(text: str, flag: str = "--json-schema") -> dict[str, Any]:
    """The JSON schema in a file of this name, or that `text` itself is: one that begins with a brace.

    The order of its keys is kept. Raises ConfigError, which begins with the flag, for a file that cannot be
    read and for what is no JSON object.
    """
    is_inline = text.lstrip().startswith("{")
    place = flag if is_inline else f"{flag} {text}"
    try:
        content = text if is_inline else Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{place} cannot be read: {error}") from error
    try:
        schema = json.loads(content.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"{place} is no JSON schema: it must be an object, {{...}}")
    return schema
