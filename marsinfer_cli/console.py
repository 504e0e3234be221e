"""The console that results are shown on, and their tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import rich.console
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from pipeline.texts.shown import printable

LOG_COLUMNS = 140  # a log has no width of its own, and 80 characters would cut the numbers


class Console(rich.console.Console):
    """A console of which no text reaches the terminal but as `printable` has it."""

    def render(
        self, renderable: Any, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def plain(self, text: str, style: str | None = None) -> None:
        """A text as it is, however long: it may hold what looks like markup."""
        self.print(text, markup=False, highlight=False, soft_wrap=True, style=style)

    def table(
        self,
        heads: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        title: str | None = None,
        words: Collection[int] = (0,),
    ) -> None:
        """A table whose columns are numbers, but for those at the places `words`."""
        columns = [
            Column(Text(head), justify="left" if place in words else "right")
            for place, head in enumerate(heads)
        ]
        table = Table(*columns, title=None if title is None else Text(title, style="table.title"))
        for row in rows:
            table.add_row(*map(Text, row))
        self.print(table)


def result_console() -> Console:
    """Of a command whose result is tables of numbers."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_COLUMNS)
    return console
