"""Copied columns of rows that are done, as the input has them in this run, on disk until they are published.

They are worth nothing to another run, which reads the input itself: the file is not made durable, and what a
killed run left of it is removed.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from pipeline.outputs.answers import copied_table
from pipeline.outputs.chunks import pack_chunk, read_chunk
from pipeline.outputs.rowindex import Copied
from pipeline.storage.whole_file import open_new

CHUNK_ROWS = 1_000
CHUNK_BYTES = 1 << 20


class CurrentCopies:
    """A file of chunks of the rows added, in their order; without columns to copy there is none."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """`schema` has the copied columns alone. Removes what is there."""
        self._path, self._schema = path, schema
        self._file: BinaryIO | None = None
        self._end = 0
        self._waiting: list[pa.RecordBatch | None] = []
        self._waiting_bytes = 0
        kinds = schema.types
        self._lone = [i for i, kind in enumerate(kinds) if not pa.types.is_dictionary(kind)]
        path.unlink(missing_ok=True)

    def add(self, row: pa.RecordBatch | None) -> Copied | None:
        """Add the copied columns of one row, None for one that has no values; returns where they are.

        None where there are no columns to copy.
        """
        if not self._schema.names:
            return None
        copied = Copied(self._end, len(self._waiting), self._bytes(row))
        self._waiting.append(row)
        self._waiting_bytes += copied.bytes
        if len(self._waiting) >= CHUNK_ROWS or self._waiting_bytes >= CHUNK_BYTES:
            self.flush()
        return copied

    def flush(self) -> None:
        """Write what waits, so that `read` finds all rows."""
        if not self._waiting:
            return
        if self._file is None:
            self._file = open_new(self._path, like=self._path.parent)
        chunk = pack_chunk(copied_table(self._waiting, self._schema))
        self._file.write(chunk)
        self._file.flush()
        self._end += len(chunk)
        self._waiting, self._waiting_bytes = [], 0

    def read(self, offset: int) -> pa.Table:
        """The rows of the chunk that begins there."""
        return read_chunk(self._path, offset)

    def _bytes(self, row: pa.RecordBatch | None) -> int:
        """About what a row holds; dictionaries, which rows share, count for nothing."""
        if row is None:
            return 0
        return sum(row.column(i).nbytes for i in self._lone)

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            with suppress(OSError):  # what is left to be written, to a disk that is full, is wanted no more
                self._file.close()
            self._file = None
            with suppress(OSError):  # the next run removes it
                self._path.unlink()
