"""URLs without their secrets: user info and query, which open a file to whoever reads them, become `***`."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"

_HAS_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_USER = re.compile(r"(?<=://)[^/\s'\"<>]*@")
# of other schemes a question mark may be a wildcard; an equals sign tells
_QUERY = r"(https?://[^\s'\"<>?#]*)[?#]{end}|(://[^\s'\"<>?]*)\?{named}"
_IN_TEXT = re.compile(
    _QUERY.format(
        end=r"[^\s'\"<>]*?(?=[,;:.)\]]*(?:[\s'\"<>]|$))",
        named=r"[^\s'\"<>/=?]+=[^\s'\"<>]*?(?=[,;:.)\]]*(?:[\s'\"<>]|$))",
    ),
    re.IGNORECASE,
)
_WHOLE = re.compile(_QUERY.format(end=r".*", named=r"[^/=?]+=.*"), re.IGNORECASE | re.DOTALL)


def hidden(place: str) -> str:
    """A place, all of which is a path or a URL, without its secrets."""
    if not _HAS_SCHEME.match(place):
        return place
    return _WHOLE.sub(_kept, _USER.sub(f"{HIDDEN}@", place))


def without_secrets(text: str) -> str:
    """A text, in which there may be URLs, without theirs."""
    return _IN_TEXT.sub(_kept, _USER.sub(f"{HIDDEN}@", text)) if "://" in text else text


def bare(place: str) -> str:
    """A URL without user info and query, which leaves the names of host, folders and file."""
    return hidden(place).replace(f"{HIDDEN}@", "").removesuffix(f"?{HIDDEN}")


def redacted(value: Any) -> Any:
    """A value, and all values in it, whose texts are places or hold some, without secrets."""
    if isinstance(value, str):
        return hidden(value) if _HAS_SCHEME.match(value) else without_secrets(value)
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(inner) for inner in value)
    return value


def _kept(query: re.Match[str]) -> str:
    return f"{query[1] or query[2]}?{HIDDEN}"
