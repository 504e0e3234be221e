"""Columns copied from the input to the output: which, under which names, as which types.

That the output can hold them is proven by writing a row before any is answered.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import Columns, Keep, type_named
from pipeline.outputs.answers import QUESTION_NAME, answers_table, output_schema
from pipeline.outputs.batch_lines import URL
from pipeline.outputs.chunks import pack_chunk
from pipeline.outputs.formats import SINKS, type_held
from pipeline.outputs.own_columns import ANSWERS, STATS
from pipeline.outputs.published import Published
from pipeline.records import Answer, RowError
from pipeline.settings.questions import refuse_columns
from pipeline.storage.causes import READ_ERRORS, cause, some, told
from pipeline.values.converting import converted, converts
from pipeline.values.dictionaries import BYTES, STRINGS, TWINS, has_twins, settled
from pipeline.values.jsonvalues import KEYS, held_text
from pipeline.values.unify import common

EXTRA = "extra"
OTHER_FORMATS = (".arrows", ".arrow", ".parquet", ".jsonl")
MOST_NAMED = 5
BAD_VALUE = partial(RowError, "bad_value")


@dataclass(frozen=True, slots=True)
class InputTable:
    """A Parquet or Arrow file as far as its columns go."""

    label: str
    schema: pa.Schema
    unreadable: Mapping[str, str]  # the types of columns that are not in the schema, as none can read them


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
        tables: Sequence[InputTable],
        output: Path,
        *,
        has_jsonl: bool,
        partitions: frozenset[str],
    ) -> None:
        """The types are those in which `output` holds values: one that does not fit costs its row.

        `partitions` are keys of JSONL that get columns of their own, as folders say them; so has the address
        of a request. The others remain keys in an output of JSON lines, unless it is of the first version.
        """
        as_keys = QUESTION_NAME not in columns.predates and output.suffix.lower() == ".jsonl"
        kept = columns.keep
        if kept is None:
            wanted = _all_columns(columns, tables)
        else:
            wanted = _kept_columns(kept, tables, has_jsonl=has_jsonl)
        if kept is None and has_jsonl:
            wanted.append((None, pa.field(EXTRA, pa.large_string(), metadata=KEYS if as_keys else None)))
        if columns.requests and URL not in (kept or ()):
            wanted.insert(0, (URL, pa.field(URL, pa.large_string())))
        self._roles = frozenset(columns.roles)
        self._takes_keys = kept is not None
        self._with_columns = partitions | ({URL} if columns.requests else set())
        wanted = [(source, field.with_type(type_held(output, field.type))) for source, field in wanted]
        refuse_columns(columns.asked, [field.name for _, field in wanted])
        self.columns, self.notes = _rename(wanted, columns.names_of_answers)
        if kept is None:
            self.notes += _left_out(tables)
        self.schema = pa.schema([column.field for column in self.columns])
        names = frozenset(column.field.name for column in self.columns if column.source is not None)
        self._taken = names | columns.names_of_answers if as_keys else frozenset()

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
            rest = {key: value for key, value in row.items() if key not in self._roles | self._with_columns}
            rest = {free_name(key, self._taken, row): value for key, value in rest.items()}
            return pa.array([_json_text(EXTRA, rest) if rest else None], column.field.type)
        if not self._takes_keys and column.source not in self._with_columns:
            return pa.nulls(1, column.field.type)
        return _from_value(column.source, row.get(column.source), column.field.type)


def _all_columns(columns: Columns, tables: Sequence[InputTable]) -> list[tuple[str | None, pa.Field]]:
    names = dict.fromkeys(
        name for table in tables for name in table.schema.names if name not in columns.roles
    )
    return [(name, _unified(name, tables)) for name in names]


def _kept_columns(
    kept: Keep, tables: Sequence[InputTable], *, has_jsonl: bool
) -> list[tuple[str | None, pa.Field]]:
    wanted: list[tuple[str | None, pa.Field]] = []
    there = list(dict.fromkeys(name for table in tables for name in table.schema.names))
    for name, type_name in kept.items():
        _refuse_unreadable(name, tables)
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


def cannot_be_read(name: str, type_name: str) -> str:
    """What is to be said of a column that is there and needed."""
    return f"column {name!r} is {type_name}, which cannot be read; write it as another type, or name another"


def _refuse_unreadable(name: str, tables: Sequence[InputTable]) -> None:
    for table in tables:
        if name in table.unreadable:
            raise InputError(f"{table.label}: {cannot_be_read(name, table.unreadable[name])}")


def _left_out(tables: Sequence[InputTable]) -> list[str]:
    return [
        f"{table.label}: column {name!r} is {type_name}, which cannot be read, and is left out"
        for table in tables
        for name, type_name in table.unreadable.items()
    ]


def _unified(name: str, tables: Sequence[InputTable]) -> pa.Field:
    """One field for a column of several files, whose type holds the values of them all."""
    there = [(table, table.schema.field(name)) for table in tables if name in table.schema.names]
    first = there[0]
    kind = settled(first[1].type)
    for table, field in there[1:]:
        joined = common(kind, settled(field.type))
        if joined is None or not all(converts(one, joined) for one in (kind, field.type)):
            raise InputError(
                f"column {name!r} is {first[1].type} in {first[0].label} but {field.type} in {table.label}; "
                + _remedy(name, tables)
            )
        if pa.types.is_null(kind):
            first = table, field
        kind = joined
    return _copied_field(first[1], kind)


def _remedy(name: str, tables: Sequence[InputTable]) -> str:
    """What makes one type of a column that has several, or leaves it out."""
    kinds = [table.schema.field(name).type for table in tables if name in table.schema.names]
    # bytes need not be text
    for type_name in ("binary", "string") if any(kind in BYTES for kind in kinds) else ("string",):
        if all(converts(kind, type_named(type_name)) for kind in kinds):
            return f"keep it as one type for both, as in --keep-columns {name}:{type_name}"
    return f"leave it out: name all columns but {name!r} in --keep-columns"


def _copied_field(field: pa.Field, kind: pa.DataType) -> pa.Field:
    """Nullable, as a failed row has no values; without what was told of another file, or another type."""
    metadata = {
        key: value
        for key, value in (field.metadata or {}).items()
        if key != b"PARQUET:field_id" and not (kind != field.type and key.startswith(b"_PL_"))
    }
    return pa.field(field.name, kind, nullable=True, metadata=metadata or None)


def _refuse_impossible_casts(field: pa.Field, tables: Sequence[InputTable]) -> None:
    for table in tables:
        if table.schema.get_field_index(field.name) < 0:
            continue
        own = table.schema.field(field.name).type
        try:
            converted(pa.nulls(0, own), field.type)
        except READ_ERRORS as error:
            raise InputError(
                f"{table.label}: column {field.name!r} is {own} and cannot become {field.type} "
                f"({cause(error)}); keep it without a type"
            ) from error


def free_name(name: str, taken: Collection[str], others: Collection[str]) -> str:
    """A name that is none of those taken, and unless it is the one that was wanted, none of the others."""
    free = name
    while free in taken or (free != name and free in others):
        free += "_input"
    return free


def _rename(
    wanted: list[tuple[str | None, pa.Field]], own: frozenset[str]
) -> tuple[tuple[PassColumn, ...], list[str]]:
    """Columns under names that clash neither with the output's own nor with each other."""
    taken = set(own)
    free = {field.name for _, field in wanted} - taken
    columns, notes = [], []
    for source, field in wanted:
        name = free_name(field.name, taken, free)
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
    with _misfits_told(str(column.source), column.field.type):
        return converted(batch.column(position), column.field.type)


