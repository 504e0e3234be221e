"""The rows that a run takes from its input, a record for each question, and how far it has read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.inputs.selection import most_rows, select_rows, selected_rows
from pipeline.records import Document, Record, RowFailure
from pipeline.settings.run_settings import BatchConfig

if TYPE_CHECKING:
    from pipeline.inputs.source import Source


class Reading:
    """Iterating yields the records of a run; what is known of their number grows meanwhile.

    Where only some rows are taken it ends at a file that is out of reach: which rows of the others they are
    hangs on the number of its rows.
    """

    def __init__(self, source: Source, config: BatchConfig) -> None:
        self._source, self._config = source, config
        self._rows = self._records = 0
        self._ended = False

    def __iter__(self) -> Iterator[Record]:
        for record in select_rows(self._source, self._config, self._source.total_rows):
            if self.is_selective and self._source.out_of_reach:
                return
            self._rows += 1
            for each in each_question(record):
                self._records += 1
                yield each
        self._ended = True

    @property
    def is_selective(self) -> bool:
        """Whether the run takes only some of the rows."""
        return any(each is not None for each in (self._config.limit, self._config.sample, self._config.shard))

    @property
    def saw_all(self) -> bool:
        """Whether all rows of the input have been read: only then one that did not come is gone."""
        return self._ended and not (self.is_selective or self._source.has_faults or self._source.out_of_reach)

    @property
    def fraction_read(self) -> float:
        return self._source.fraction_read

    @property
    def total(self) -> int | None:
        """How many records there will be: exact for rows with a question each, else an estimate, or None."""
        if self._ended:
            return self._records
        return self._as_records(selected_rows(self._config, self._source.total_rows))

    @property
    def most(self) -> int | None:
        """A number that they will not exceed, likewise."""
        return self._as_records(most_rows(self._config))

    def _as_records(self, rows: int | None) -> int | None:
        if rows is None or not self._rows:
            return rows
        return round(rows * self._records / self._rows)


def each_question(record: Record) -> Iterable[Record]:
    """A row with a list of questions as a record for each; a question that cannot be asked is a failure."""
    if isinstance(record, RowFailure) or record.questions is None:
        yield record
        return
    for index, question in enumerate(record.questions):
        row = record.source
        source = replace(
            row, id=f"{row.id}#{index}", place=f"{row.place} question {index}", question_index=index
        )
        if isinstance(question, str):
            yield Document(source=replace(source, question=question), text=record.text)
        else:
            message = f"{row.place}: {question}"
            yield RowFailure(source=source, kind=question.kind, message=message)
