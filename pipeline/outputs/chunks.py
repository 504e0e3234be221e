"""A journal's parts: files of chunks, each a checked Arrow stream that is durable once appended.

A chunk is a magic word, the length and the CRC-32 of what follows, and then a whole Arrow IPC stream, so
that a chunk can be read without those before it, and a torn one is told from a whole one. Behind the stream,
where readers of Arrow look no more, stands how many rows it has, which a damaged chunk tells as well.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from pipeline.storage.whole_file import create_new, sync_folder

MAGIC = b"MARSCHNK"
HEADER = struct.Struct("<8sQI")

_ROWS = struct.Struct("<4sI")
_ROWS_MAGIC = b"ROWS"
_CRC = struct.Struct("<I")
_TRAILER_BYTES = _ROWS.size + _CRC.size
_SEARCHED_BYTES = 1 << 20  # read at once in search of the next chunk
_SECTOR_BYTES = 4096  # what a disk loses at once


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where in its part a chunk begins and ends, and what it holds."""

    offset: int
    end: int
    table: pa.Table


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes of a part in which no chunk can be read; `rows` that they held, None where that is not known."""

    offset: int
    end: int
    rows: int | None


def pack_chunk(table: pa.Table) -> bytes:
    """The bytes of a chunk."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    rows = _ROWS.pack(_ROWS_MAGIC, table.num_rows)
    content = stream.getvalue().to_pybytes() + rows + _CRC.pack(zlib.crc32(rows))
    return HEADER.pack(MAGIC, len(content), zlib.crc32(content)) + content


def read_chunk(path: Path, offset: int) -> pa.Table:
    """The chunk that begins at `offset`, known to be whole when the part was scanned or written."""
    with path.open("rb") as part:
        chunk = _next_chunk(_Readable(part, path.stat().st_size), offset)
    if chunk is None:
        raise OSError(errno.EIO, f"{path.name} was damaged during the run")
    return chunk.table


def scan_part(path: Path, lost: Callable[[Damage], None] = lambda damage: None) -> Iterator[Chunk]:
    """All whole chunks of a part, which stays as it is; `lost` is told of what is damaged."""
    with path.open("rb") as part:
        yield from whole_chunks(part, path.stat().st_size, lost)


def whole_chunks(
    part: BinaryIO, size: int, lost: Callable[[Damage], None] = lambda damage: None
) -> Iterator[Chunk]:
    """All whole chunks of the first `size` bytes, those behind damaged ones too; `lost` as in `scan_part`.

    An end that a killed run has left unfinished was promised to nobody, and is no damage. Raises OSError
    where the part cannot be read at several places, or there is no memory to read it, which says nothing
    about the part.
    """
    readable, end = _Readable(part, size), 0
    while end < size:
        chunk = _next_chunk(readable, end)
        if chunk is None:
            chunk = _chunk_behind(readable, end)
            damage = _damage(readable, end, size if chunk is None else chunk.offset)
            if damage is not None:
                lost(damage)
        if chunk is None:
            return
        end = chunk.end
        yield chunk


