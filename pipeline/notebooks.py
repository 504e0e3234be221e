"""What a notebook shows while rows are answered: a bar, and how far the run is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from pipeline.tally import Tally
from pipeline.texts.shown import in_html
from pipeline.texts.words import duration

EVERY_S = 0.5  # at most, that what is shown changes


class NotebookBar:
    """Progress in the output of a cell. Call it with the tally so far."""

    def __init__(self, display: Callable[..., Any]) -> None:
        """`display` is that of IPython, which shows what has `_repr_html_`, and then gives a handle to it."""
        self._display = display
        self._handle: Any = None
        self._shown_at = 0.0
        self._html = ""

    def __call__(self, tally: Tally) -> None:
        left = tally.seconds_left
        line = tally.progress_line() + (f", about {duration(left)} left" if left else "")
        total = tally.expected_rows
        bar = f"<progress value='{tally.documents}' max='{total:.0f}'></progress> " if total else ""
        self._show(f"{bar}{in_html(line)}", at_once=tally.has_ended)

    def phase(self, text: str) -> None:
        """Show what is being done, until rows are done."""
        self._show(in_html(text), at_once=True)

    def minutes(self, text: str, left_s: float) -> None:
        """Show what is being done, and how long it may go on."""
        self.phase(f"{text}, {duration(left_s)} left")

    def _repr_html_(self) -> str:
        return self._html

    def _show(self, html: str, *, at_once: bool) -> None:
        now = time.monotonic()
        if not at_once and now - self._shown_at < EVERY_S:
            return
        self._html, self._shown_at = html, now
        if self._handle is None:
            self._handle = self._display(self, display_id=True)
        else:
            self._handle.update(self)


def notebook_bar() -> NotebookBar | None:
    """A bar where this is the kernel of a notebook, None elsewhere."""
    ipython = sys.modules.get("IPython")  # which a kernel has imported
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    return NotebookBar(display)


def listeners(
    progress: Callable[[Any], None] | None, phase: Callable[[str], None] | None
) -> tuple[Callable[[Any], None], Callable[[str], None]]:
    """What hears of progress and phases: who is given, else a bar in a notebook, else nobody."""
    bar = notebook_bar() if progress is None else None
    if bar is None:
        return progress or (lambda tally: None), phase or (lambda text: None)
    return bar, phase or bar.phase
