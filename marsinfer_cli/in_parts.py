"""A measurement in parts, of which those that ended are shown though a later one fails or is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.errors import MarsError
from pipeline.interrupts import graceful_stop

T = TypeVar("T")


class InParts:
    """The parts of a measurement by their names, which are measured in this order."""

    def __init__(self, what: str, names: Iterable[object]) -> None:
        """`what` is counted in messages: lengths, say, or variants."""
        self._what, self._names = what, list(map(str, names))
        self._failure: MarsError | None = None
        self.ended = 0  # how many are measured
        self.check: Callable[[], None] = lambda: None  # raises once a signal has come

    @property
    def _kept(self) -> str:
        if not self.ended:
            return "nothing is kept of a measurement that did not end"
        return f"what is shown is of {self.ended} of {len(self._names)} {self._what}"

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While they are measured. What fails or stops raises here only where no part has ended."""
        from pipeline.evaluate.workbench import failures_named

        with graceful_stop(lambda: self._kept) as self.check:
            try:
                with failures_named(lambda: f"{self._names[self.ended]} fails"):
                    yield
            except MarsError as error:
                if not self.ended:
                    raise
                self._failure = error

    def each(self, parts: Iterable[T]) -> Iterator[T]:
        """The parts, or their results, of which one has ended when the next is asked for."""
        for part in parts:
            yield part
            self.ended += 1

    @property
    def missing(self) -> dict[str, str]:
        """What to tell beside the results of the parts that did not end, if there are any."""
        left = self._names[self.ended :]
        return {"not measured": ", ".join(left)} if left else {}

    def end(self) -> None:
        """Raise what kept parts from being measured, once the others are shown."""
        if self._failure is not None:
            raise self._failure
