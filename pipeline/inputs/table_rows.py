"""From batches of a Parquet or Arrow file to records, whatever their values hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa

from pipeline.errors import InputError, RowError
from pipeline.inputs.columns import Columns
from pipeline.inputs.finding import InputFile
from pipeline.inputs.partitions import with_arrays, with_fields
from pipeline.inputs.passthrough import PassPlan, cannot_be_read
from pipeline.inputs.rows import BAD_UTF8, Fault, Spot, build
from pipeline.records import Record
from pipeline.storage.causes import READ_ERRORS, ReadFault, cause, some

BATCH_ROWS = 64

_AS_BINARY = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def check_columns(
    file: InputFile, schema: pa.Schema, columns: Columns, unreadable: Mapping[str, str] | None = None
) -> None:
    """Refuse a file that lacks a column read by name, or whose text is no text.

    `unreadable` are the types of columns that it has, but that are not in `schema`.
    """
    schema = with_fields(schema, file.partitions)
    for needed in columns.read:
        if unreadable and needed in unreadable:
            raise InputError(f"{file.label}: {cannot_be_read(needed, unreadable[needed])}")
    wanted = (("--text-column", "text", columns.text), ("--question-column", "question", columns.question))
    for flag, role, name in wanted:
        if name is not None:
            _check_present(file, schema, name, f"({flag} names the {role})")
            found = schema.field(name).type
            if not _is_text(found):
                raise InputError(
                    f"{file.label}: column {name!r} is {found}, not a string ({flag} names the {role})"
                )
    if columns.questions is not None:
        hint = "(--questions-column names the list of questions)"
        _check_present(file, schema, columns.questions, hint)
        found = schema.field(columns.questions).type
        if not _is_list_of_text(found):
            raise InputError(
                f"{file.label}: column {columns.questions!r} is {found}, not a list of strings {hint}"
            )
    if columns.id is not None:
        _check_present(file, schema, columns.id, "(--id-column names the id)")
    if columns.task is not None:
        _check_present(file, schema, columns.task, "(--task-column names the kind of task)")


def _check_present(file: InputFile, schema: pa.Schema, name: str, hint: str) -> None:
    if name not in schema.names:
        raise InputError(f"{file.label} has no column {name!r}; it has: {some(schema.names)} {hint}")


def check_names(file: InputFile, schema: pa.Schema) -> None:
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


def _is_text(found: pa.DataType) -> bool:
    """Whether values are strings, in whatever layout, or all of them null."""
    if pa.types.is_dictionary(found) or pa.types.is_run_end_encoded(found):
        return _is_text(found.value_type)
    if isinstance(found, pa.BaseExtensionType):
        return _is_text(found.storage_type)
    return found in _AS_BINARY or pa.types.is_null(found)


def _is_list_of_text(found: pa.DataType) -> bool:
    kinds = (pa.ListType, pa.LargeListType, pa.ListViewType, pa.LargeListViewType, pa.FixedSizeListType)
    return pa.types.is_null(found) or (isinstance(found, kinds) and _is_text(found.value_type))


def is_sound(batch: pa.RecordBatch) -> bool:
    """Whether offsets, indices and UTF-8 of all values hold; reading unsound ones could crash the process."""
    try:
        batch.validate(full=True)
    except READ_ERRORS:
        return False
    return True


class TableRows:
    """Makes the records of one file's rows; `base` is the number of its first row over the whole input."""

    def __init__(self, file: InputFile, columns: Columns, plan: PassPlan, base: int) -> None:
        self._file = file
        self._columns = columns
        self._plan = plan
        self._base = base

    def records(self, batch: pa.RecordBatch, index: int, *, sound: bool) -> Iterator[Record]:
        """The records of a batch whose first row is row `index` of the file."""
        batch = with_arrays(batch, self._file.partitions)
        try:
            passthrough = self._plan.of_batch(batch) if sound else None
        except RowError:
            sound = False
        if not sound:
            for i in range(batch.num_rows):
                yield self._single(batch.slice(i, 1), index + i)
            return
        for i in range(batch.num_rows):
            cells = {name: _value(batch.column(name)[i]) for name in self._columns.read}
            copied = None if passthrough is None else passthrough.slice(i, 1)
            yield build(self._columns, self._spot(index + i), cells, copied)

    def unreadable(self, index: int, count: int, fault: ReadFault) -> Iterator[Record]:
        """One failure for all of `count` rows, if any, that are known to be there but cannot be had."""
        if count:
            to_last = "" if count == 1 else f"to row {index + count - 1} "
            yield self._spot(index).as_fault("unreadable", f"{to_last}cannot be read: {fault}")

    def unreadable_from(self, index: int, fault: ReadFault) -> Record:
        """One failure for the rest of a file whose number of rows is not known."""
        return self._spot(index).rest_lost(fault)

    def _spot(self, index: int) -> Spot:
        label = self._file.label
        return Spot(self._base + index, f"{label} row {index}", f"{label}:{index}")

    def _single(self, row: pa.RecordBatch, index: int) -> Record:
        """A row of a batch in which some value is damaged, perhaps one of this row's."""
        used = [name for name in row.schema.names if name in {*self._columns.read, *self._plan.sources}]
        values = {name: lone(row.column(name)) for name in used}
        faults = {name: fault for name, value in values.items() if (fault := _fault(value)) is not None}
        cells = {name: faults.get(name) or _value(values[name][0]) for name in self._columns.read}
        return build(self._columns, self._spot(index), cells, self._copy(values, faults))

    def _copy(
        self, values: dict[str, pa.Array], faults: dict[str, Fault]
    ) -> pa.RecordBatch | RowError | None:
        for name in self._plan.sources:
            if name in faults:
                return RowError(faults[name].kind, f"{name!r} {faults[name].what}")
        sound = {name: value for name, value in values.items() if name not in faults}
        if not self._plan.columns:
            return None
        try:
            # Absent names become nulls, so a column to hang one row on is needed when all are absent.
            return self._plan.of_batch(pa.RecordBatch.from_pydict(sound or {"": pa.nulls(1)}))
        except RowError as error:
            return error


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


def _fault(column: pa.Array) -> Fault | None:
    try:
        column.validate(full=True)
    except READ_ERRORS as error:
        return (
            BAD_UTF8 if _is_sound_as_bytes(column) else Fault("unreadable", f"cannot be read: {cause(error)}")
        )
    return None


def _is_sound_as_bytes(column: pa.Array) -> bool:
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary
    if column.type not in _AS_BINARY:
        return False
    try:
        column.view(_AS_BINARY[column.type]).validate(full=True)
    except READ_ERRORS:
        return False
    return True


def _value(scalar: pa.Scalar) -> object:
    """As Python has it, else as Arrow writes it, as Python's times have no nanoseconds and few years."""
    try:
        return scalar.as_py()
    except READ_ERRORS:
        pass
    try:
        return scalar.cast(pa.string()).as_py()
    except READ_ERRORS as error:
        return Fault("bad_value", f"is {scalar.type}, of which this value cannot be read: {cause(error)}")
