"""Columns copied from the input to the output: which, under which names, as which types."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import InputError, RowError
from pipeline.io.answers import ANSWER_NAMES, QUESTION_NAME
from pipeline.io.causes import READ_ERRORS, cause, some
from pipeline.io.columns import Columns, type_named
from pipeline.io.dictionaries import wide

EXTRA = "extra"


@dataclass(frozen=True, slots=True)
class Table:
    """A Parquet or Arrow file as far as its columns go."""

    label: str
    schema: pa.Schema


@dataclass(frozen=True, slots=True)
class PassColumn:
    """`source` is the input's name for it; None means all other keys of a JSONL object, as JSON."""

    source: str | None
    field: pa.Field


class PassPlan:
    """Turns rows of any input file into batches of one schema."""

    def __init__(
        self,
        columns: Columns,
        tables: Sequence[Table],
        *,
        has_jsonl: bool,
        type_held: Callable[[pa.DataType], pa.DataType] = lambda kind: kind,
        partitions: frozenset[str] = frozenset(),
    ) -> None:
        """`type_held` says in which type the output holds a value: one that does not fit costs its row.

        `partitions` are keys of JSONL that get columns of their own, as folders say them.
        """
        kept = columns.kept
        if kept is None:
            wanted = _all_columns(columns, tables)
        else:
            wanted = _kept_columns(kept, tables, has_jsonl=has_jsonl)
        if kept is None and has_jsonl:
            wanted.append((None, pa.field(EXTRA, pa.large_string())))
        self._roles = frozenset(columns.roles)
        self._takes_keys = kept is not None
        self._partitions = partitions
        wanted = [(source, field.with_type(type_held(field.type))) for source, field in wanted]
        self.columns, self.notes = _rename(wanted, holds_question=columns.holds_question)
        self.schema = pa.schema([column.field for column in self.columns])

    @property
    def sources(self) -> tuple[str, ...]:
        """The input columns that are copied."""
        return tuple(column.source for column in self.columns if column.source is not None)

    def of_batch(self, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """The copied columns of a table's rows; a `RowError` if a value does not fit its type."""
        if not self.columns:
            return None
        arrays = [_from_batch(column, batch) for column in self.columns]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def of_object(self, row: Mapping[str, object]) -> pa.RecordBatch | None:
        """The copied keys of one JSONL object; a `RowError` if a value does not fit its type."""
        if not self.columns:
            return None
        arrays = [self._from_object(column, row) for column in self.columns]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _from_object(self, column: PassColumn, row: Mapping[str, object]) -> pa.Array:
        if column.source is None:
            rest = {key: value for key, value in row.items() if key not in self._roles | self._partitions}
            return pa.array([_json_text(EXTRA, rest) if rest else None], column.field.type)
        if not self._takes_keys and column.source not in self._partitions:
            return pa.nulls(1, column.field.type)
        return _from_value(column.source, row.get(column.source), column.field.type)


def _all_columns(columns: Columns, tables: Sequence[Table]) -> list[tuple[str | None, pa.Field]]:
    names = dict.fromkeys(
        name for table in tables for name in table.schema.names if name not in columns.roles
    )
    return [(name, _unified(name, tables)) for name in names]


def _kept_columns(
    kept: tuple[tuple[str, str | None], ...], tables: Sequence[Table], *, has_jsonl: bool
) -> list[tuple[str | None, pa.Field]]:
    wanted: list[tuple[str | None, pa.Field]] = []
    there = list(dict.fromkeys(name for table in tables for name in table.schema.names))
    for name, type_name in kept:
        if name not in there and not has_jsonl:
            has = f"it has: {some(there)}" if there else "text documents have none"
            raise InputError(f"there is no column {name!r} to keep; {has}")
        if type_name is not None:
            field = pa.field(name, type_named(type_name))
            _refuse_impossible_casts(field, tables)
        else:
            field = _unified(name, tables) if name in there else pa.field(name, pa.large_string())
        wanted.append((name, field))
    return wanted


def _unified(name: str, tables: Sequence[Table]) -> pa.Field:
    """One field for a column of several files; all nulls take the others' type, dictionaries a common one."""
    first: tuple[Table, pa.Field] | None = None
    for table in tables:
        if table.schema.get_field_index(name) < 0:
            continue
        field = table.schema.field(name)
        if first is None or pa.types.is_null(first[1].type):
            first = table, field
        elif field.type == first[1].type or pa.types.is_null(field.type):
            continue
        elif wide(field.type) == wide(first[1].type):
            first = table, field.with_type(wide(field.type))
        else:
            raise InputError(
                f"column {name!r} is {first[1].type} in {first[0].label} but {field.type} in {table.label}; "
                f"keep it as one type for both, as in --keep-columns {name}:string"
            )
    assert first is not None
    return _without_field_id(first[1])


def _without_field_id(field: pa.Field) -> pa.Field:
    """Nullable, as a failed row has no values; without Parquet's field number, which is another file's."""
    metadata = {key: value for key, value in (field.metadata or {}).items() if key != b"PARQUET:field_id"}
    return pa.field(field.name, field.type, nullable=True, metadata=metadata or None)


def _refuse_impossible_casts(field: pa.Field, tables: Sequence[Table]) -> None:
    for table in tables:
        if table.schema.get_field_index(field.name) < 0:
            continue
        own = table.schema.field(field.name).type
        try:
            pa.nulls(0, own).cast(field.type)
        except READ_ERRORS as error:
            raise InputError(
                f"{table.label}: column {field.name!r} is {own} and cannot become {field.type} "
                f"({cause(error)}); keep it without a type"
            ) from error


def _rename(
    wanted: list[tuple[str | None, pa.Field]], *, holds_question: bool
) -> tuple[tuple[PassColumn, ...], list[str]]:
    """Columns under names that clash neither with the output's own nor with each other."""
    taken = {name for name in ANSWER_NAMES if holds_question or name != QUESTION_NAME}
    free = {field.name for _, field in wanted} - taken
    columns, notes = [], []
    for source, field in wanted:
        name = field.name
        while name in taken or (name != field.name and name in free):
            name += "_input"
        if name != field.name:
            notes.append(
                f"input column {field.name!r} is written as {name!r}, as there is another {field.name!r}"
            )
        taken.add(name)
        columns.append(PassColumn(source, field.with_name(name)))
    return tuple(columns), notes


def _from_batch(column: PassColumn, batch: pa.RecordBatch) -> pa.Array:
    position = batch.schema.get_field_index(column.source) if column.source is not None else -1
    if position < 0:
        return pa.nulls(batch.num_rows, column.field.type)
    array = batch.column(position)
    if array.type == column.field.type:
        return array
    try:
        return array.cast(column.field.type)
    except READ_ERRORS as error:
        raise _misfit(str(column.source), column.field.type, error) from error


def _from_value(name: str, value: object, wanted: pa.DataType) -> pa.Array:
    """One JSON value as an Arrow array, with the same casts that a table's column gets."""
    if value is None:
        return pa.nulls(1, wanted)
    if pa.types.is_large_string(wanted) and not isinstance(value, str):
        value = _json_text(name, value)
    try:
        # Not pa.array([value], wanted), which cuts 5.5 down to an integer without a word.
        return pa.array([value]).cast(wanted)
    except (TypeError, *READ_ERRORS) as error:
        raise _misfit(name, wanted, error) from error


def _misfit(name: str, wanted: pa.DataType, error: BaseException) -> RowError:
    return RowError(
        "bad_value", f"{name!r} does not fit {wanted}: {cause(error)}; keep it as another type, or not at all"
    )


def _json_text(name: str, value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)  # half a surrogate pair survives as an escape only
    except (ValueError, RecursionError) as error:
        raise RowError("bad_value", f"{name!r} cannot be copied as JSON: {cause(error)}") from error
    return text
