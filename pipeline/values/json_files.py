"""Files of JSON that come with a model: its configuration, tokenizer, index of weights, adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

AGAIN = "download or copy it again"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, with the file's name and a remedy, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {AGAIN} ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object: {AGAIN}")
    return found


def object_or_nothing(path: Path) -> dict[str, Any]:
    """The same, or an empty one for a file that cannot be read, which is told where it is used."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}
