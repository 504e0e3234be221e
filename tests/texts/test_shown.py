"""Texts from anywhere where they are shown: nothing controls a terminal, and nothing becomes markup."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest
from rich.table import Table

from marsinfer_cli.console import Console
from pipeline.texts.shown import in_cell, in_markdown, in_xml, printable

EVIL = "a\x1b[31m\x9b2J\r\b\x00\u202eb\ud800|<b>`x`</b>\n[red](y)"
PLAIN = "a\ufffd[31m\ufffd2J\ufffd\ufffd\ufffd\ufffdb\ufffd|<b>`x`</b>\n[red](y)"


def test_what_controls_is_replaced_and_what_shows_is_kept():
    assert printable(EVIL) == PLAIN
    kept = "línea\tdos\n\u00a0\u0645\u06cc\u200c\u0631 👩\u200d🔬"
    assert printable(kept) == kept


def test_a_console_shows_texts_and_tables_as_they_are():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200)
    table = Table("head")
    table.add_row(EVIL.replace("[", "("))
    console.print(table)
    console.print(EVIL, markup=False, highlight=False, soft_wrap=True)
    shown = file.getvalue()
    assert "a\ufffd[31m\ufffd2J" in shown  # Rich itself leaves some out
    assert not set(shown.replace("\x1b[", "")) & set("\x00\b\x9b\r\u202e\x1b")


def test_xml_that_can_be_read_holds_the_text():
    element = ElementTree.Element("failure", {"message": in_xml(EVIL)})
    assert ElementTree.fromstring(ElementTree.tostring(element)).get("message", "").startswith("a\ufffd[31m")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (in_markdown, "a\\|b \\<img\\> \\[x\\](y) \\`c\\` \ufffd"),
        (in_cell, "a\\|b <img> [x](y) `c` \ufffd"),
    ],
)
def test_a_cell_of_markdown_is_one_cell(make, expected):
    assert make("a|b\n<img> [x](y)\r`c` \x1b") == expected
