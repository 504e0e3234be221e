"""The console that everything is shown on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

from pipeline.texts.shown import printable


class Console(rich.console.Console):
    """A console of which no text reaches the terminal but as `printable` has it."""

    def render(
        self, renderable: Any, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
