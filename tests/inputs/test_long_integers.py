"""Columns of 128-bit integers, as Polars writes them, in files whose other columns are wanted."""

import base64
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs import long_integers
from pipeline.inputs.columns import Columns, parse_keep_columns
from pipeline.inputs.source import open_source

TABLE = pa.table({"text": ["a", "b"], "kind": pa.array(["k", "l"], pa.large_string()), "big": [1, 2]})


def widened(monkeypatch, message):
    """The message of a schema whose one column of 64-bit integers has 128 bits."""
    with monkeypatch.context() as patched:
        patched.setattr(long_integers, "MOST_BITS", 32)
        (found,) = long_integers.long_integers(message)
    changed = bytearray(message)
    struct.pack_into("<i", changed, found.position, 128)
    return bytes(changed)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    path = tmp_path / "in.parquet"
    pq.write_table(TABLE, path)
    message = base64.b64decode(pq.read_metadata(path).metadata[b"ARROW:schema"])
    content = path.read_bytes()
    path.write_bytes(
        content.replace(base64.b64encode(message), base64.b64encode(widened(monkeypatch, message)))
    )
    with pytest.raises(pa.ArrowNotImplementedError):
        pq.ParquetFile(path)
    return path


def test_the_column_is_left_out_with_a_note(parquet):
    source = open_source([parquet], Columns())
    assert source.notes == ["in.parquet: column 'big' is int128, which cannot be read, and is left out"]
    assert source.schema == pa.schema([("kind", pa.large_string())])
    assert [(record.text, record.source.passthrough["kind"][0].as_py()) for record in source] == [
        ("a", "k"),
        ("b", "l"),
    ]
    assert open_source([parquet], Columns(keep=parse_keep_columns("kind"))).notes == []


@pytest.mark.parametrize("columns", [{"keep": {"big": None}}, {"keep": {"big": "string"}}, {"id": "big"}])
def test_the_column_is_named_where_it_is_needed(parquet, columns):
    with pytest.raises(InputError) as caught:
        open_source([parquet], Columns(**columns))
    assert str(caught.value) == (
        "in.parquet: column 'big' is int128, which cannot be read; write it as another type, or name another"
    )


def test_the_column_of_an_arrow_stream_is_named(tmp_path, monkeypatch):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    (tmp_path / "in.arrows").write_bytes(widened(monkeypatch, sink.getvalue().to_pybytes()))
    with pytest.raises(InputError) as caught:
        open_source([tmp_path / "in.arrows"], Columns())
    assert str(caught.value) == (
        "in.arrows: column 'big' is int128, which cannot be read; write the file without it, or as Parquet"
    )