class _Readable:
    """The first `size` bytes of a file, of which bad sectors read as zeros, which no checksum lets pass."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._descriptor, self.size = file.fileno(), size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from `offset` on, fewer at the end. An OSError where the file fails at other places too."""
        try:
            return self._read(offset, length)
        except OSError as error:
            if error.errno != errno.EIO or not self._is_readable():
                raise
        starts = range(offset - offset % _SECTOR_BYTES, min(offset + length, self.size), _SECTOR_BYTES)
        sectors = b"".join(self._sector(start) or bytes(_SECTOR_BYTES) for start in starts)
        return sectors[offset - starts.start :][:length]

    def _is_readable(self) -> bool:
        """Whether one of three places can be read: else it is rather the disk that fails, or the network."""
        return any(self._sector(place) for place in (0, self.size // 2, max(self.size - _SECTOR_BYTES, 0)))

    def _sector(self, start: int) -> bytes | None:
        """None for a bad one."""
        try:
            return self._read(start, _SECTOR_BYTES)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        return None

    def _read(self, offset: int, length: int) -> bytes:
        # not the file's own read, which reads ahead, and so fails for what is behind
        pieces = []
        while length > 0 and (piece := os.pread(self._descriptor, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _next_chunk(part: _Readable, offset: int) -> Chunk | None:
    end = _stated_end(part, offset)
    if end is None or end > part.size:  # a damaged length must not be read into memory
        return None
    try:
        content = part.read(offset, end - offset)
        stream = memoryview(content)[HEADER.size :]
        if len(content) < end - offset or zlib.crc32(stream) != HEADER.unpack_from(content)[2]:
            return None
        return Chunk(offset, end, pa.ipc.open_stream(pa.py_buffer(stream)).read_all())
    except MemoryError as error:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
    except (ValueError, pa.ArrowException):
        return None


def _stated_end(part: _Readable, offset: int) -> int | None:
    """Where a chunk ends by its own word; None where none begins."""
    header = part.read(offset, HEADER.size)
    if len(header) < HEADER.size:
        return None
    magic, length, _ = HEADER.unpack(header)
    return offset + HEADER.size + length if magic == MAGIC else None


def _chunk_behind(part: _Readable, offset: int) -> Chunk | None:
    """The first whole chunk behind one that is not: where that says that it ends, or wherever one begins.

    What the damaged chunk holds may look like a chunk itself, so that its own word comes first.
    """
    end = _stated_end(part, offset)
    if end is not None and end < part.size and (chunk := _next_chunk(part, end)) is not None:
        return chunk
    found = (_next_chunk(part, start) for start in _beginnings(part, offset + 1, part.size))
    return next((chunk for chunk in found if chunk is not None), None)


def _beginnings(part: _Readable, start: int, end: int) -> Iterator[int]:
    """Where the magic word stands between the two offsets."""
    while start < end:
        window = part.read(start, min(_SEARCHED_BYTES, end - start))
        if len(window) < len(MAGIC):
            return
        place = window.find(MAGIC)
        while place >= 0:
            yield start + place
            place = window.find(MAGIC, place + 1)
        start += len(window) - len(MAGIC) + 1


def _damage(part: _Readable, start: int, end: int) -> Damage | None:
    """What the bytes between two offsets were; None for an end that was never finished."""
    ends = [*_beginnings(part, start + 1, end), end]
    known = [rows for rows in (_rows_told(part, place) for place in ends) if rows is not None]
    stated = _stated_end(part, start)
    if end == part.size and not known and (stated is None or stated > end):
        return None
    return Damage(start, end, sum(known) if known else None)


def _rows_told(part: _Readable, end: int) -> int | None:
    """How many rows the chunk had that ended there."""
    if end < _TRAILER_BYTES:
        return None
    trailer = part.read(end - _TRAILER_BYTES, _TRAILER_BYTES)
    magic, rows = _ROWS.unpack_from(trailer)
    crc = _CRC.unpack_from(trailer, _ROWS.size)[0]
    return rows if magic == _ROWS_MAGIC and crc == zlib.crc32(trailer[: _ROWS.size]) else None


class PartWriter:
    """One part while it grows; after a failure it ends with its last whole chunk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = create_new(path, like=path.parent)
        self._length = 0
        try:
            sync_folder(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, chunk: bytes) -> int:
        """Write a chunk, durable on return, and say at which offset."""
        offset = self._length
        try:
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
            self._check_name()
        except BaseException:
            # Of a chunk that was not durable in time nothing is to be read later.
            with suppress(OSError):
                os.ftruncate(self._descriptor, offset)
            raise
        self._length += len(chunk)
        return offset

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def _check_name(self) -> None:
        """Writing to a file whose folder was removed succeeds, and is lost."""
        if not os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
