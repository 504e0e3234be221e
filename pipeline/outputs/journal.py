"""Finished rows kept beside the output, so that a killed run goes on where it was.

The folder `.NAME.journal` holds the settings that the run began with, one part for each run that finished
rows, and an index that is derived from the parts. The output is published from it, whole; rows that leave it
are put beside it before (see dropped.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.answers import answers_table, halves, own_columns
from pipeline.outputs.batch_lines import errors_path, is_batch_form
from pipeline.outputs.beginnings import bounds_in, copies_alike, files_in, plain, with_files
from pipeline.outputs.chunks import pack_chunk
from pipeline.outputs.copies import CurrentCopies
from pipeline.outputs.dropped import DroppedRows
from pipeline.outputs.finished import FinishedRows
from pipeline.outputs.layout import layout_in
from pipeline.outputs.merge import Convert, merge, null_misfits, refuse_misfit
from pipeline.outputs.parts import (
    DAMAGED,
    Parts,
    begin_journal,
    damage_told,
    finished_tables,
    has_answers,
    journal_failures_told,
    journal_folder,
    output_failures_told,
    remove_journal,
)
from pipeline.outputs.rowindex import COPIES, PUBLISHED, Location, Order, RowIndex
from pipeline.outputs.sidecar import Written, needs_sidecar, refuse_foreign, write_sidecar
from pipeline.outputs.writing import output_writer, refuse_existing, schema_as_written
from pipeline.records import Answer
from pipeline.values.jsonvalues import same_values

Files = Sequence[tuple[str, int]]  # names, and how many rows of each went into the output


class Journal(FinishedRows):
    """A context manager; leaving it without `publish` keeps all that was appended, for a resumed run."""

    def __init__(
        self,
        output: str | Path,
        schema: pa.Schema,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        retry_errors: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Begin a journal, or go on with the one, or the finished output, that is there.

        `settings` are those that decide an answer; a resumed run must have the same ones, while
        the copied columns may change. With `retry_errors`, rows that failed are not done. The caller holds
        the output's lock.
        """
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")
        self._output, now = Path(output), plain(settings)
        if not overwrite:
            refuse_foreign(self._output)
        self._schema = schema
        self._written = schema_as_written(self._output, schema)
        self._folder = journal_folder(self._output)
        self._check: Callable[[], None] = lambda: None
        guard = partial(journal_failures_told, self._folder)
        with guard():
            self._beginning, self._base = begin_journal(self._output, self._written, now, resume, overwrite)
            self._chunk_schema = self._beginning.mark(schema)
            self._parts = Parts(self._folder)
            self._dropped = DroppedRows(self._output, schema, now, resume=resume)
            if overwrite:
                self._dropped.write_later(None)
            self._copies = CurrentCopies(self._folder / "copies.partial", halves(schema)[1])
            super().__init__(RowIndex(self._folder / "index.sqlite"), guard, self._copies.add)
            try:
                self._replay(retry_errors)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, answers: Sequence[Answer]) -> None:
        """Add the answers of a pack, durable on return."""
        if not answers:
            return
        table = answers_table(answers, self._chunk_schema)
        chunk = pack_chunk(table)
        with self._guard():
            number, offset = self._parts.append(chunk)
            self.index.enter(table, number, offset, len(chunk) // len(answers), seen=True)

    def first_failure(self) -> str | None:
        """What ails the first row of the output that has no answer."""
        with self._guard():
            location = self.index.first_failure()
            if location is None:
                return None
            chunk, place = location.own
            row = own_columns(self._read(*chunk).slice(place, 1), ("error_type", "error_message"))
        kind, message = (column[0].as_py() for column in row.columns)
        return str(kind) if message is None else f"{kind}: {' '.join(message.split())}"

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
        self._check = check
        with self._guard():
            self._copies.flush()
            stale = has_answers(self._folder) or not self._is_current(order, files)
            if stale:
                try:
                    self._write(order, files)
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

    @property
    def errors_file(self) -> str | None:
        """The name of the file that holds the rows without an answer; None where the output has them too."""
        return errors_path(self._output).name if is_batch_form(self._output, self._schema) else None

    def _release(self) -> None:
        self.index.close()
        self._copies.close()
        self._parts.close()

    def _replay(self, retry_errors: bool) -> None:
        self._held, self._is_sorted, self._last_place = 0, True, (-1, -1)
        has_chunks = False  # answers beside those of the base
        for table, part, chunk, row_bytes in finished_tables(
            self._output, self._chunk_schema, self._dropped.rows, self._base, self._parts.scan()
        ):
            self.index.enter(table, part, chunk, row_bytes)
            has_chunks |= part > PUBLISHED
            if part == PUBLISHED:
                self._note_places(table, begins=self._base is not None and chunk in self._base.firsts)
        for name, damages in self._parts.damages.items():
            told = f"{damage_told(damages)} and will be answered again"
            self.notes.append(f"{told}; all else is kept, and {self._kept(name)}")
        if retry_errors:
            self.index.forget_errors()
        self._dropped.end_if_all_are_elsewhere(self.index)
        self.files = None if self._base is None else files_in(self._base.schema)
        self.can_drop = self._dropped.can_hold
        self.count_at_start()
        self.resumed = self._base is not None or has_chunks

    def _note_places(self, table: pa.Table, *, begins: bool) -> None:
        """Count rows of the output that is extended, and see whether they are in the order of the input.

        `begins` says that they are the first of a file.
        """
        if begins:
            self._last_place = (-1, -1)
        indices = (-1 if index is None else index for index in table["question_index"].to_pylist())
        places = [self._last_place, *zip(table["row"].to_pylist(), indices, strict=True)]
        self._held += table.num_rows
        self._is_sorted &= all(first <= second for first, second in pairwise(places))
        self._last_place = places[-1]

    def _kept(self, part: str) -> str:
        """Where a user finds a part that is damaged."""
        return f"the damaged file is now {self._folder.name}/{part}{DAMAGED}"

    def _is_current(self, order: Order, files: Files | None) -> bool:
        """Whether the output has the rows of the index, no others, in this order, and tells their source."""
        if self._base is None or self.index.returned or self.index.unmoved != self._held:
            return False
        says = files_in(self._base.schema)
        return (
            (self._is_sorted or order == "completion")
            and (files is None or says is None or says == list(files))
            and not bounds_in(self._base.schema).keys() - bounds_in(self._schema).keys()
            and copies_alike(self._base.schema, self._written)
            and layout_in(self._base.schema) == layout_in(self._written)
            and self._copies_are_current()
        )

    def _copies_are_current(self) -> bool:
        """Whether the rows, all of which the base has, have the copied columns there that they have now."""
        copied = halves(self._written)[1]
        if not copied.names:
            return True
        nothing = pa.schema([])
        read = partial(self._read, columns=copied.names)
        then, now = (
            merge(self.index.locations("completion"), read, beside, current, refuse_misfit)
            for beside, current in ((copied, nothing), (nothing, copied))
        )
        return all(map(same_values, then, now))

    def _write(self, order: Order, files: Files | None) -> None:
        """Rows that leave first, so that no moment is without them; `files` go into the metadata.

        What it raises leaves the journal, and the output that was there, intact.
        """
        self._write_dropped()
        temporary, replaces = self._folder / "output.partial", self._beginning.replaces
        schema = self._schema if files is None else with_files(self._schema, files)
        with output_writer(self._output, schema, replaces, temporary, self._write_sidecar) as writer:
            for table in self._merged(self.index.locations(order), writer.schema, refuse_misfit):
                writer.write_table(table)
            refuse_existing(self._output, replaces)
            # If the run is killed right after publishing, the next one may publish again.
            replace(self._beginning, replaces=True).save(self._folder)

    def _write_dropped(self) -> None:
        """Put rows that leave beside the output, and make ready what is there once others have come back."""

        def tables(*, after: bool) -> Callable[[pa.Schema], Iterator[pa.Table]]:
            return lambda schema: self._merged(self.index.dropped(after=after), schema, null_misfits)

        if self.index.leaving():
            self._dropped.write(tables(after=False), self._folder / "dropped.partial")
        if self.index.returned:
            self._dropped.write_later(tables(after=True) if self.index.has_dropped(after=True) else None)

    def _write_sidecar(self, written: Written) -> None:
        if needs_sidecar(self._output):
            write_sidecar(self._output, written, self._folder / "sidecar.partial")

    def _merged(
        self, locations: Iterator[Location], schema: pa.Schema, convert: Convert
    ) -> Iterator[pa.Table]:
        for table in merge(locations, self._read, *halves(schema), convert):
            self._check()
            yield table.replace_schema_metadata(schema.metadata)

    def _read(self, part: int, chunk: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows as they are stored; of an output that is extended `columns` alone, with None all."""
        self._check()
        if part == COPIES:
            return self._copies.read(chunk)
        if part > PUBLISHED:
            return self._parts.read(part, chunk)
        rows = self._base if part == PUBLISHED else self._dropped.rows
        assert rows is not None
        with output_failures_told(self._output):
            return rows.read(chunk, columns)
