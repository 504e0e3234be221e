"""Queries of a pack a piece at a time, so that what attention holds of them is as large as a piece.

Keys and values are there of the whole pack: each query sees what it would see if all were taken together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from pipeline.kernels.segments import Segments

ALIGNED = 128  # tokens of a document, of which a piece of it begins at a multiple: blocks stay whole


class QueryPart(NamedTuple):
    """Tokens of one document, half-open, counted in the document."""

    document: int
    first: int
    end: int


@dataclass(frozen=True)
class QueryPiece:
    """Tokens of a pack beside each other, and of which documents they are."""

    start: int
    parts: tuple[QueryPart, ...]

    @classmethod
    def whole(cls, segments: Segments) -> Self:
        """All tokens."""
        return cls(0, tuple(QueryPart(b, 0, length) for b, length in enumerate(segments.lengths)))

    @property
    def tokens(self) -> int:
        return sum(end - first for _, first, end in self.parts)

    @property
    def rows(self) -> slice:
        """Of the pack."""
        return slice(self.start, self.start + self.tokens)

    def is_whole(self, segments: Segments) -> bool:
        """Whether it has all tokens of the pack."""
        return self.tokens == segments.total

    def placed(self) -> Iterator[tuple[QueryPart, slice]]:
        """Each part, and its rows within the piece."""
        at = 0
        for part in self.parts:
            yield part, slice(at, at + part.end - part.first)
            at += part.end - part.first


def query_pieces(segments: Segments, most: int) -> tuple[QueryPiece, ...]:
    """A pack in pieces of at most `most` tokens, as few as that takes, but for what alignment adds.

    A document that is longer is cut, into parts of about the same size.
    """
    if segments.total <= most:
        return (QueryPiece.whole(segments),)
    pieces: list[list[QueryPart]] = []
    free = 0
    for document, length in enumerate(segments.lengths):
        for part in _parts(document, length, most):
            tokens = part.end - part.first
            if tokens > free:
                pieces.append([])
                free = most
            pieces[-1].append(part)
            free -= tokens
    made, start = [], 0
    for parts in pieces:
        made.append(QueryPiece(start, tuple(parts)))
        start += made[-1].tokens
    return tuple(made)


def _parts(document: int, length: int, most: int) -> Iterator[QueryPart]:
    size = -(-length // -(-length // most)) if length else 1
    if length > most >= ALIGNED:
        size = min(most // ALIGNED * ALIGNED, -(-size // ALIGNED) * ALIGNED)
    for first in range(0, length, size):
        yield QueryPart(document, first, min(first + size, length))
