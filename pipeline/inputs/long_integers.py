"""Integers of more than 64 bits, which Polars writes: Arrow's reader refuses the whole file for them.

A schema is a FlatBuffers message. Tables in it point back to a list of where their fields are, fields to
what lies ahead of them; so the few bytes that tell the width of an integer can be found, and changed.
"""

from __future__ import annotations

import base64
import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow.parquet as pq

PREFIX_BYTES = 8  # of a message, before its table
INT = 2  # in the schema's list of types
MOST_BITS = 64
PARQUET_END = struct.Struct("<I4s")

# The key and its value as Thrift writes them; a message in base64 begins so, as its prefix is all ones.
_ARROW_SCHEMA = re.compile(rb"ARROW:schema\x18[\x80-\xff]*[\x00-\x7f](/////[A-Za-z0-9+/]*=*)")


class LongInteger(NamedTuple):
    """A column that holds such integers, perhaps deep inside, and where in the message their width stands."""

    column: str
    type_name: str
    position: int


def long_integers(message: bytes) -> list[LongInteger]:
    """Those of a schema's message; raises struct.error or ValueError where it is none."""
    root = _Table(message, _follow(message, PREFIX_BYTES))
    schema = root.table(2)
    return (
        []
        if schema is None
        else [found for field in schema.tables(1) for found in _inside(field, field.text(0))]
    )


def readable_footer(file: BinaryIO) -> tuple[pq.FileMetaData, dict[str, str]]:
    """The footer of a Parquet file with widths that Arrow reads, and the types of such columns by name.

    What is read of these columns means nothing. A ValueError if there are none.
    """
    footer = _footer(file)
    match = _ARROW_SCHEMA.search(footer)
    message = bytearray(base64.b64decode(match[1])) if match else bytearray()
    found = long_integers(bytes(message)) if match else []
    if match is None or not found:
        raise ValueError("it holds no integers of more than 64 bits")
    for each in found:
        struct.pack_into("<i", message, each.position, MOST_BITS)
    footer = footer[: match.start(1)] + base64.b64encode(message) + footer[match.end(1) :]
    content = b"PAR1" + footer + PARQUET_END.pack(len(footer), b"PAR1")
    return pq.read_metadata(io.BytesIO(content)), {each.column: each.type_name for each in found}


def _footer(file: BinaryIO) -> bytes:
    end = file.seek(-PARQUET_END.size, io.SEEK_END)
    length, _ = PARQUET_END.unpack(file.read(PARQUET_END.size))
    file.seek(end - length)
    return file.read(length)


def _inside(field: _Table, column: str) -> Iterator[LongInteger]:
    integer = field.table(3)
    if field.byte(2) == INT and integer is not None:
        place = integer.place(0)
        bits = 0 if place is None else struct.unpack_from("<i", integer.message, place)[0]
        if place is not None and bits > MOST_BITS:
            yield LongInteger(column, f"{'' if integer.byte(1) else 'u'}int{bits}", place)
    for child in field.tables(5):
        yield from _inside(child, column)


class _Table:
    """A table of a message, whose fields are numbered in the order of the schema of Arrow's format."""

    def __init__(self, message: bytes, start: int) -> None:
        self.message = message
        self._start = start
        self._fields = start - struct.unpack_from("<i", message, start)[0]

    def place(self, number: int) -> int | None:
        """Where a field is, None where it has its default."""
        entry = 4 + 2 * number
        if entry >= struct.unpack_from("<H", self.message, self._fields)[0]:
            return None
        offset = struct.unpack_from("<H", self.message, self._fields + entry)[0]
        return self._start + offset if offset else None

    def byte(self, number: int) -> int:
        place = self.place(number)
        return 0 if place is None else self.message[place]

    def table(self, number: int) -> _Table | None:
        place = self.place(number)
        return None if place is None else _Table(self.message, _follow(self.message, place))

    def text(self, number: int) -> str:
        place = self.place(number)
        if place is None:
            return ""
        start = _follow(self.message, place)
        length = struct.unpack_from("<I", self.message, start)[0]
        return self.message[start + 4 : start + 4 + length].decode()

    def tables(self, number: int) -> Iterator[_Table]:
        place = self.place(number)
        if place is None:
            return
        start = _follow(self.message, place)
        for i in range(struct.unpack_from("<I", self.message, start)[0]):
            yield _Table(self.message, _follow(self.message, start + 4 + 4 * i))


def _follow(message: bytes, place: int) -> int:
    return place + struct.unpack_from("<I", message, place)[0]
