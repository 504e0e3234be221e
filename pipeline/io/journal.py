"""Finished rows kept beside the output, so that a killed run goes on where it was.

The folder `.NAME.journal` holds the settings that the run began with, one part for each run that finished
rows, and an index that is derived from the parts. The output is published from it, whole; rows that leave it
are put beside it before (see dropped.py).
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from pipeline.errors import ConfigError, MarsError, StorageError
from pipeline.io.answers import answers_table
from pipeline.io.beginnings import (
    START_OVER,
    Beginning,
    check_columns,
    check_settings,
    files_in,
    plain,
    settings_in,
)
from pipeline.io.causes import READ_ERRORS, cause
from pipeline.io.chunks import Damage, PartWriter, pack_chunk, read_chunk, scan_part
from pipeline.io.dropped import DroppedRows
from pipeline.io.earlier import EarlierRows
from pipeline.io.parts import (
    INDEX_FILE,
    clear_discarded,
    damage_note,
    discard,
    part_name,
    part_number,
    part_path,
    parts_of,
    set_aside,
)
from pipeline.io.published import Published
from pipeline.io.publishing import Files, Held, Publication, replay_output
from pipeline.io.rowindex import DROPPED, PUBLISHED, Order, RowIndex
from pipeline.io.sidecar import needs_sidecar, read_sidecar, refuse_foreign
from pipeline.io.whole_file import folder_like, sync_folder
from pipeline.io.writing import refuse_existing, schema_as_written
from pipeline.records import Answer, Row


def journal_folder(output: str | Path) -> Path:
    """Where the journal of an output is; outputs that are links to one file share it."""
    target = Path(os.path.realpath(output))
    return target.with_name(f".{target.name}.journal")


class Journal:
    """A context manager; leaving it without `publish` keeps all that was appended, for a resumed run."""

    resumed: bool
    done_at_start: Counter[str]
    earlier: EarlierRows

    def __init__(
        self,
        output: Path,
        schema: pa.Schema,
        beginning: Beginning,
        base: Published | None,
        dropped: DroppedRows,
    ) -> None:
        """For `open`, which finds out what there is."""
        self._output = output
        self._schema = schema
        self._chunk_schema = beginning.mark(schema)
        self._folder = journal_folder(output)
        self._beginning = beginning
        self._base = base
        self._has_chunks = False  # answers beside those of the base
        self._dropped = dropped
        self._held = Held()
        self._part: PartWriter | None = None
        self._index = RowIndex(self._folder / INDEX_FILE)
        self.resumed = False
        self.done_at_start = Counter()
        self.notes: list[str] = []  # what of the journal was lost

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

        `settings` are those that decide an answer; a resumed run must have the same ones, and the same
        columns. With `retry_errors`, rows that failed are not done. The caller holds the output's lock.
        """
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")
        output, now = Path(output), plain(settings)
        if not overwrite:
            refuse_foreign(output)
        written = schema_as_written(output, schema)
        with _failures_told(journal_folder(output)):
            beginning, base = _begin(output, written, now, resume, overwrite)
            dropped = DroppedRows(output, schema, now, resume=resume)
            dropped.is_gone = overwrite
            journal = cls(output, schema, beginning, base, dropped)
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

        A known answer takes the row's present number. An id that came before is a `RowError`, whose
        row must be appended as failed like any other, and so is that of an answer for what `is_fault`, which
        stands for rows that could not be read. May be called from another thread.
        """
        with _failures_told(self._folder):
            return self._index.see(source, row_hash, is_fault=is_fault)

    def append(self, answers: Sequence[Answer]) -> None:
        """Add the answers of a pack, durable on return."""
        if not answers:
            return
        chunk = pack_chunk(answers_table(answers, self._chunk_schema))
        with _failures_told(self._folder):
            number, offset = self._append_chunk(chunk)
            self._has_chunks = True
            self._index.record(answers, number, offset, len(chunk) // len(answers))

    @property
    def passed_over(self) -> int:
        """How many rows were asked for that are done."""
        return self._index.passed_over

    def counts(self) -> Counter[str]:
        """How many rows the output will hold, by status: those of this run, and those that stay."""
        with _failures_told(self._folder):
            return self._index.counts(seen=True)

    def first_failure(self) -> str | None:
        """What ails the first row of the output that has no answer."""
        with _failures_told(self._folder):
            location = self._index.first_failure()
            if location is None:
                return None
            row = self._read(location.part, location.chunk).slice(location.place, 1)
        kind, message = (row[name][0].as_py() for name in ("error_type", "error_message"))
        return f"{kind}: {' '.join((message or '').split())}"

    def discard(self) -> None:
        """End the journal, and all that was appended with it."""
        self._release()
        _remove(self._folder)

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
        stale = _has_answers(self._folder) or not publication.is_current(order, files, self._held)
        if stale:
            with _failures_told(self._folder):
                try:
                    publication.write(order, files)
                except StorageError as error:
                    raise StorageError(f"{error}; the journal is intact, and --resume continues") from error
        self._release()
        _remove(self._folder)
        with _failures_told(self._folder.parent):
            self._finish(stale)
        return stale

    def _finish(self, stale: bool) -> None:
        """What is left to do once the output, if it was `stale`, is durable and the journal gone."""
        if stale:
            self._dropped.tidy()

    def close(self) -> None:
        """Let go of the files; a journal without answers, which nobody could resume, goes."""
        self._release()
        if not _has_answers(self._folder):
            _remove(self._folder)

    def _release(self) -> None:
        self._index.close()
        if self._part is not None:
            self._part.close()
            self._part = None

    def _replay(self, retry_errors: bool) -> None:
        self._dropped.replay(self._index)  # first: of a row that is in the output too, that one counts
        if self._base is not None:
            with _output_read(self._output):
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
            guard=partial(_failures_told, self._folder),
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
            self.notes.append(damage_note(moved, damages))

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
            beginning=self._beginning,
            base=self._base,
            index=self._index,
            read=self._read,
            dropped=self._dropped,
            check=check,
        )

    def _read(self, part: int, chunk: int) -> pa.Table:
        if part == DROPPED:
            return self._dropped.read(chunk)
        if part != PUBLISHED:
            return read_chunk(part_path(self._folder, part), chunk)
        assert self._base is not None
        with _output_read(self._output):
            return self._base.read(chunk)


def _begin(
    output: Path, written: pa.Schema, now: Any, resume: bool, overwrite: bool
) -> tuple[Beginning, Published | None]:
    """Refuse what must not be replaced or mixed, and set up the folder."""
    folder = journal_folder(output)
    clear_discarded(folder)
    if not resume:
        refuse_leftovers(output, overwrite)
        _remove(folder)
        return _start(output, Beginning(settings=now, replaces=overwrite)), None
    beginning, base = begun(output, written, now)
    if beginning is not None:
        folder_like(folder, output)
        return beginning, base
    is_there = base is not None
    return _start(output, Beginning(settings=now, extends=is_there, replaces=is_there)), base


def begun(output: Path, written: pa.Schema, now: Any) -> tuple[Beginning | None, Published | None]:
    """What a resumed run goes on from: a journal that has answers, and an output. Nothing is changed.

    A ConfigError if one of them was made with other settings than `now`, or has other columns.
    """
    folder = journal_folder(output)
    if not _has_answers(folder):
        return None, _open_base(output, written, now) if output.exists() else None
    beginning = Beginning.load(folder)
    check_settings(output, beginning.settings, now)
    extends = beginning.extends and output.exists()
    return beginning, _open_base(output, written, now) if extends else None


def refuse_leftovers(output: Path, overwrite: bool) -> None:
    """A ConfigError if an output or an unfinished run is there that may not be replaced."""
    folder = journal_folder(output)
    if not overwrite and _has_answers(folder):
        raise ConfigError(f"an unfinished run left {folder.name}; --resume continues it, {START_OVER}")
    refuse_existing(output, overwrite)


def _start(output: Path, beginning: Beginning) -> Beginning:
    folder = journal_folder(output)
    try:
        folder.mkdir(exist_ok=True)
        folder_like(folder, output)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be made: {cause(error)}; choose a folder that is writable"
        ) from error
    beginning.save(folder)
    sync_folder(folder.parent)
    return beginning


def _open_base(output: Path, written: pa.Schema, now: Any) -> Published:
    with _output_read(output):
        base = Published(output, lines_schema=read_sidecar(output) if needs_sidecar(output) else None)
        check_settings(output, settings_in(output, base.schema), now)
        check_columns(output, base.schema, written)
    return base


def journal_parts(folder: Path) -> list[Path]:
    """The parts of a journal, the oldest first, for one who only reads."""
    return [path for _, path in sorted(parts_of(folder).items())]


def _has_answers(folder: Path) -> bool:
    return any(part.stat().st_size > 0 for part in parts_of(folder).values())


def _remove(folder: Path) -> None:
    if folder.is_dir():
        with _failures_told(folder):
            discard(folder)


@contextmanager
def _output_read(output: Path) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise ConfigError(f"{output} cannot be read: {cause(error)}; {START_OVER}") from error


@contextmanager
def _failures_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except MarsError:
        raise
    except (OSError, sqlite3.Error, pa.ArrowException) as error:
        if not folder.is_dir():
            raise StorageError(f"{folder} is gone, and the answers in it; run again") from error
        raise StorageError(
            f"{folder} cannot be used: {cause(error)}; the journal is intact, and --resume continues "
            "once that is put right"
        ) from error
