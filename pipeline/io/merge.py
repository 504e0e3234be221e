"""Answers scattered over chunks, gathered in the order of the output, a group at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import pyarrow as pa

from pipeline.io.answers import combined
from pipeline.io.converting import converted
from pipeline.io.rowindex import Location
from pipeline.io.writing import GROUP_BYTES, GROUP_ROWS

CACHED_CHUNKS = 256
CACHED_BYTES = 16 << 20

ChunkKey = tuple[int, int]  # part, and where in it
ReadChunk = Callable[[int, int], pa.Table]


def merge(locations: Iterable[Location], read: ReadChunk, schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of `schema`, each small enough for one group of the output."""
    cache = _ChunkCache(read, schema)
    for group in _groups(locations):
        yield _gather(group, cache)


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


def _gather(group: Sequence[Location], cache: _ChunkCache) -> pa.Table:
    picked = _pick(group, cache)
    used = dict.fromkeys(picked, 0)
    pieces = []
    for key, run in groupby(group, _key):
        count = len(list(run))
        pieces.append(picked[key].slice(used[key], count))
        used[key] += count
    table = pa.concat_tables(pieces)
    table = pa.Table.from_arrays([combined(column) for column in table.columns], schema=table.schema)
    position = table.schema.get_field_index("row")
    rows = pa.array([location.row for location in group], pa.int64())
    return table.set_column(position, table.schema.field(position), rows)


def _pick(group: Sequence[Location], cache: _ChunkCache) -> dict[ChunkKey, pa.Table]:
    """The group's rows of each chunk, in the order of the group, without the rest of their chunks."""
    places: dict[ChunkKey, list[int]] = {}
    for location in group:
        places.setdefault(_key(location), []).append(location.place)
    return {key: _rows(cache.get(key), places[key]) for key in sorted(places)}


def _rows(table: pa.Table, places: list[int]) -> pa.Table:
    if places == list(range(table.num_rows)):
        return table
    try:
        return table.take(pa.array(places, pa.int64()))
    except (pa.ArrowException, ValueError):  # not every type can be taken from; all can be sliced
        return pa.concat_tables([table.slice(place, 1) for place in places])


def _key(location: Location) -> ChunkKey:
    return location.part, location.chunk


class _ChunkCache:
    """The chunks used last: neighbours in the input often share one."""

    def __init__(self, read: ReadChunk, schema: pa.Schema) -> None:
        self._read = read
        self._schema = schema
        self._tables: OrderedDict[ChunkKey, pa.Table] = OrderedDict()
        self._bytes = 0

    def get(self, key: ChunkKey) -> pa.Table:
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = _cast(self._read(*key), self._schema)
        self._tables[key] = table
        self._bytes += table.nbytes
        while len(self._tables) > CACHED_CHUNKS or (self._bytes > CACHED_BYTES and len(self._tables) > 1):
            _, dropped = self._tables.popitem(last=False)
            self._bytes -= dropped.nbytes
        return table


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Chunks and outputs hold dictionaries in different ways; only tables of one type can be joined."""
    columns = [_as(column, field.type) for column, field in zip(table.columns, schema, strict=True)]
    return pa.Table.from_arrays(columns, schema=schema)


def _as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([converted(chunk, kind) for chunk in column.chunks], kind)
