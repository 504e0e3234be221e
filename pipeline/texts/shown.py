"""Texts as they may be shown: ids, answers, messages and names come from anywhere.

What would control a terminal or is no character is replaced, and what would be markup is made plain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape

REPLACED = "\N{REPLACEMENT CHARACTER}"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\x7f-\x9f]")
# what begins markup, a link or HTML within a line of Markdown
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#@&$])")


def printable(text: str) -> str:
    """A text that controls nothing but lines and tabs: no cursor, no colour, no order of letters."""
    return _CONTROLS.sub(REPLACED, text)


def in_xml(text: str) -> str:
    """A text of characters that XML can hold and that control nothing; it is still to be escaped."""
    return _NOT_IN_XML.sub(REPLACED, text)


def in_cell(text: str) -> str:
    """A text of our own making, with names of others in it, as a cell of a table in Markdown."""
    return printable(" ".join(text.split())).replace("|", "\\|")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], as_cell: Callable[[str], str]) -> str:
    """A table in Markdown; `as_cell` is `in_cell` or `in_markdown`."""
    head, *lines = (f"| {' | '.join(map(as_cell, row))} |" for row in (heads, *rows))
    return "\n".join([head, "|" + " --- |" * len(heads), *lines])


def in_markdown(text: str) -> str:
    """A text as a part of one line of Markdown, or as a cell of its tables, that shows as it is."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))


def html_table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """Names and values as a table of HTML, for a page that is not ours."""
    cells = "".join(f"<tr><th>{in_html(name)}</th><td>{in_html(value)}</td></tr>" for name, value in rows)
    return f"<table><caption>{in_html(caption)}</caption>{cells}</table>"


def in_html(text: str) -> str:
    """Text as it is put in a page: without marks of HTML, and without control characters."""
    return escape(in_xml(text))
