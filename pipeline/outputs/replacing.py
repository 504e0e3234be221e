"""Reports, profiles and pictures replace only what a command of ours wrote: how each kind is known."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from pipeline.errors import ConfigError

GENERATOR = "marsinfer"  # what pages and pictures say that they were made by
JUNIT_NAME = "marsinfer check"

_SEARCHED_BYTES = 1 << 16  # at either end, where pages and pictures say it
_RESULT_KEYS = {"verdict", "gates", "about", "settings"}


def is_result(path: Path) -> bool:
    """Whether a file is a result of check, as JSON."""
    content = json.loads(path.read_bytes())
    return isinstance(content, dict) and set(content) >= _RESULT_KEYS


def is_junit(path: Path) -> bool:
    """Whether a file is a result of check, as JUnit XML."""
    for _, element in ElementTree.iterparse(path, events=("start",)):
        return element.tag == "testsuites" and element.get("name") == JUNIT_NAME
    return False


def is_page(path: Path) -> bool:
    """Whether a file is a page of report."""
    return f'<meta name="generator" content="{GENERATOR} '.encode() in _ends(path)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture of ours: by a comment of PNG, the metadata of SVG, the Creator of PDF."""
    marks = (f"Software\0{GENERATOR}", f"<dc:title>{GENERATOR}</dc:title>", f"/Creator ({GENERATOR})")
    ends = _ends(path)
    return any(mark.encode() in ends for mark in marks)


def is_profile(path: Path) -> bool:
    """Whether a file is a profile."""
    table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    return "format" in table["profile"] and "method" in table["batch"]


def is_baseline(path: Path) -> bool:
    """Whether a file holds results of dense."""
    import pyarrow.parquet as pq

    from pipeline.outputs.own import BASELINE

    return BASELINE.has(pq.read_schema(path))


def picture_metadata(suffix: str) -> dict[str, str]:
    """What `is_picture` finds in a picture of this suffix, as matplotlib takes it."""
    return {{".png": "Software", ".svg": "Title"}.get(suffix, "Creator"): GENERATOR}


def refuse_foreign_file(flag: str, path: Path, is_ours: Callable[[Path], bool]) -> None:
    """A `ConfigError` if a file is there that no command of ours wrote; one without a byte is nobody's."""
    if not path.exists():
        return
    if not path.is_file():
        raise ConfigError(f"{flag} {path} is no file; name one")
    if path.stat().st_size and not _can_be_read_as(path, is_ours):
        raise ConfigError(f"{flag} {path} exists, and marsinfer did not write it: name another file")


def _can_be_read_as(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    from pipeline.storage.causes import READ_ERRORS

    try:
        return is_ours(path)
    except (*READ_ERRORS, SyntaxError, LookupError, TypeError, RecursionError):
        return False


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_SEARCHED_BYTES)
        file.seek(max(file.seek(0, 2) - _SEARCHED_BYTES, 0))
        return first + file.read()
