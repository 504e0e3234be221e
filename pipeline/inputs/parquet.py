"""Reading Parquet, row group by row group, with what damage allows."""

from __future__ import annotations

import struct
from collections.abc import Collection, Generator, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.finding import InputFile
from pipeline.inputs.long_integers import readable_footer
from pipeline.inputs.passthrough import PassPlan
from pipeline.inputs.table_rows import BATCH_ROWS, TableRows, check_columns, check_names, is_sound
from pipeline.records import Record
from pipeline.storage.causes import READ_ERRORS, ReadFault, cause, until_fault

# Without it pyarrow reads whole column chunks, which of a text column is nearly the whole row group.
BUFFER_BYTES = 1 << 20
BATCH_BYTES = 16 << 20


class ParquetReader:
    """One Parquet file; its footer is read at once, its rows only in `read`."""

    def __init__(self, file: InputFile, columns: Columns) -> None:
        self.file = file
        self.fraction = 0.0
        self._columns = columns
        try:
            parquet, self.unreadable = _open(file)
            with parquet:
                self.schema, self._groups = _layout(parquet, self.unreadable)
        except READ_ERRORS as error:
            raise InputError(f"{file.path} is not a readable Parquet file: {cause(error)}") from error
        self.num_rows: int | None = sum(self._groups)
        check_names(file, self.schema)
        check_columns(file, self.schema, columns, self.unreadable)

    def read(self, plan: PassPlan, base: int) -> Generator[Record, None, int]:
        """The records of all rows; returns how many rows there are."""
        rows = TableRows(self.file, self._columns, plan, base)
        total = sum(self._groups)
        try:
            parquet = self._reopen()
        except READ_ERRORS as error:
            yield from rows.unreadable(0, total, ReadFault.of(error))
            return total
        with parquet:
            first = 0
            for group, count in enumerate(self._groups):
                yield from self._read_group(self._batches(parquet, group, plan), rows, first, count)
                first += count
        return total

    def _reopen(self) -> pq.ParquetFile:
        parquet, unreadable = _open(self.file)
        if _layout(parquet, unreadable) != (self.schema, self._groups):
            parquet.close()
            raise ValueError("the file was changed during the run")
        return parquet

    def _batches(self, parquet: pq.ParquetFile, group: int, plan: PassPlan) -> Iterator[pa.RecordBatch]:
        wanted = {*self._columns.read, *plan.sources}
        names = [name for name in self.schema.names if name in wanted]
        return parquet.iter_batches(_batch_rows(parquet, group), row_groups=[group], columns=names)

    def _read_group(
        self, batches: Iterator[pa.RecordBatch], rows: TableRows, first: int, count: int
    ) -> Iterator[Record]:
        """Exactly `count` records: what the footer promises and the pages do not hold is unreadable."""
        done, fault = 0, ReadFault("the row group holds fewer rows than the footer says")
        for batch in until_fault(batches):
            if isinstance(batch, ReadFault):
                fault = batch
                break
            batch = batch.slice(0, count - done)
            yield from rows.records(batch, first + done, sound=is_sound(batch))
            done += batch.num_rows
            self.fraction = (first + done) / sum(self._groups)
        yield from rows.unreadable(first + done, count - done, fault)


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
