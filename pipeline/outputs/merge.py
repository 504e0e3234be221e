"""Answers scattered over chunks, gathered in the order of the output, a group at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.outputs.answers import combined
from pipeline.outputs.rowindex import ChunkKey, Location, Place
from pipeline.storage.causes import READ_ERRORS, told
from pipeline.values.converting import converted

GROUP_ROWS = 10_000
GROUP_BYTES = 64 << 20
CACHED_CHUNKS = 256
CACHED_BYTES = 16 << 20

ReadChunk = Callable[[int, int], pa.Table]  # by part, and where in it
Convert = Callable[[str, pa.Array, pa.DataType], pa.Array]  # values of a copied column, by name


def merge(
    locations: Iterable[Location],
    read: ReadChunk,
    own: pa.Schema,
    copied: pa.Schema,
    convert: Convert,
) -> Iterator[pa.Table]:
    """Tables of columns, each small enough for one group of the output.

    The columns `own` are taken from where the answers are, `copied` from where the copied columns are. A
    column that a chunk lacks is null; one that it holds as another type goes through `convert`.
    """
    cache = _ChunkCache(read)
    both = pa.schema([*own, *copied])
    for group in _groups(locations):
        own_places, copied_places = [row.own for row in group], [row.copied for row in group]
        halves = [(own, own_places), (copied, copied_places)]
        columns: list[pa.ChunkedArray] = []
        for schema, places in [(both, own_places)] if own_places == copied_places else halves:
            if schema.names:
                columns += map(combined, _gathered(schema, places, cache, convert).columns)
        table = pa.Table.from_arrays(columns, schema=both)
        yield _numbered(table, group) if "row" in own.names else table


def refuse_misfit(name: str, array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values as `kind`; a `ConfigError` if one of them does not fit."""
    what = f"{name!r} of a row that stays, though this run did not read it, is {array.type}"
    remedy = f"; --keep-columns {name}:string keeps both"
    with told(f"{what} and does not fit {kind}", remedy, ConfigError, READ_ERRORS):
        return converted(array, kind)


def null_misfits(name: str, array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values as `kind`; null where one does not fit."""
    try:
        return converted(array, kind)
    except READ_ERRORS:
        if len(array) == 1:
            return pa.nulls(1, kind)
    pieces = [null_misfits(name, array.slice(row, 1), kind) for row in range(len(array))]
    return pa.chunked_array(pieces, kind).combine_chunks()


def _groups(locations: Iterable[Location]) -> Iterator[list[Location]]:
    group: list[Location] = []
    size = 0
    for location in locations:
        group.append(location)
        size += location.bytes
        if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _gathered(schema: pa.Schema, places: Sequence[Place], cache: _ChunkCache, convert: Convert) -> pa.Table:
    """The columns of a schema, of the rows at these places, in their order."""
    wanted: dict[ChunkKey, list[int]] = {}
    for key, place in places:
        wanted.setdefault(key, []).append(place)
    # without the rest of their chunks, which may not all fit in memory
    tables = {key: _fitted(cache.get(key), wanted[key], schema, convert) for key in sorted(wanted)}
    used = dict.fromkeys(tables, 0)
    pieces = []
    for key, run in groupby(key for key, _ in places):
        count = len(list(run))
        pieces.append(tables[key].slice(used[key], count))
        used[key] += count
    return pa.concat_tables(pieces)


def _numbered(table: pa.Table, group: Sequence[Location]) -> pa.Table:
    """The rows with the numbers that they have in the input now."""
    position = table.schema.get_field_index("row")
    rows = pa.array([location.row for location in group], pa.int64())
    return table.set_column(position, table.schema.field(position), rows)


def _fitted(chunk: pa.Table, places: list[int], schema: pa.Schema, convert: Convert) -> pa.Table:
    """Some rows of a chunk as a schema: only tables of one can be joined."""
    names = [name for name in schema.names if name in chunk.column_names]
    if not names:
        return pa.Table.from_arrays([pa.nulls(len(places), kind) for kind in schema.types], schema=schema)
    rows = rows_at(chunk.select(names), places)
    columns = [
        _as(field, rows[field.name], convert) if field.name in names else pa.nulls(len(places), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _as(field: pa.Field, column: pa.ChunkedArray, convert: Convert) -> pa.ChunkedArray:
    if column.type == field.type:
        return column
    return pa.chunked_array([convert(field.name, chunk, field.type) for chunk in column.chunks], field.type)


def rows_at(table: pa.Table, places: list[int]) -> pa.Table:
    """The rows of a table at these places, in their order."""
    if places == list(range(table.num_rows)):
        return table
    try:
        return table.take(pa.array(places, pa.int64()))
    except (pa.ArrowException, ValueError):  # not every type can be taken from; all can be sliced
        return pa.concat_tables([table.slice(place, 1) for place in places])


class _ChunkCache:
    """The chunks used last: neighbours in the input often share one."""

    def __init__(self, read: ReadChunk) -> None:
        self._read = read
        self._tables: OrderedDict[ChunkKey, pa.Table] = OrderedDict()
        self._bytes = 0

    def get(self, key: ChunkKey) -> pa.Table:
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = self._read(*key)
        self._tables[key] = table
        self._bytes += table.nbytes
        while len(self._tables) > CACHED_CHUNKS or (self._bytes > CACHED_BYTES and len(self._tables) > 1):
            _, dropped = self._tables.popitem(last=False)
            self._bytes -= dropped.nbytes
        return table
