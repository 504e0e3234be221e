"""All inputs as one sequence of records."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from pipeline.errors import InputError, StorageError
from pipeline.inputs.arrow import open_arrow
from pipeline.inputs.columns import Columns
from pipeline.inputs.finding import InputFile, find_files, is_own, only_own, own_note, with_unique_labels
from pipeline.inputs.jsonl import JsonlReader
from pipeline.inputs.parquet import ParquetReader
from pipeline.inputs.partitions import with_fields
from pipeline.inputs.passthrough import InputTable, PassPlan
from pipeline.inputs.peek import first_columns
from pipeline.inputs.proof import check_held
from pipeline.inputs.rows import UNASKED, UNASKED_REMEDY, Spot
from pipeline.inputs.text import TextReader
from pipeline.outputs.formats import type_held
from pipeline.outputs.own import is_own_table
from pipeline.records import Record, RowFailure
from pipeline.storage.causes import OutOfReach, ReadFault, cause, is_out_of_reach, some
from pipeline.storage.remote import Place
from pipeline.storage.stdin import Stdin


class Reader(Protocol):
    """One opened file of any format."""

    file: InputFile
    num_rows: int | None
    fraction: float

    def read(self, plan: PassPlan, base: int) -> Generator[Record, None, int]:
        """Records numbered from `base`; returns how many rows the file has, blank lines included.

        Raises OutOfReach where the rest of the file cannot be had now.
        """
        ...


class EmptyReader:
    """A file without a byte, which has no rows, whatever its name says."""

    num_rows: int | None = 0

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.fraction = 1.0

    def read(self, plan: PassPlan, base: int) -> Generator[Record, None, int]:
        """No records."""
        yield from ()
        return 0


class UnreachableReader:
    """A file of which nothing can be had now."""

    num_rows: int | None = None

    def __init__(self, file: InputFile, why: str) -> None:
        self.file = file
        self.fraction = 1.0
        self.why = why

    def read(self, plan: PassPlan, base: int) -> Generator[Record, None, int]:
        """Raises OutOfReach at once."""
        yield from ()
        raise OutOfReach(self.why)


class DamagedReader:
    """A file that cannot be read from its beginning on, such as a table that was cut."""

    num_rows: int | None = None

    def __init__(self, file: InputFile, error: InputError, fault: ReadFault) -> None:
        self.file = file
        self.fraction = 1.0
        self.error = error
        self.fault = fault

    def read(self, plan: PassPlan, base: int) -> Generator[Record, None, int]:
        """The one failure for all of its rows, however many they are."""
        label = self.file.label
        yield Spot(base, f"{label} row 0", f"{label}:0").rest_lost(self.fault)
        return 1


OPENERS = {"parquet": ParquetReader, "arrow": open_arrow, "jsonl": JsonlReader, "text": TextReader}


class Source:
    """The input, checked and opened; iterating yields `Document`s and `RowFailure`s in input order.

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
        self.files: tuple[Place | Stdin, ...] = tuple(reader.file.path for reader in readers)

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

    def __iter__(self) -> Iterator[Record]:
        base = 0
        self._records = [0] * len(self._readers)
        self.out_of_reach, self.has_faults = [], False
        for number, reader in enumerate(self._readers):
            self._current, reader.fraction = number, 0.0
            base += yield from self._rows(number, base)
        self._current = len(self._readers)

    def _rows(self, number: int, base: int) -> Generator[Record, None, int]:
        """The records of one file; returns how many rows it has, as far as they could be read."""
        reader, read = self._readers[number], 0
        rows = reader.read(self._plan, base)
        while True:
            try:
                record = next(rows)
            except StopIteration as end:
                return int(end.value)
            except OutOfReach as error:
                self.out_of_reach.append(f"{reader.file.path} cannot be read: {error}")
                return reader.num_rows or read
            read = record.source.row + 1 - base
            self._records[number] += 1
            self.has_faults |= isinstance(record, RowFailure) and record.is_fault
            yield record


