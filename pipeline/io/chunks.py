"""A journal's parts: files of chunks, each a checked Arrow stream that is durable once appended.

A chunk is a magic word, the length and the CRC-32 of what follows, and then a whole Arrow IPC stream, so
that a chunk can be read without those before it, and a torn one is told from a whole one.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from pipeline.io.causes import READ_ERRORS
from pipeline.io.whole_file import sync_folder

MAGIC = b"MARSCHNK"
HEADER = struct.Struct("<8sQI")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where in its part a chunk begins and ends, and what it holds."""

    offset: int
    end: int
    table: pa.Table


def pack_chunk(table: pa.Table) -> bytes:
    """The bytes of a chunk."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    content = stream.getvalue().to_pybytes()
    return HEADER.pack(MAGIC, len(content), zlib.crc32(content)) + content


def read_chunk(path: Path, offset: int) -> pa.Table:
    """The chunk that begins at `offset`, known to be whole when the part was scanned or written."""
    with path.open("rb") as part:
        chunk = _next_chunk(part, offset, path.stat().st_size)
    if chunk is None:
        raise OSError(errno.EIO, f"{path.name} was damaged during the run")
    return chunk.table


def is_chunk(content: bytes) -> bool:
    """Whether the bytes are one whole chunk and nothing else."""
    if len(content) < HEADER.size:
        return False
    magic, length, crc = HEADER.unpack_from(content)
    stream = memoryview(content)[HEADER.size :]
    return magic == MAGIC and len(stream) == length and zlib.crc32(stream) == crc


def scan_part(path: Path) -> Iterator[Chunk]:
    """All whole chunks up to the first that is not, where the part is cut off for good."""
    size = path.stat().st_size
    end = 0
    with path.open("rb") as part:
        for chunk in whole_chunks(part, size):
            end = chunk.end
            yield chunk
    if end < size:
        os.truncate(path, end)


def whole_chunks(part: BinaryIO, size: int) -> Iterator[Chunk]:
    """All whole chunks of the first `size` bytes up to the first that is not; nothing is changed."""
    end = 0
    while (chunk := _next_chunk(part, end, size)) is not None:
        end = chunk.end
        yield chunk


def _next_chunk(part: BinaryIO, offset: int, size: int) -> Chunk | None:
    part.seek(offset)
    header = part.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    magic, length, crc = HEADER.unpack(header)
    end = offset + HEADER.size + length
    if magic != MAGIC or end > size:  # a damaged length must not be read into memory
        return None
    content = part.read(length)
    if zlib.crc32(content) != crc:
        return None
    try:
        return Chunk(offset, end, pa.ipc.open_stream(content).read_all())
    except READ_ERRORS:
        return None


class PartWriter:
    """One part while it grows; after a failure it ends with its last whole chunk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
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
            # Reading stops at a torn chunk as well; this is for what would be appended behind it.
            with suppress(OSError):
                os.ftruncate(self._descriptor, offset)
                os.lseek(self._descriptor, offset, os.SEEK_SET)
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
