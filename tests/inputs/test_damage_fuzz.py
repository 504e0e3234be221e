"""Random damage: a refusal, or as many records as rows, never a crash."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.records import RowError
from pipeline.storage.sniff import misnamed

FUZZ = settings(max_examples=100, derandomize=True, deadline=None, database=None)


def read(path, **columns):
    return list(open_source([path], Columns(**columns)))


def parquet_bytes():
    sink = io.BytesIO()
    table = pa.table(
        {
            "text": [f"text {i}" for i in range(60)],
            "nested": [{"a": [i, None], "b": f"{i}"} for i in range(60)],
            "k": pa.array(["x", "y", None] * 20).dictionary_encode(),
        }
    )
    pq.write_table(table, sink, row_group_size=25, compression="snappy")
    return sink.getvalue()


PARQUET = parquet_bytes()


def check_fuzzed(path):
    """Either refused as a whole, or the rows that the footer promises, a fault in place of some."""
    try:
        source = open_source([path], Columns())
    except InputError:
        return
    records = list(source)
    assert source.total_rows == pq.read_metadata(path).num_rows
    rows = [record.source.row for record in records]
    for record, behind in zip(records, [*rows[1:], source.total_rows], strict=True):
        is_fault = isinstance(record, RowError) and record.is_fault
        assert behind > record.source.row if is_fault else behind == record.source.row + 1


@FUZZ
@given(
    flips=st.lists(st.tuples(st.integers(0, len(PARQUET) - 1), st.integers(1, 255)), min_size=1, max_size=8)
)
def test_flipped_bytes_in_parquet_never_crash(tmp_path_factory, flips):
    data = bytearray(PARQUET)
    for position, mask in flips:
        data[position] ^= mask
    path = tmp_path_factory.mktemp("fuzz") / "t.parquet"
    path.write_bytes(data)
    check_fuzzed(path)


@FUZZ
@given(lines=st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")), max_size=20))
def test_random_lines_never_crash(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "c.jsonl"
    content = b"\n".join(lines)
    assume(misnamed(content, "jsonl", None) is None)
    path.write_bytes(content)
    blank = sum(not line.removeprefix(b"\xef\xbb\xbf").strip() for line in lines)
    records = read(path)
    assert len(records) == len(lines) - blank
    assert all("\n" not in record.message for record in records if isinstance(record, RowError))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["text", "q", "id", "x"]), JSON), min_size=1, max_size=5),
    kind=st.sampled_from(["int", "string", "float", "bool", "timestamp[ms]", "binary", "uint8"]),
)
def test_any_json_in_any_key_never_crashes(tmp_path_factory, rows, kind):
    path = tmp_path_factory.mktemp("fuzz") / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read(path)) == len(rows)
    assert len(read(path, question="q", id="id", keep={"x": kind})) == len(rows)
