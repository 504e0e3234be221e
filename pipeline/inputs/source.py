"""All inputs as one sequence of records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa

from pipeline.errors import InputError, StorageError
from pipeline.inputs.arrow import open_arrow
from pipeline.inputs.columns import PARTITION_TYPE, Columns, with_fields
from pipeline.inputs.csv import CsvReader
from pipeline.inputs.documents import DocumentReader
from pipeline.inputs.finding import InputFile, find_files, is_own, only_own, own_note, with_unique_labels
from pipeline.inputs.jsonl import JsonlReader
from pipeline.inputs.parquet import ParquetReader
from pipeline.inputs.passthrough import InputTable, PassPlan, check_held
from pipeline.inputs.readers import EmptyReader, LostReader, Reader, TextReader
from pipeline.inputs.rows import UNASKED, UNASKED_REMEDY
from pipeline.outputs.own import is_own_table
from pipeline.records import Record, RowError
from pipeline.storage.causes import READ_ERRORS, NetworkError, cause, is_out_of_reach, some
from pipeline.storage.remote import Place
from pipeline.storage.stdin import Once
from pipeline.texts.words import counted

OPENERS: dict[str, Callable[[InputFile], Reader]] = {
    "parquet": ParquetReader,
    "arrow": open_arrow,
    "jsonl": JsonlReader,
    "csv": CsvReader,
    "text": TextReader,
    **dict.fromkeys(("pdf", "docx", "html"), DocumentReader),
}


class Source:
    """The input, checked and opened; iterating yields `Document`s and `RowError`s in input order.

    `total_rows` is exact, or None if a file tells its rows only when read (JSON lines, Arrow streams). Of
    the last iteration, `out_of_reach` names the files whose rest could not be had, with the cause, and
    `has_faults` says that rows of a file were damaged: what they were is then not known.
    """

    def __init__(self, readers: Sequence[Reader], plan: PassPlan, columns: Columns, notes: list[str]) -> None:
        self.columns = columns
        self._readers = readers
        self._plan = plan
        self._current = 0
        self._records = [0] * len(readers)
        self.out_of_reach: list[str] = []
        self.has_faults = False
        counts = [reader.num_rows for reader in readers]
        known = [count for count in counts if count is not None]
        exact = len(known) == len(counts)
        self._weights = known if exact else [reader.file.size for reader in readers]
        self._weight_before = [0, *accumulate(self._weights)]
        self.total_rows: int | None = sum(known) if exact else None
        self.notes = notes
        self.schema: pa.Schema = plan.schema
        self.files: tuple[Place | Once, ...] = tuple(reader.file.path for reader in readers)

    @property
    def fraction_read(self) -> float:
        """How much of the input was read: of its rows, or of its bytes where rows are not known."""
        current, total = self._current, self._weight_before[-1]
        if current == len(self._readers) or not total:
            return float(current == len(self._readers))
        within = self._weights[current] * self._readers[current].fraction
        return (self._weight_before[current] + within) / total

    @property
    def files_told(self) -> list[tuple[str, int | None]]:
        """The name of each file but documents, and how many rows it has, if that is known before reading."""
        told = [(reader.file.name, reader.num_rows) for reader in self._readers if _has_rows(reader)]
        return sorted(told, key=lambda file: file[0])

    @property
    def files_read(self) -> list[tuple[str, int]]:
        """The same files, and how many rows of each the last iteration gave."""
        read = zip(self._readers, self._records, strict=True)
        return sorted((reader.file.name, rows) for reader, rows in read if _has_rows(reader))

    def refuse_out_of_reach(self, so: str) -> None:
        """A StorageError for files whose rest could not be had, though it may be sound; `so` ends it."""
        if self.out_of_reach:
            more = len(self.out_of_reach) - 1
            also = f", and {counted(more, 'file')} more" if more else ""
            raise StorageError(f"{self.out_of_reach[0]}{also}; {so}")

    @property
    def pages_without_text(self) -> int:
        """Pages of the PDF files read so far that may be scans."""
        return sum(reader.pages_without_text for reader in self._readers)

    def scans_told(self) -> list[str]:
        """What to say of pages without text; nothing where there are none."""
        pages = self.pages_without_text
        if not pages:
            return []
        files = sum(reader.pages_without_text > 0 for reader in self._readers)
        have = "has" if pages == 1 else "have"
        return [
            f"{counted(pages, 'page')} of {counted(files, 'PDF file')} {have} no text and may be scans: what "
            "they show is in no prompt unless their text is recognised first"
        ]

    def __iter__(self) -> Iterator[Record]:
        base = 0
        self._records = [0] * len(self._readers)
        self.out_of_reach, self.has_faults = [], False
        for number, reader in enumerate(self._readers):
            self._current = number
            try:
                for record in reader.read(self._plan, base):
                    reader.file.check()  # what was read before is then of one version
                    self._records[number] += 1
                    self.has_faults |= isinstance(record, RowError) and record.is_fault
                    yield record
                reader.file.check()
            except OSError as error:
                if not is_out_of_reach(error):
                    raise
                self.out_of_reach.append(f"{reader.file.path} cannot be read: {cause(error)}")
            base += reader.rows_read if reader.num_rows is None else reader.num_rows
        self._current = len(self._readers)


def _has_rows(reader: Reader) -> bool:
    """Whether rows stand in the file: a text document is one itself."""
    return not reader.file.is_document


def open_source(
    inputs: Sequence[str | Path],
    columns: Columns | Callable[[Mapping[str, str] | None], Columns],
    output: str = "",
) -> Source:
    """Find and check all input files; an `InputError` tells what makes the input as a whole unusable.

    `columns` may depend on those of the first file, by name and type, of which it is told. A column that
    `output`, by its extension, cannot hold is a `ConfigError`; a value that has no room there costs its row.
    Where no file at all can be reached it is a `StorageError`; where some can, files that are damaged cost an
    error row each.
    """
    files, found_notes = find_files(inputs)
    notes = list(found_notes)
    return source_of(open_readers(files, notes), columns, output, notes)


def source_of(
    readers: Sequence[Reader],
    columns: Columns | Callable[[Mapping[str, str] | None], Columns],
    output: str,
    notes: list[str],
) -> Source:
    """What has been opened as one sequence of records; as `open_source`."""
    if not isinstance(columns, Columns):
        columns = columns(first_columns(readers))
    if columns.requests:
        _refuse_tables(readers)
    for reader in readers:
        reader.use(columns)
    _refuse_lost(readers)
    tables = [table for table in map(_table, readers) if table.schema.names]
    if columns.asks_summary:
        _refuse_questions(tables)
    plan = PassPlan(
        columns,
        tables,
        Path(output),
        has_jsonl=_has_keys(readers, columns),
        partitions=frozenset(key for reader in readers for key in reader.file.partitions),
    )
    check_held(output, plan.columns)
    return Source(readers, plan, columns, notes + plan.notes)


def _refuse_lost(readers: Sequence[Reader]) -> None:
    """A StorageError, or else an InputError, if all files are out of reach or damaged."""
    lost = [reader for reader in readers if isinstance(reader, LostReader)]
    if lost and len(lost) == len(readers):
        raise next((reader for reader in lost if reader.is_out_of_reach), lost[0]).refusal


def _refuse_tables(readers: Iterable[Reader]) -> None:
    """An `InputError` for a file that has no lines, where rows are requests."""
    for reader in readers:
        if reader.file.format != "jsonl" and not isinstance(reader, EmptyReader | LostReader):
            raise InputError(f"{reader.file.label}: requests of OpenAI's Batch API are JSON lines")


def _table(reader: Reader) -> InputTable:
    """The columns of a file, and those of the folders that it lies in."""
    schema = with_fields(reader.schema, reader.file.partitions)
    return InputTable(reader.file.label, schema, reader.unreadable)


def _refuse_questions(tables: Sequence[InputTable]) -> None:
    """An `InputError` for a file with questions where summaries are asked for, as the first file has none."""
    asking = next((table for table in tables if UNASKED in table.schema.names), None)
    if asking is not None:
        raise InputError(
            f"{asking.label} has a column {UNASKED!r}, which the first file has not: {UNASKED_REMEDY}"
        )


def _has_keys(readers: Sequence[Reader], columns: Columns) -> bool:
    """Whether the columns to copy may be keys of JSON lines; if no file has a row, any may be asked for."""
    if any(reader.file.format == "jsonl" for reader in readers):
        return True
    return columns.keep is not None and all(isinstance(reader, EmptyReader) for reader in readers)


def open_readers(files: Sequence[InputFile], notes: list[str]) -> list[Reader]:
    """A reader for each file but outputs of ours, which are known once they are opened."""
    readers: list[Reader] = []
    own: list[InputFile] = []
    empty = [str(file.path) for file in files if file.is_empty]
    if empty:
        notes.append(f"of no bytes, and so of no rows: {some(empty, 3)}")
    for file in files:
        reader = _open(file)
        readers.append(reader) if reader is not None else own.append(file)
    if own:
        paths = [file.path for file in own]
        if not readers and any(file.origin == "pattern" for file in own):
            raise InputError(only_own(paths))
        notes.append(own_note(paths))
        for reader, file in zip(
            readers, with_unique_labels(tuple(reader.file for reader in readers)), strict=True
        ):
            reader.file = file
    return readers


def _open(file: InputFile) -> Reader | None:
    """None for an output of ours, unless the user named it."""
    if file.out_of_reach is not None:
        return LostReader(file, NetworkError(file.out_of_reach))
    try:
        return _open_reached(file)
    except OSError as error:
        if not is_out_of_reach(error):
            raise
        return LostReader(file, error)
    except InputError as error:
        if error.__cause__ is None:  # nothing is wrong with its bytes
            raise
        return LostReader(file, error.__cause__, error)


def _open_reached(file: InputFile) -> Reader | None:
    if file.is_empty:
        return EmptyReader(file)
    is_chosen = file.origin == "named"
    try:
        reader = OPENERS[file.format](file)
    except InputError:
        if not is_chosen and is_own(file):
            return None
        raise
    return reader if is_chosen or not is_own_table(reader.schema) else None


def first_columns(readers: Iterable[Reader]) -> dict[str, str] | None:
    """Names and Arrow types of the columns of the first file with rows, else of the first that says them.

    Those that folders say are included. None if no file says any. Of JSON lines they are the keys of the
    first object, of a text document `text`. Raises StorageError where they cannot be had now of any file:
    without them rows would be asked otherwise.
    """
    empty: dict[str, str] | None = None
    out_of_reach: StorageError | None = None
    for reader in readers:
        try:
            columns = reader.columns_told()
        except READ_ERRORS as error:
            if is_out_of_reach(error):
                out_of_reach = StorageError(f"{reader.file.path} cannot be read: {cause(error)}")
            continue  # reading it will tell
        if columns is not None:
            columns = {key: str(PARTITION_TYPE) for key in reader.file.partitions} | columns
            if reader.num_rows != 0:
                return columns
            empty = empty or columns
    if empty is None and out_of_reach is not None:
        raise out_of_reach
    return empty
