"""Rows in files of the formats that most tests take: JSON lines and Parquet."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pq.read_table(path).to_pylist()
