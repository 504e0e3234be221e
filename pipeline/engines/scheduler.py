"""What an engine does next: prefill a pack, or go on decoding. Policy alone, without tensors or documents.

Packs are prefilled in the order in which they were put in. Prefill comes first while there is room, because a
decode step reads the weights once for however many rows there are: the more rows, the cheaper each token. A
pack that does not fit waits until rows have left, and nothing overtakes it, so that no row starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Waiting(Generic[T]):
    """A row that waits for its prefill: what it will take of the store, and what to compute first."""

    row: T
    slots: int
    tokens: int
    answers: int = 1  # that are decoded, each as a row


@dataclass(frozen=True, kw_only=True)
class WaitingPack(Generic[T]):
    """Rows that are prefilled together if there is room for all, else as many of the first as there is."""

    rows: tuple[Waiting[T], ...]
    alone: bool = False  # a row that runs while no other does, with memory of its own

    @property
    def tokens(self) -> int:
        return sum(waiting.tokens for waiting in self.rows)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is for more rows."""

    running: int  # rows that are being decoded
    slots: int  # of the store, that are free


class Scheduler(Generic[T]):
    """A queue of packs, and when the first of them is let in."""

    def __init__(self, *, in_flight: int, worthwhile: int = 1) -> None:
        """At most `in_flight` rows run at once. A part of a pack is let in beside running rows only if it has
        `worthwhile` tokens: a device computes fewer no faster.
        """
        assert in_flight > 0, "no row could ever run"
        self._in_flight, self._worthwhile = in_flight, worthwhile
        self._packs: deque[WaitingPack[T]] = deque()

    def __bool__(self) -> bool:
        return bool(self._packs)

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return sum(pack.tokens for pack in self._packs)

    @property
    def rows(self) -> list[Waiting[T]]:
        """Those that wait."""
        return [waiting for pack in self._packs for waiting in pack.rows]

    def add(self, packs: Iterable[WaitingPack[T]]) -> None:
        """Put packs behind those that wait."""
        self._packs.extend(packs)

    def put_back(self, packs: Iterable[WaitingPack[T]]) -> None:
        """Put packs, in their order, before those that wait: they had their turn."""
        self._packs.extendleft(reversed(list(packs)))

    @property
    def first(self) -> WaitingPack[T] | None:
        """The pack whose turn it is."""
        return self._packs[0] if self._packs else None

    def remove(self, matches: Callable[[WaitingPack[T]], bool]) -> list[WaitingPack[T]]:
        """Take packs off the queue, wherever they stand."""
        removed = [pack for pack in self._packs if matches(pack)]
        self._packs = deque(pack for pack in self._packs if not matches(pack))
        return removed

    def next(self, room: Room) -> WaitingPack[T] | None:
        """The rows to be prefilled now, which are taken off the queue; None: go on decoding first."""
        if not self._packs:
            return None
        pack = self._packs[0]
        if pack.alone:
            return None if room.running else self._packs.popleft()
        count, tokens = self._fitting(pack, room)
        if count == len(pack.rows):
            return self._packs.popleft()
        if room.running and (count == 0 or tokens < self._worthwhile):
            return None
        alone = count == 0  # a row that fits no empty store, or has more answers than are decoded together
        count = max(count, 1)
        self._take(pack, count)
        return replace(pack, rows=pack.rows[:count], alone=alone)

    def _take(self, pack: WaitingPack[T], count: int) -> None:
        """Take the first rows off the first pack."""
        if count == len(pack.rows):
            self._packs.popleft()
        else:
            self._packs[0] = replace(pack, rows=pack.rows[count:])

    def _fitting(self, pack: WaitingPack[T], room: Room) -> tuple[int, int]:
        """How many of a pack's first rows there is room for, and their tokens."""
        count = tokens = slots = 0
        running = room.running
        for waiting in pack.rows:
            running, slots = running + waiting.answers, slots + waiting.slots
            if running > self._in_flight or slots > room.slots:
                break
            count, tokens = count + 1, tokens + waiting.tokens
        return count, tokens
