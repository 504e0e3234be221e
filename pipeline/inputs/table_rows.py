"""From batches of a Parquet or Arrow file to records, whatever their values hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns, lacking_field, with_arrays, with_fields
from pipeline.inputs.finding import InputFile
from pipeline.inputs.passthrough import cannot_be_read
from pipeline.inputs.readers import Reader
from pipeline.inputs.rows import BAD_UTF8, build, failed, or_error, until_fault
from pipeline.records import Record, RowError
from pipeline.storage.causes import READ_ERRORS, can_be_read, cause, some
from pipeline.values.dictionaries import BYTES, STRINGS

BATCH_ROWS = 64

_AS_BINARY = dict(zip(STRINGS, BYTES, strict=True))


def _check_columns(
    file: InputFile, schema: pa.Schema, columns: Columns, unreadable: Mapping[str, str]
) -> None:
    schema = with_fields(schema, file.partitions)
    for needed in columns.read:
        if needed in unreadable:
            raise InputError(f"{file.label}: {cannot_be_read(needed, unreadable[needed])}")
    lists = "a list of strings", _is_list_of_text
    wanted = (
        (columns.messages, "--messages-column names the messages", "a list of messages", _may_be_messages),
        (None if columns.messages else columns.text, "--text-column names the text", "a string", _is_text),
        (columns.question, "--question-column names the question", "a string", _is_text),
        (columns.questions, "--questions-column names the list of questions", *lists),
        (columns.id, "--id-column names the id", "", _is_any),
        (columns.task, "--task-column names the kind of task", "", _is_any),
    )
    for name, hint, what, fits in wanted:
        if name is None:
            continue
        if name not in schema.names:
            raise InputError(f"{file.label} has no column {name!r}; it has: {some(schema.names)} ({hint})")
        found = schema.field(name).type
        if not fits(found):
            raise InputError(f"{file.label}: column {name!r} is {found}, not {what} ({hint})")
    for name in columns.fields:
        if name not in schema.names:
            raise lacking_field(file.label, name, schema.names)


def _check_names(file: InputFile, schema: pa.Schema) -> None:
    """Refuse names that are no text, and columns that share one: which was meant cannot be told."""
    try:
        for field in schema:
            _decode_names(field)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file.label} has a column name that is not valid UTF-8; rename the column"
        ) from error
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise InputError(f"{file.label} has more than one column {twice[0]!r}; rename one of them")


def _decode_names(field: pa.Field) -> None:
    """Raise if a name at any depth is no UTF-8; Arrow decodes names only when asked for them."""
    assert field.name is not None
    for i in range(field.type.num_fields):
        _decode_names(field.type.field(i))


def _is_any(found: pa.DataType) -> bool:
    return True


def _is_text(found: pa.DataType) -> bool:
    """Whether values are strings, in whatever layout, or all of them null."""
    if pa.types.is_dictionary(found) or pa.types.is_run_end_encoded(found):
        return _is_text(found.value_type)
    if isinstance(found, pa.BaseExtensionType):
        return _is_text(found.storage_type)
    return found in _AS_BINARY or pa.types.is_null(found)


def _may_be_messages(found: pa.DataType) -> bool:
    kinds = (pa.ListType, pa.LargeListType, pa.ListViewType, pa.LargeListViewType, pa.FixedSizeListType)
    return _is_text(found) or (isinstance(found, kinds) and pa.types.is_struct(found.value_type))


def _is_list_of_text(found: pa.DataType) -> bool:
    kinds = (pa.ListType, pa.LargeListType, pa.ListViewType, pa.LargeListViewType, pa.FixedSizeListType)
    return pa.types.is_null(found) or (isinstance(found, kinds) and _is_text(found.value_type))


def is_sound(batch: pa.RecordBatch) -> bool:
    """Whether offsets, indices and UTF-8 of all values hold; reading unsound ones could crash the process."""
    return can_be_read(lambda: batch.validate(full=True))


def as_stream(batch: pa.RecordBatch) -> pa.Buffer:
    """A stream of this batch alone, which shares no buffer with others."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


