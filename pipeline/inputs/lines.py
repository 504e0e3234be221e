"""Files of lines, plain or compressed, as bytes: one line in memory at a time."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.columns import LONGEST
from pipeline.inputs.finding import InputFile
from pipeline.inputs.readers import long_line
from pipeline.records import RowError
from pipeline.storage.causes import NetworkError

PASSED_BYTES = 1 << 20  # read at a time of what is passed over
SKIP_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16)))


def bounded_lines(stream: BinaryIO, longest: int = LONGEST) -> Iterator[bytes | RowError]:
    """All lines, with their ends; in place of one of more than `longest` bytes, decompressed, an error.

    None is read beyond the bound: one without an end costs its row, no memory.
    """

    def following() -> bytes | RowError:
        line = stream.readline(longest + 2)  # its end, or a byte too many and a sign of more
        if len(line) <= longest or len(line.rstrip(b"\r\n")) <= longest:
            return line
        while line and not line.endswith(b"\n"):
            line = stream.readline(PASSED_BYTES)
        return long_line(longest)

    return iter(following, b"")


@contextmanager
def open_lines(file: InputFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as it is, and its lines as bytes, decompressed."""
    with file.open() as raw, _decompressed(raw, file.compression) as stream:
        yield raw, stream


def check_magic(file: InputFile) -> None:
    with file.open() as handle:
        start = handle.read(4)
    magics = (GZIP_MAGIC,) if file.compression == "gzip" else ZSTD_MAGICS
    if start and not start.startswith(magics):
        raise InputError(
            f"{file.path} is not compressed with {file.compression}, as its name says; rename it"
        )


def _decompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    if compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(ZstdReader(raw)))
    return raw


class ZstdReader(io.RawIOBase):
    """Decompresses all frames of an open Zstandard file, with pyarrow alone.

    Arrow's stream, asked for n bytes of which the file has fewer before a cut, fails without giving those. So
    after a failure this one starts again, skips what it gave already, and asks for single bytes.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._stream = pa.CompressedInputStream(raw, "zstd")
        self._given = 0
        self._has_failed = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(1 if self._has_failed else len(buffer))
        except OSError as error:
            if self._has_failed or isinstance(error, NetworkError) or not self._raw.seekable():
                raise
            self._start_again()
            data = self._stream.read(1)
        buffer[: len(data)] = data
        self._given += len(data)
        return len(data)

    def _start_again(self) -> None:
        self._has_failed = True
        self._failed_stream = self._stream  # its end would close the file
        self._raw.seek(0)
        self._stream = pa.CompressedInputStream(self._raw, "zstd")
        left = self._given
        while left:
            left -= len(self._stream.read(min(left, SKIP_BYTES)))
