"""Reading JSON lines, plain or compressed, one line in memory at a time."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import BinaryIO, cast

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.columns import LONGEST
from pipeline.inputs.finding import InputFile
from pipeline.inputs.readers import Reader, long_line
from pipeline.inputs.rows import build, failed, json_type, or_error, rest_lost, until_fault
from pipeline.records import Record, Row, RowError
from pipeline.storage.causes import NetworkError
from pipeline.storage.sniff import CR_ENDS
from pipeline.storage.stdin import Stdin
from pipeline.values.jsonvalues import parse_json

LINES_TRIED = 100  # for the columns, until one is an object
PASSED_BYTES = 1 << 20  # read at a time of what is passed over
SKIP_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16)))


class JsonlReader(Reader):
    """One file of JSON lines; how many lines it has is known only at its end."""

    def __init__(self, file: InputFile) -> None:
        super().__init__(file)
        if file.compression is not None and file.path.is_file():
            _check_magic(file)

    def columns_told(self) -> dict[str, str] | None:
        """The keys of the first object; of what can be read only once, if it has come already."""
        path = self.file.path
        if isinstance(path, Stdin):
            line = path.first_line()
            return None if line is None else _keys([line])
        if not path.is_file():  # a named pipe
            return None
        with open_lines(self.file) as (_, stream):
            return _keys(line for line in bounded_lines(stream) if isinstance(line, bytes))

    def _records(self) -> Iterator[Record]:
        """The records of all lines but blank ones."""
        for index, line in enumerate(until_fault(self._lines())):
            row = replace(self.place(index), place=f"{self.file.label} line {index + 1}")
            if isinstance(line, bytes):
                if line.strip():
                    yield self._record(line, row)
            elif line.kind == "unreadable":
                yield rest_lost(row, line)
            else:
                yield failed(row, line.kind, str(line))
            self.rows_read = index + 1

    def _record(self, line: bytes, row: Row) -> Record:
        try:
            cells = {**self.file.partitions, **_parse(line)}
        except RowError as error:
            is_fault = not line.endswith(b"\n")  # where the file may be cut
            return failed(row, error.kind, str(error), is_fault=is_fault)
        return build(self._columns, row, cells, or_error(self._plan.of_object, cells))

    def _lines(self) -> Iterator[bytes | RowError]:
        """Lines without a mark at their beginning, also midway, where files were joined."""
        with open_lines(self.file) as (raw, stream):
            for line in bounded_lines(stream, self._columns.longest_line):
                if self.file.size:
                    self.fraction = min(raw.tell() / self.file.size, 1.0)
                yield line.removeprefix(BOM) if isinstance(line, bytes) else line


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


def _check_magic(file: InputFile) -> None:
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


def _parse(line: bytes) -> dict[str, object]:
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(
            "bad_utf8", f"is not valid UTF-8 at byte {error.start}; convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        ends = error.msg == "Extra data" and error.doc[error.pos - 1] == "\r"
        hint = f"; the file {CR_ENDS}" if ends else ""
        raise RowError("bad_json", f"is not JSON: {error.msg} at character {error.pos + 1}{hint}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise RowError("bad_json", f"cannot be read as JSON: {reason}") from None
    if not isinstance(row, dict):
        raise RowError(
            "not_an_object", f"is {json_type(row)}, not an object; each line must be one JSON object"
        )
    return row


def _keys(lines: Iterable[bytes]) -> dict[str, str] | None:
    for line in islice(lines, LINES_TRIED):
        try:
            row = json.loads(line.removeprefix(BOM).decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return {key: type_of(value) for key, value in row.items()}
    return None


def type_of(value: object) -> str:
    try:
        return str(pa.infer_type([value]))
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return "null"


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
