"""Writing answers to outputs, and reading them, for the tests of writing."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.writing import output_writer
from pipeline.records import Answer

EXTENSIONS = [".parquet", ".arrow", ".feather", ".ipc", ".arrows", ".jsonl"]
NOTHING = pa.schema([])


def write(path, answers, passthrough=NOTHING, *, metadata=None, overwrite=False, **options):
    schema = output_schema(passthrough, metadata or {}, **options)
    with output_writer(path, schema, overwrite) as writer:
        if answers:
            writer.write_table(answers_table(answers, schema))


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path)
    opened = pa.ipc.open_stream if path.suffix == ".arrows" else pa.ipc.open_file
    return opened(path.read_bytes()).read_all()


def rows(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return read(path).to_pylist()


def answers(count, **values):
    return [Answer(id=f"id {i}", row=i, answer=f"answer {i}", **values) for i in range(count)]