def _from_value(name: str, value: object, wanted: pa.DataType) -> pa.Array:
    """One JSON value as an Arrow array, with the casts that a table's column gets, but for loose ones."""
    if value is None:
        return pa.nulls(1, wanted)
    is_text = wanted in STRINGS
    if is_text and not isinstance(value, str):
        value = _json_text(name, value)
    with _misfits_told(name, wanted):
        if is_text:
            return pa.array([value], wanted)
        # Not pa.array([value], wanted), which cuts 5.5 down to an integer without a word.
        array = pa.array([value])
        _refuse_loose_casts(array.type, wanted)
        return converted(array, wanted)


def _refuse_loose_casts(own: pa.DataType, wanted: pa.DataType) -> None:
    """A ValueError for what a cast of one value would do without a word.

    It would drop a key of an object that the struct it becomes lacks, and take `true` for the number 1; of a
    table a whole column of booleans becomes numbers, as its type says beforehand what they are.
    """
    if pa.types.is_struct(own) and pa.types.is_struct(wanted):
        for field in own:
            if wanted.get_field_index(field.name) < 0:
                raise ValueError(f"it has no field {field.name!r}")
            _refuse_loose_casts(field.type, wanted.field(field.name).type)
    elif pa.types.is_list(own) and wanted.num_fields == 1 and not pa.types.is_struct(wanted):
        _refuse_loose_casts(own.value_type, wanted.field(0).type)
    elif pa.types.is_boolean(own) and (pa.types.is_integer(wanted) or pa.types.is_floating(wanted)):
        raise ValueError("a boolean is no number")


