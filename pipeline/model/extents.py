"""Which parts of a long buffer are taken, in numbers: no tensors here."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple


class Move(NamedTuple):
    """An extent that slides down; the two places may overlap."""

    start: int
    to: int
    size: int


class Extents:
    """A buffer's slots from `first` to `stop`, lent out in extents, each in one piece.

    An extent is put into the smallest hole that holds it. Holes that no extent fits are closed by `compact`,
    after which all free slots are one hole: what is free in total can always be lent.
    """

    def __init__(self, first: int, stop: int) -> None:
        assert first <= stop, "a buffer of less than no slots"
        self._first, self._stop = first, stop
        self._sizes: dict[int, int] = {}  # of the extents, by their starts
        self._holes: dict[int, int] = {first: stop - first} if stop > first else {}
        self._starts = sorted(self._holes)  # of the holes
        self.free = stop - first

    @property
    def size(self) -> int:
        """Slots, free and taken."""
        return self._stop - self._first

    @property
    def taken(self) -> int:
        return self.size - self.free

    def take(self, size: int) -> int | None:
        """The start of a new extent of `size` slots, at least one; None where no hole is large enough."""
        assert size > 0, "an extent of no slots"
        found = min(((n, start) for start, n in self._holes.items() if n >= size), default=None)
        if found is None:
            return None
        hole, start = found
        self._remove_hole(start)
        if hole > size:
            self._add_hole(start + size, hole - size)
        self._sizes[start] = size
        self.free -= size
        return start

    def give_back(self, start: int) -> None:
        """End the extent that begins at `start`; holes beside it become one with it."""
        size = self._sizes.pop(start)
        self.free += size
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + size:
            size += self._remove_hole(start + size)
        if at and (before := self._starts[at - 1]) + self._holes[before] == start:
            size += self._remove_hole(before)
            start = before
        self._add_hole(start, size)

    def compact(self) -> list[Move]:
        """Close all holes: the moves that do so, to be made in this order."""
        moves, end = [], self._first
        for start, size in sorted(self._sizes.items()):
            if start > end:
                moves.append(Move(start, end, size))
            end += size
        for move in moves:
            del self._sizes[move.start]
            self._sizes[move.to] = move.size
        self._holes = {end: self._stop - end} if self._stop > end else {}
        self._starts = list(self._holes)
        return moves

    def _add_hole(self, start: int, size: int) -> None:
        self._holes[start] = size
        insort(self._starts, start)

    def _remove_hole(self, start: int) -> int:
        del self._starts[bisect_left(self._starts, start)]
        return self._holes.pop(start)
