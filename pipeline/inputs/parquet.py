"""Reading Parquet, row group by row group, with what damage allows."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.inputs.finding import InputFile
from pipeline.inputs.long_integers import readable_footer
from pipeline.inputs.rows import read_fault
from pipeline.inputs.table_rows import BATCH_ROWS, TableReader
from pipeline.records import Record
from pipeline.storage.causes import READ_ERRORS, changed, told

# Without it pyarrow reads whole column chunks, which of a text column is nearly the whole row group.
BUFFER_BYTES = 1 << 20
BATCH_BYTES = 16 << 20


class ParquetReader(TableReader):
    """One Parquet file; its footer is read at once, its rows only in `read`."""

    def __init__(self, file: InputFile) -> None:
        with told(f"{file.path} is not a readable Parquet file", kind=InputError, of=READ_ERRORS):
            parquet, unreadable = _open(file)
            with parquet:
                schema, self._groups = _layout(parquet, unreadable)
        self.num_rows = sum(self._groups)
        super().__init__(file, schema, unreadable)

    def _records(self) -> Iterator[Record]:
        try:
            parquet = self._reopen()
        except READ_ERRORS as error:
            fault = read_fault(error)
            if self.num_rows:
                yield self._unreadable(0, self.num_rows, fault)
            return
        with parquet:
            first = 0
            for group, count in enumerate(self._groups):
                yield from self._all_of(self._batches(parquet, group), first, count)
                first += count

    def _reopen(self) -> pq.ParquetFile:
        parquet, unreadable = _open(self.file)
        if _layout(parquet, unreadable) != (self.schema, self._groups):
            parquet.close()
            raise changed()
        return parquet

    def _batches(self, parquet: pq.ParquetFile, group: int) -> Iterator[pa.RecordBatch]:
        """All of a row group; at their end, a ValueError for rows that did not come."""
        wanted = {*self._columns.read, *self._plan.sources}
        names = [name for name in self.schema.names if name in wanted]
        yield from parquet.iter_batches(_batch_rows(parquet, group), row_groups=[group], columns=names)
        raise ValueError("the row group holds fewer rows than the footer says")


def _open(file: InputFile) -> tuple[pq.ParquetFile, dict[str, str]]:
    """The file, and of columns that cannot be read, which are to be passed over, the types."""
    try:
        return _opened(file), {}
    except pa.ArrowNotImplementedError as error:
        try:
            with file.open() as handle:
                metadata, unreadable = readable_footer(handle)
        except (ValueError, LookupError, struct.error):
            raise error from None
        return _opened(file, metadata), unreadable


def _opened(file: InputFile, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    file.check()
    return pq.ParquetFile(
        file.path if isinstance(file.path, Path) else file.open(),
        metadata=metadata,
        pre_buffer=False,
        buffer_size=BUFFER_BYTES,
        page_checksum_verification=True,
        memory_map=False,
    )


def _batch_rows(parquet: pq.ParquetFile, group: int) -> int:
    """Fewer rows at a time where documents are so long that a usual batch of them would fill the memory."""
    metadata = parquet.metadata.row_group(group)
    fitting = BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)
    return max(1, min(BATCH_ROWS, fitting))


def _layout(parquet: pq.ParquetFile, unreadable: Collection[str]) -> tuple[pa.Schema, tuple[int, ...]]:
    metadata = parquet.metadata
    groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise ValueError("its footer contradicts itself about the number of rows")
    schema = parquet.schema_arrow
    if unreadable:
        schema = pa.schema([field for field in schema if field.name not in unreadable], schema.metadata)
    return schema, groups
