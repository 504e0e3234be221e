"""The schema of a table, from as little of its file as tells it."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

FILE_MAGIC = b"ARROW1"


def table_schema(source: pa.NativeFile, format: str) -> tuple[pa.Schema, bool]:
    """The schema of a Parquet or Arrow file, and whether it may have rows; raises one of `READ_ERRORS`."""
    if format == "parquet":
        parquet = pq.ParquetFile(source, pre_buffer=False)
        return parquet.schema_arrow, parquet.metadata.num_rows > 0
    magic = source.read(len(FILE_MAGIC))
    source.seek(0)
    if magic == FILE_MAGIC:
        opened = pa.ipc.open_file(source)
        return opened.schema, opened.num_record_batches > 0
    return pa.ipc.open_stream(source).schema, True
