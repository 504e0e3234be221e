"""Columns that stand in the names of folders, `year=2024/`, as Hive and Spark write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import unquote

import pyarrow as pa

Partitions = Mapping[str, str | None]

KIND = pa.large_string()
NULL = "__HIVE_DEFAULT_PARTITION__"


def partitions_of(folders: Sequence[str]) -> dict[str, str | None]:
    """The columns that the names of a file's folders say, outermost first; names of another form say none."""
    found: dict[str, str | None] = {}
    for folder in folders:
        key, equals, value = folder.partition("=")
        if key and equals:
            found[unquote(key)] = None if value == NULL else unquote(value)
    return found


def with_fields(schema: pa.Schema, partitions: Partitions) -> pa.Schema:
    """The schema with a text column for each key that it lacks."""
    for key in partitions:
        if key not in schema.names:
            schema = schema.append(pa.field(key, KIND))
    return schema


def with_arrays(batch: pa.RecordBatch, partitions: Partitions) -> pa.RecordBatch:
    """The batch with a column of one value for each key that it lacks."""
    for key, value in partitions.items():
        if key not in batch.schema.names:
            batch = batch.append_column(
                pa.field(key, KIND), pa.repeat(pa.scalar(value, KIND), batch.num_rows)
            )
    return batch
