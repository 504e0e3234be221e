"""What is known of finished rows as the rows of the input come: which are done, come back, stay or leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from pipeline.outputs.rowindex import DUPLICATE, Copy, RowIndex, beside
from pipeline.records import Row, RowError


class FinishedRows:
    """A view of the index that a journal, or a dry run, makes of the rows that earlier runs have finished."""

    files: list[tuple[str, int]] | None = None  # of the output, with their rows; None where it does not say
    can_drop: bool = True  # whether rows that leave can be kept beside the output; if not, they must stay
    done_at_start: Counter[str]  # rows by status
    # how many rows the output has, or without an output the journal, but for errors that are worth nothing by
    # themselves; what a journal has beside an output may be of another input, of a run that was refused
    lasting_at_start: int

    def __init__(
        self,
        index: RowIndex,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
        copy: Copy = beside,
    ) -> None:
        """`guard` tells errors of the index, `copy` takes the copied columns of rows that are done."""
        self.index, self._guard, self._copy = index, guard, copy
        self.notes: list[str] = []  # what of a journal is lost
        self.count_at_start()

    def count_at_start(self) -> None:
        """To be called when all rows of earlier runs are in the index, and none of the input's."""
        self.done_at_start, published = self.index.counts(), self.index.leaving(published=True)
        self._is_published = bool(published)
        self.lasting_at_start = published or self.index.leaving()

    def document_id(self, source: Row, *, renames: bool) -> str:
        """The id of a row's document, which is one for all of its questions; to be asked in input's order.

        If an earlier row has it, that is a `RowError`; with `renames` the row's number is added instead, as
        often as it takes until no earlier row has such an id. Rows that are not answered are asked about too,
        so that ids are those of a run that answers all of them. Asked again about the same row, it says the
        same.
        """
        id, row = source.document_id, source.row
        with self._guard():
            while (first := self.index.first_with(id, row)) != row:
                if not renames:
                    raise RowError(DUPLICATE, f"has the id {id!r} of row {first}; ids must be unique")
                id = f"{id}#{row}"
        return id

    def is_done(self, source: Row, row_hash: str, *, is_fault: bool = False) -> bool:
        """Whether a row's answer is known; to be asked once for every row, in the order of the input.

        A known answer takes the row's present number and copied columns. An id that came before is a
        `RowError`, whose row must be appended as failed like any other, and so is that of an answer for what
        `is_fault`, which stands for rows that could not be read. May be called from one other thread.
        """
        with self._guard():
            return self.index.see(source, row_hash, is_fault=is_fault, copy=self._copy)

    def done_now(self) -> Counter[str]:
        """Those that were done at the start, by status, without those that have another version now."""
        return self.done_at_start - self.index.replaced

    @property
    def passed_over(self) -> int:
        """How many rows were asked for that are done."""
        return self.index.passed_over

    @property
    def returned(self) -> int:
        """How many had left the output, and came back."""
        return self.index.returned

    def counts(self) -> Counter[str]:
        """How many rows the output will hold, by status: those of this run, and those that stay."""
        with self._guard():
            return self.index.counts(seen=True)

    def leaving(self) -> int:
        """How many have not come, and leave the output."""
        with self._guard():
            return self.index.leaving()

    def lasting_leaving(self) -> int:
        """How many of `lasting_at_start` have not come."""
        with self._guard():
            return self.index.leaving(published=self._is_published)

    def stay(self, *, fleeting: bool) -> int:
        """Keep in the output what has not come; returns how many would have left.

        With `fleeting` errors of rows that could not be read stay too: else this run has tried them again.
        """
        with self._guard():
            return self.index.stay(fleeting=fleeting)


class NothingFinished(FinishedRows):
    """Of rows that are answered into memory: no run came before, none follows, and ids may repeat."""

    passed_over = 0

    def __init__(self) -> None:
        self.done_at_start = Counter()

    def document_id(self, source: Row, *, renames: bool) -> str:
        return source.document_id

    def is_done(self, source: Row, row_hash: str, *, is_fault: bool = False) -> bool:
        return False
