"""Reading JSON lines, plain or compressed, one line in memory at a time."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO, cast

import pyarrow as pa

from pipeline.errors import InputError, RowError
from pipeline.inputs.columns import Columns
from pipeline.inputs.finding import InputFile
from pipeline.inputs.lines import LongLine, bounded_lines
from pipeline.inputs.passthrough import PassPlan
from pipeline.inputs.rows import Spot, build, json_type
from pipeline.inputs.zstd import ZstdReader
from pipeline.records import Record
from pipeline.storage.causes import ReadFault, until_fault
from pipeline.storage.sniff import CR_ENDS
from pipeline.values.jsonvalues import parse_json

BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16)))


class JsonlReader:
    """One file of JSON lines; how many lines it has is known only at its end."""

    num_rows: int | None = None

    def __init__(self, file: InputFile, columns: Columns) -> None:
        self.file = file
        self.fraction = 0.0
        self._columns = columns
        if file.compression is not None and file.path.is_file():
            _check_magic(file)

    def read(self, plan: PassPlan, base: int) -> Generator[Record, None, int]:
        """The records of all lines but blank ones; returns how many lines there are."""
        index = -1
        for index, line in enumerate(until_fault(self._lines())):
            spot = self._spot(base, index)
            if isinstance(line, ReadFault):
                yield spot.rest_lost(line)
            elif isinstance(line, LongLine):
                yield spot.failure("long_line", str(line))
            elif line.strip():
                yield self._record(line, plan, spot)
        return index + 1

    def _record(self, line: bytes, plan: PassPlan, spot: Spot) -> Record:
        try:
            row = {**self.file.partitions, **_parse(line)}
        except RowError as error:
            failed = spot.failure if line.endswith(b"\n") else spot.as_fault  # where the file may be cut
            return failed(error.kind, str(error))
        return build(self._columns, spot, row, _copied(plan, row))

    def _spot(self, base: int, index: int) -> Spot:
        label = self.file.label
        return Spot(base + index, f"{label} line {index + 1}", f"{label}:{index}")

    def _lines(self) -> Iterator[bytes | LongLine]:
        with ExitStack() as opened:
            raw = opened.enter_context(self.file.open())
            stream = opened.enter_context(_decompressed(raw, self.file.compression))
            for line in bounded_lines(stream, self._columns.longest_line):
                if self.file.size:
                    self.fraction = min(raw.tell() / self.file.size, 1.0)
                yield (
                    line if isinstance(line, LongLine) else line.removeprefix(BOM)
                )  # also midway, where files were joined


@contextmanager
def open_lines(file: InputFile) -> Iterator[BinaryIO]:
    """The file's lines as bytes, decompressed."""
    with ExitStack() as opened:
        raw = opened.enter_context(file.open())
        yield opened.enter_context(_decompressed(raw, file.compression))


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


def _copied(plan: PassPlan, row: dict[str, object]) -> pa.RecordBatch | RowError | None:
    try:
        return plan.of_object(row)
    except RowError as error:
        return error


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