def _has_rows(reader: Reader) -> bool:
    """Whether rows stand in the file: a text document is one itself."""
    return reader.file.format != "text"


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
    if not isinstance(columns, Columns):
        columns = columns(first_columns(files))
    readers = _opened(files, columns, notes)
    _refuse_lost(readers)
    tables = [table for table in map(_table, readers) if table.schema.names]
    if columns.asks_summary:
        _refuse_questions(tables)
    plan = PassPlan(
        columns,
        tables,
        has_jsonl=_has_keys(readers, columns),
        type_held=partial(type_held, Path(output)),
        as_keys=columns.holds_question and Path(output).suffix.lower() == ".jsonl",
        partitions=frozenset(key for reader in readers for key in reader.file.partitions),
    )
    check_held(output, plan.columns)
    return Source(readers, plan, columns, notes + plan.notes)


def _refuse_lost(readers: Sequence[Reader]) -> None:
    """A StorageError, or else an InputError, if all files are out of reach or damaged."""
    unreachable = [reader for reader in readers if isinstance(reader, UnreachableReader)]
    damaged = [reader for reader in readers if isinstance(reader, DamagedReader)]
    if len(unreachable) + len(damaged) < len(readers):
        return
    if unreachable:
        raise StorageError(f"{unreachable[0].file.path} cannot be read: {unreachable[0].why}")
    if damaged:
        raise damaged[0].error


def _table(reader: Reader) -> InputTable:
    """The columns of a file, and those of the folders that it lies in."""
    schema = with_fields(_schema(reader), reader.file.partitions)
    return InputTable(reader.file.label, schema, getattr(reader, "unreadable", {}))


def _refuse_questions(tables: Sequence[InputTable]) -> None:
    """An `InputError` for a file with questions where summaries are asked for, as the first file has none."""
    asking = next((table for table in tables if UNASKED in table.schema.names), None)
    if asking is not None:
        raise InputError(
            f"{asking.label} has a column {UNASKED!r}, which the first file has not: {UNASKED_REMEDY}"
        )


def _schema(reader: Reader) -> pa.Schema:
    """The columns that a file itself says before it is read."""
    schema: pa.Schema = getattr(reader, "schema", pa.schema([]))
    return schema


def _has_keys(readers: Sequence[Reader], columns: Columns) -> bool:
    """Whether the columns to copy may be keys of JSON lines; if no file has a row, any may be asked for."""
    if any(reader.file.format == "jsonl" for reader in readers):
        return True
    return columns.kept is not None and all(isinstance(reader, EmptyReader) for reader in readers)


def _opened(files: Sequence[InputFile], columns: Columns, notes: list[str]) -> list[Reader]:
    """A reader for each file but outputs of ours, which are known once they are opened."""
    readers: list[Reader] = []
    own: list[InputFile] = []
    empty = [str(file.path) for file in files if file.is_empty]
    if empty:
        notes.append(f"of no bytes, and so of no rows: {some(empty, 3)}")
    for file in files:
        reader = _open(file, columns)
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


def _open(file: InputFile, columns: Columns) -> Reader | None:
    """None for an output of ours, unless the user named it."""
    if file.out_of_reach is not None:
        return UnreachableReader(file, file.out_of_reach)
    try:
        return _open_reached(file, columns)
    except OSError as error:
        if not is_out_of_reach(error):
            raise
        return UnreachableReader(file, cause(error))
    except InputError as error:
        why = error.__cause__
        if why is None:  # nothing is wrong with its bytes
            raise
        if is_out_of_reach(why):
            return UnreachableReader(file, cause(why))
        return DamagedReader(file, error, ReadFault.of(why))


def _open_reached(file: InputFile, columns: Columns) -> Reader | None:
    if file.is_empty:
        return EmptyReader(file)
    opener = OPENERS[file.format]
    if file.origin == "named" or file.format not in ("parquet", "arrow"):
        return opener(file, columns)
    try:
        reader: Reader = opener(file, columns)
    except InputError:
        if is_own(file):
            return None
        raise
    return None if is_own_table(_schema(reader)) else reader
