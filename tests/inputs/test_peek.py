"""The columns of an input, told before it is opened."""

import gzip

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from columns_told import columns_told

from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source

TABLE = pa.table({"body": ["x"], "n": [1]})
LINES = b'\xef\xbb\xbf\nno JSON\n{"body": "x", "n": 1, "tags": ["a"], "none": null}\n{"other": 1}\n'


def write_stream(table, path):
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", pq.write_table),
        ("a.arrow", feather.write_feather),
        ("a.feather", write_stream),
    ],
)
def test_tables_tell_their_schema(tmp_path, name, write):
    write(TABLE, tmp_path / name)
    assert columns_told(tmp_path / name) == {"body": "string", "n": "int64"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_tell_the_keys_of_the_first_object(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    assert columns_told(tmp_path / name) == {
        "body": "string",
        "n": "int64",
        "tags": "list<item: string>",
        "none": "null",
    }


def test_which_columns_are_read_may_hang_on_those_there_are(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet")
    source = open_source([tmp_path], lambda types: Columns(text=next(iter(types))))
    assert [record.text for record in source] == ["x"]


def test_a_text_document_is_a_text(tmp_path):
    (tmp_path / "a.md").write_text("x")
    assert columns_told(tmp_path) == {"text": "string"}


def test_the_first_file_with_rows_counts_and_a_damaged_one_does_not(tmp_path):
    pq.write_table(TABLE.slice(0, 0).rename_columns(["old", "n"]), tmp_path / "a.parquet")
    assert columns_told(tmp_path) == {"old": "string", "n": "int64"}
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    pq.write_table(TABLE, tmp_path / "c.parquet")
    assert columns_told(tmp_path) == {"body": "string", "n": "int64"}


def test_lines_without_an_object_tell_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("[]\n1\n")
    assert columns_told(tmp_path) is None