def _misfits_told(name: str, wanted: pa.DataType) -> AbstractContextManager[None]:
    """Turn what a value that does not fit its type raises into the error of its row."""
    remedy = "; keep it as another type, or not at all"
    return told(f"{name!r} does not fit {wanted}", remedy, BAD_VALUE, (TypeError, *READ_ERRORS))


def _json_text(name: str, value: object) -> str:
    with told(f"{name!r} cannot be copied as JSON", kind=BAD_VALUE, of=(ValueError, RecursionError)):
        return held_text(value)


def check_held(output: str, columns: Sequence[PassColumn]) -> None:
    """Refuse columns that an output of this name, by its extension, cannot hold.

    The message names the first of them, its type, and what helps, which is tried too. An extension that is
    not known is told elsewhere.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in SINKS or _cannot_hold(suffix, columns) is None:
        return
    for column in columns:
        why = _cannot_hold(suffix, [column])
        if why is not None:
            raise ConfigError(
                f"column {column.field.name!r} is {column.field.type}, which {suffix} cannot hold ({why}); "
                f"{_other_ways(suffix, column, columns)}"
            )
    raise ConfigError(f"{output} cannot be written as {suffix}: {_cannot_hold(suffix, columns)}")


def _cannot_hold(suffix: str, columns: Sequence[PassColumn]) -> str | None:
    """Why such columns cannot be kept in a journal, written and read back; None if a row of nulls can."""
    if suffix == ".jsonl" and any(has_twins(column.field.type) for column in columns):
        return TWINS
    copied = pa.schema([column.field for column in columns])
    schema = output_schema(copied, {}, lacks=(*copied.names, ANSWERS, STATS))
    content = io.BytesIO()
    try:
        table = answers_table([Answer(id="", row=0)], schema)
        pack_chunk(table)
        sink = SINKS[suffix](content, schema)
        sink.write(table)
        sink.finish()
        if suffix != ".jsonl":
            written = Published(Path(f"output{suffix}"), pa.py_buffer(content.getvalue()))
            for group in written:
                written.read(group)
    except (TypeError, *READ_ERRORS) as error:
        return cause(error)
    return None


def _other_ways(suffix: str, column: PassColumn, columns: Sequence[PassColumn]) -> str:
    """All that helps: another format, text, or going without."""
    able = [other for other in OTHER_FORMATS if other != suffix and _cannot_hold(other, columns) is None]
    remedies = [f"name an output with {able[0]}"] if able else []
    names = [other.source for other in columns if other is not column and other.source is not None]
    others = names[:MOST_NAMED]
    if column.source is not None and converts(column.field.type, pa.large_string()):
        as_text = ",".join([f"{column.source}:string", *others])
        remedies.append(f"keep it as text, as in --keep-columns {as_text}")
    if others:
        remedies.append(f"leave it out, as in --keep-columns {','.join(others)}")
    return ", or ".join(remedies)
