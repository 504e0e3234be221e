"""Answers on their way to the journal: a few at a time, since each time costs a write that is waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pipeline.engines.blocks import Key, key_of
from pipeline.records import Answer, RowError
from pipeline.setup.intake import Item

MOST_ROWS = 64
MOST_S = 1.0  # that an answer waits for others


class _Window:
    """The rows of a window that are not answered yet, and its failures."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.failures = [item for item in items if isinstance(item, RowError)]
        self.keys = [key_of(item.source) for item in items if not isinstance(item, RowError)]
        self.unfinished = len(self.keys)


class Outgoing:
    """Answers that are to be handed on, and the failures of windows of which all else is answered."""

    def __init__(self, method: str) -> None:
        """`method` is what rows name that never reached one."""
        self._method = method
        self.most_rows = MOST_ROWS  # that wait for others
        self._ready: list[Answer] = []
        self._since = 0.0
        self._window_of: dict[Key, _Window] = {}

    def expect(self, items: Sequence[Item]) -> None:
        """Learn which rows a window has."""
        window = _Window(items)
        self._window_of |= dict.fromkeys(window.keys, window)
        if not window.unfinished:
            self._put([Answer.from_failure(failure, self._method) for failure in window.failures])

    def put(self, answer: Answer | None) -> None:
        """Take in a row's answer, if there is one, and behind its window's last one the failures."""
        if answer is None:
            return
        self._put([answer])
        window = self._window_of.pop(key_of(answer))
        window.unfinished -= 1
        if not window.unfinished:
            self._put([Answer.from_failure(failure, self._method) for failure in window.failures])

    def _put(self, answers: Sequence[Answer]) -> None:
        if not self._ready:
            self._since = time.perf_counter()
        self._ready += answers

    def due(self) -> Iterator[list[Answer]]:
        """What is there, if it is enough or has waited long enough."""
        if len(self._ready) >= self.most_rows or (
            self._ready and time.perf_counter() - self._since >= MOST_S
        ):
            yield from self.rest()

    def rest(self) -> Iterator[list[Answer]]:
        """Whatever is there."""
        if self._ready:
            ready, self._ready = self._ready, []
            yield ready
