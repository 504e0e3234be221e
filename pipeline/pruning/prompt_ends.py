"""What a method that drops tokens of a document keeps in any case: the instruction and the question."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.pruning.view import Range
from pipeline.records import Spans


@dataclass(frozen=True, kw_only=True)
class PromptEnds:
    """The tokens around a document: at least `sink` first and `window` last ones, and `most` of each part."""

    sink: int
    window: int
    most: int

    def __post_init__(self) -> None:
        if self.most < max(self.sink, self.window):
            larger = max(("sink", self.sink), ("window", self.window), key=lambda pair: pair[1])
            raise ConfigError(f"most={self.most} is less than {larger[0]}={larger[1]}")

    @property
    def bound(self) -> int:
        """Tokens of a prompt that `ranges` can name at most."""
        return self.sink + 3 * self.most

    def window_of(self, length: int, spans: Spans) -> int:
        """How many last tokens of a prompt stand behind its document, between `window` and `most`."""
        return min(length, max(self.window, min(length - spans.document[1], self.most)))

    def ranges(self, length: int, spans: Spans) -> tuple[Range, ...]:
        """Original positions of what stands before the document and behind it, and of the question.

        Where one of these has more than `most` tokens, its last ones are meant.
        """
        before, (asked, stop) = spans.document[0], spans.question
        return (
            (0, min(self.sink, length)),
            (max(0, before - self.most), before),
            (max(asked, stop - self.most), stop),
            (length - self.window_of(length, spans), length),
        )