class TableReader(Reader):
    """One file of a table, from batches of which it makes records."""

    def __init__(
        self, file: InputFile, schema: pa.Schema, unreadable: Mapping[str, str] | None = None
    ) -> None:
        """`unreadable` are the types of columns that the file has, but that are not in `schema`."""
        super().__init__(file)
        self.schema, self.unreadable = schema, unreadable or {}
        _check_names(file, schema)

    def use(self, columns: Columns) -> None:
        """Refuses a file that lacks a column read by name, or whose text is no text."""
        super().use(columns)
        _check_columns(self.file, self.schema, columns, self.unreadable)

    def _all_of(self, batches: Iterator[pa.RecordBatch], first: int, count: int) -> Iterator[Record]:
        """The records of `count` rows from row `first` on; those that do not come are one failure."""
        done = 0
        for batch in until_fault(batches):
            if isinstance(batch, RowError):
                if done < count:
                    yield self._unreadable(first + done, count - done, batch)
                return
            batch = batch.slice(0, count - done)
            yield from self._rows_of(batch, first + done)
            done += batch.num_rows
            self.fraction = (first + done) / max(self.num_rows or 0, 1)

    def _unreadable(self, index: int, count: int, fault: RowError) -> RowError:
        """One failure for all of `count` rows that are known to be there but cannot be had."""
        to_last = "" if count == 1 else f"to row {index + count - 1} "
        return failed(self.place(index), fault.kind, f"{to_last}cannot be read: {fault}", is_fault=True)

    def _rows_of(self, batch: pa.RecordBatch, first: int) -> Iterator[Record]:
        """A batch may hold millions of rows: convert few at a time, but check a sound one only once."""
        sound = is_sound(batch)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = with_arrays(batch.slice(start, BATCH_ROWS), self.file.partitions)
            copies = or_error(self._plan.of_batch, part) if sound or is_sound(part) else BAD_UTF8
            for i in range(part.num_rows):
                if isinstance(copies, RowError):  # some value is damaged, perhaps of this row
                    yield self._single(part.slice(i, 1), first + start + i)
                else:
                    yield self._sound(part, i, first + start, copies)

    def _sound(self, part: pa.RecordBatch, i: int, first: int, copies: pa.RecordBatch | None) -> Record:
        """Row `i` of some whose values are all sound, the first of which is row `first` of the file."""
        cells = {name: python_value(part.column(name)[i]) for name in self._columns.read}
        copied = None if copies is None else copies.slice(i, 1)
        return build(self._columns, self.place(first + i), cells, copied)

    def _single(self, row: pa.RecordBatch, index: int) -> Record:
        """A row of a batch in which some value is damaged, perhaps one of this row's."""
        used = [name for name in row.schema.names if name in {*self._columns.read, *self._plan.sources}]
        values = {name: lone(row.column(name)) for name in used}
        faults = {name: fault for name, value in values.items() if (fault := _fault(value)) is not None}
        copied = or_error(self._copy, values, faults)
        cells = {name: faults.get(name) or python_value(values[name][0]) for name in self._columns.read}
        return build(self._columns, self.place(index), cells, copied)

    def _copy(self, values: dict[str, pa.Array], faults: dict[str, RowError]) -> pa.RecordBatch | None:
        for name in self._plan.sources:
            if name in faults:
                raise RowError(faults[name].kind, f"{name!r} {faults[name]}")
        sound = {name: value for name, value in values.items() if name not in faults}
        # Absent names become nulls, so a column to hang one row on is needed when all are absent.
        return self._plan.of_batch(pa.RecordBatch.from_pydict(sound or {"": pa.nulls(1)}))


def lone(column: pa.Array) -> pa.Array:
    """A one-row column; of a dictionary only the entry used, as a bad one must not spoil other rows."""
    if not isinstance(column, pa.DictionaryArray):
        return column
    try:
        column.indices.validate(full=True)
        index = column.indices[0].as_py()
        if index is None:
            return pa.nulls(1, column.type)
        if not 0 <= index < len(column.dictionary):
            return column
        zero = pa.array([0], column.type.index_type)
        entry = column.dictionary.slice(index, 1)
        return pa.DictionaryArray.from_arrays(zero, entry, ordered=column.type.ordered)
    except READ_ERRORS:
        return column


def _fault(column: pa.Array) -> RowError | None:
    try:
        column.validate(full=True)
    except READ_ERRORS as error:
        if _is_sound_as_bytes(column):
            return BAD_UTF8
        return RowError("unreadable", f"cannot be read: {cause(error)}")
    return None


def _is_sound_as_bytes(column: pa.Array) -> bool:
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary
    plain = _AS_BINARY.get(column.type)
    return plain is not None and can_be_read(lambda: column.view(plain).validate(full=True))


def python_value(scalar: pa.Scalar) -> object:
    """As Python has it, else as Arrow writes it, as Python's times have no nanoseconds and few years."""
    try:
        return scalar.as_py()
    except READ_ERRORS:
        pass
    try:
        return scalar.cast(pa.string()).as_py()
    except READ_ERRORS as error:
        return RowError("bad_value", f"is {scalar.type}, of which this value cannot be read: {cause(error)}")
