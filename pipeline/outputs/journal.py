"""Finished rows kept beside the output, so that a killed run goes on where it was.

The folder `.NAME.journal` holds the settings that the run began with, one part for each run that finished
rows, and an index that is derived from the parts. The output is published from it, whole; rows that leave it
are put beside it before (see dropped.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.answers import answers_table, halves
from pipeline.outputs.beginnings import Beginning, check_columns, files_in, plain
from pipeline.outputs.chunks import Damage, PartWriter, pack_chunk, read_chunk, scan_part
from pipeline.outputs.copies import CurrentCopies
from pipeline.outputs.dropped import DroppedRows
from pipeline.outputs.earlier import EarlierRows
from pipeline.outputs.opening import (
    begin_journal,
    has_answers,
    journal_failures_told,
    output_failures_told,
    remove_journal,
)
from pipeline.outputs.parts import (
    COPIES_FILE,
    INDEX_FILE,
    damage_told,
    journal_folder,
    part_name,
    part_number,
    part_path,
    parts_of,
    set_aside,
)
from pipeline.outputs.published import Published
from pipeline.outputs.publishing import Files, Held, Publication, replay_output
from pipeline.outputs.rowindex import COPIES, DROPPED, PUBLISHED, Order, RowIndex
from pipeline.outputs.sidecar import refuse_foreign
from pipeline.outputs.writing import schema_as_written
from pipeline.records import Answer, Row


class Journal:
    """A context manager; leaving it without `publish` keeps all that was appended, for a resumed run."""

    resumed: bool
    done_at_start: Counter[str]
    earlier: EarlierRows

    def __init__(
        self,
        output: Path,
        schema: pa.Schema,
        written: pa.Schema,
        beginning: Beginning,
        base: Published | None,
        dropped: DroppedRows,
    ) -> None:
        """For `open`, which finds out what there is."""
        self._output = output
        self._schema, self._written = schema, written
        self._chunk_schema = beginning.mark(schema)
        self._folder = journal_folder(output)
        self._beginning = beginning
        self._base = base
        self._has_chunks = False  # answers beside those of the base
        self._dropped = dropped
        self._held = Held()
        self._part: PartWriter | None = None
        self._index = RowIndex(self._folder / INDEX_FILE)
        self._copies = CurrentCopies(self._folder / COPIES_FILE, halves(schema)[1])
        self.resumed = False
        self.done_at_start = Counter()
        self.notes: list[str] = []  # what of the journal was lost
        self._damages: dict[str, list[Damage]] = {}  # newly found, by the part's name

    @classmethod
    def open(
        cls,
        output: str | Path,
        schema: pa.Schema,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        retry_errors: bool = False,
        overwrite: bool = False,
    ) -> Journal:
        """Begin a journal, or go on with the one, or the finished output, that is there.

        `settings` are those that decide an answer; a resumed run must have the same ones, while
        the copied columns may change. With `retry_errors`, rows that failed are not done. The caller holds
        the output's lock.
        """
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")
        output, now = Path(output), plain(settings)
        if not overwrite:
            refuse_foreign(output)
        written = schema_as_written(output, schema)
        with journal_failures_told(journal_folder(output)):
            beginning, base = begin_journal(output, written, now, resume, overwrite)
            dropped = DroppedRows(output, schema, now, resume=resume)
            dropped.is_gone = overwrite
            journal = cls(output, schema, written, beginning, base, dropped)
            try:
                journal._replay(retry_errors)
            except BaseException:
                journal.close()
                raise
        return journal

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def is_done(self, source: Row, row_hash: str, *, is_fault: bool = False) -> bool:
        """Whether a row's answer is known; to be asked once for every row, in the order of the input.

        A known answer takes the row's present number and copied columns. An id that came before is a
        `RowError`, whose row must be appended as failed like any other, and so is that of an answer for what
        `is_fault`, which stands for rows that could not be read. May be called from one other thread.
        """
        with journal_failures_told(self._folder):
            return self._index.see(source, row_hash, is_fault=is_fault, copy=self._copies.add)

    def append(self, answers: Sequence[Answer]) -> None:
        """Add the answers of a pack, durable on return."""
        if not answers:
            return
        chunk = pack_chunk(answers_table(answers, self._chunk_schema))
        with journal_failures_told(self._folder):
            number, offset = self._append_chunk(chunk)
            self._has_chunks = True
            self._index.record(answers, number, offset, len(chunk) // len(answers))

    @property
    def passed_over(self) -> int:
        """How many rows were asked for that are done."""
        return self._index.passed_over

    def counts(self) -> Counter[str]:
        """How many rows the output will hold, by status: those of this run, and those that stay."""
        with journal_failures_told(self._folder):
            return self._index.counts(seen=True)

    def first_failure(self) -> str | None:
        """What ails the first row of the output that has no answer."""
        with journal_failures_told(self._folder):
            location = self._index.first_failure()
            if location is None:
                return None
            row = self._read(location.part, location.chunk).slice(location.place, 1)
        kind, message = (row[name][0].as_py() for name in ("error_type", "error_message"))
        return f"{kind}: {' '.join((message or '').split())}"

    def discard(self) -> None:
        """End the journal, and all that was appended with it."""
        self._release()
        remove_journal(self._folder)

    def publish(
        self,
        order: Order = "input",
        check: Callable[[], None] = lambda: None,
        files: Files | None = None,
    ) -> bool:
        """Write the output, whole, with the rows seen in this run that have an answer; end the journal.

        Rows that were not seen, and that do not stay, are put beside the output before. `order` is that of
        the input, or that in which the answers were appended. `check` is called often; what it raises ends
        the writing and leaves the journal intact. `files` are those that the output is made of. Returns
        whether the output was written: one that holds these very rows is left as it is.
        """
        publication = self._publication(check)
        with journal_failures_told(self._folder):
            self._copies.flush()
            stale = has_answers(self._folder) or not publication.is_current(order, files, self._held)
            if stale:
                try:
                    publication.write(order, files)
                except StorageError as error:
                    raise StorageError(f"{error}; the journal is intact, and --resume continues") from error
        self._release()
        remove_journal(self._folder)
        with journal_failures_told(self._folder.parent):
            self._finish(stale)
        return stale

    def _finish(self, stale: bool) -> None:
        """What is left to do once the output, if it was `stale`, is durable and the journal gone."""
        if stale:
            self._dropped.tidy()

    def close(self) -> None:
        """Let go of the files; a journal without answers, which nobody could resume, goes."""
        self._release()
        if not has_answers(self._folder):
            remove_journal(self._folder)

    def _release(self) -> None:
        self._index.close()
        self._copies.close()
        if self._part is not None:
            self._part.close()
            self._part = None

    def _replay(self, retry_errors: bool) -> None:
        self._dropped.replay(self._index)  # first: of a row that is in the output too, that one counts
        if self._base is not None:
            with output_failures_told(self._output):
                self._held = replay_output(self._base, self._index)
        parts = parts_of(self._folder)
        for number in sorted(parts):
            self._replay_part(number, parts[number])
        if retry_errors:
            self._index.forget_errors()
        self._dropped.end_if_all_are_elsewhere(self._index)
        self.earlier = EarlierRows(
            self._index,
            files=None if self._base is None else files_in(self._base.schema),
            can_drop=self._dropped.can_hold,
            guard=partial(journal_failures_told, self._folder),
        )
        self.done_at_start = self.earlier.at_start
        self.resumed = self._base is not None or self._has_chunks

    def _replay_part(self, number: int, path: Path) -> None:
        damages: list[Damage] = []
        for chunk in scan_part(path, damages.append):
            check_columns(self._output, chunk.table.schema, self._chunk_schema)
            row_bytes = (chunk.end - chunk.offset) // max(chunk.table.num_rows, 1)
            self._index.replay(chunk.table, number, chunk.offset, row_bytes)
            self._has_chunks = True
        if damages and (moved := set_aside(path)) != path:
            self._damages[part_name(number)] = damages
            told = f"{damage_told(damages)} and will be answered again"
            self.notes.append(f"{told}; all else is kept, and {self._kept(moved)}")

    def _kept(self, damaged: Path) -> str:
        """Where a user finds a part that is damaged."""
        return f"the damaged file is now {damaged.parent.name}/{damaged.name}"

    def _append_chunk(self, chunk: bytes) -> tuple[int, int]:
        if self._part is None:
            number = max(parts_of(self._folder), default=PUBLISHED) + 1
            self._part = PartWriter(self._folder / part_name(number))
        try:
            return part_number(self._part.path), self._part.append(chunk)
        except BaseException:
            # A part that failed once is left as it is: what follows, if anything, goes to another.
            self._part.close()
            self._part = None
            raise

    def _publication(self, check: Callable[[], None]) -> Publication:
        return Publication(
            output=self._output,
            folder=self._folder,
            schema=self._schema,
            written=self._written,
            beginning=self._beginning,
            base=self._base,
            index=self._index,
            read=self._read,
            dropped=self._dropped,
            check=check,
        )

    def _read(self, part: int, chunk: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows as they are stored, of an output that is extended `columns` alone."""
        if part == COPIES:
            return self._copies.read(chunk)
        if part == DROPPED:
            return self._dropped.read(chunk)
        if part != PUBLISHED:
            return read_chunk(part_path(self._folder, part), chunk)
        assert self._base is not None
        with output_failures_told(self._output):
            return self._base.read(chunk, columns)
