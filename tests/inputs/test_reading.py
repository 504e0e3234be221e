"""Documents and row failures from sound files of every format, through `open_source`."""

import gzip
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.records import Document


def read(path, **columns):
    return list(open_source([path], Columns(**columns)))


def only(path, **columns):
    (record,) = read(path, **columns)
    return record


def told(record):
    return record.kind, record.message


def write_arrow(path, table, *, stream=False, **options):
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=100)


def write_table(path, table):
    if path.suffix in (".parquet", ".pq"):
        pq.write_table(table, path, row_group_size=100)
    else:
        write_arrow(path, table, stream=path.suffix == ".arrows")


TABLE_NAMES = ["t.parquet", "t.pq", "t.arrow", "t.feather", "t.ipc", "t.arrows"]


@pytest.fixture(params=TABLE_NAMES)
def table_path(request, tmp_path):
    return tmp_path / request.param


def test_rows_of_a_table_keep_order_number_id_and_place(table_path):
    write_table(table_path, pa.table({"text": [f"text {i}" for i in range(250)], "year": range(250)}))
    records = read(table_path)
    assert [record.text for record in records] == [f"text {i}" for i in range(250)]
    assert [record.source.row for record in records] == list(range(250))
    assert records[216].source.place == f"{table_path.name} row 216"
    assert records[216].source.id == f"{table_path.name}:216"
    assert records[216].source.passthrough.to_pylist() == [{"year": 216}]
    assert all(record.question is None for record in records)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.large_string())],
    ids=str,
)
def test_every_kind_of_string_is_text(tmp_path, kind):
    for name in ("t.parquet", "t.arrow", "t.arrows"):
        write_table(tmp_path / name, pa.table({"text": pa.array(["one", "two", "one"]).cast(kind)}))
        assert [record.text for record in read(tmp_path / name)] == ["one", "two", "one"]


def test_a_missing_text_column_is_refused_with_those_there_are(tmp_path):
    path = tmp_path / "contracts.parquet"
    write_table(path, pa.table({"text": ["a"], "year": [1]}))
    with pytest.raises(InputError) as caught:
        read(path, text="body")
    expected = "contracts.parquet has no column 'body'; it has: text, year (--text-column names the text)"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ({"question": "no"}, "--question-column names the question"),
        ({"id": "no"}, "--id-column names the id"),
    ],
)
def test_missing_question_and_id_columns_are_refused(table_path, columns, hint):
    write_table(table_path, pa.table({"text": ["a"]}))
    with pytest.raises(InputError) as caught:
        read(table_path, **columns)
    assert str(caught.value) == f"{table_path.name} has no column 'no'; it has: text ({hint})"


def test_text_that_is_no_string_is_refused(table_path):
    write_table(table_path, pa.table({"text": [1], "q": [[2]]}))
    with pytest.raises(InputError) as caught:
        read(table_path)
    expected = f"{table_path.name}: column 'text' is int64, not a string (--text-column names the text)"
    assert str(caught.value) == expected


def test_two_columns_of_one_name_are_refused(table_path):
    write_table(table_path, pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
    with pytest.raises(InputError) as caught:
        read(table_path)
    assert str(caught.value) == f"{table_path.name} has more than one column 'text'; rename one of them"


def test_bad_rows_of_a_table_are_failures_in_their_place(table_path):
    table = pa.table(
        {"text": ["ok", None, "  \n", "ok", "ok"], "q": ["q", "q", "q", None, " "], "n": [0, 1, 2, 3, 4]}
    )
    write_table(table_path, table)
    records = read(table_path, question="q")
    name = table_path.name
    assert isinstance(records[0], Document)
    assert records[0].question == "q"
    assert [told(record) for record in records[1:]] == [
        ("missing_text", f"{name} row 1: 'text' is null"),
        ("empty_document", f"{name} row 2: 'text' is empty"),
        ("missing_question", f"{name} row 3: 'q' is null"),
        ("missing_question", f"{name} row 4: 'q' is empty"),
    ]
    assert [record.source.passthrough.to_pylist() for record in records] == [[{"n": i}] for i in range(5)]


def test_ids_come_from_their_column(table_path):
    write_table(table_path, pa.table({"text": ["a", "b", None], "key": ["x", None, "z"]}))
    good, bad, other = read(table_path, id="key")
    assert (good.source.id, other.source.id) == ("x", "z")
    assert told(bad) == (
        "missing_id",
        f"{table_path.name} row 1: there is no id in 'key'; --id-column names the id",
    )
    assert bad.source.id == f"{table_path.name}:1"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pa.scalar(7), "7"),
        (pa.scalar(b"\x01\xff"), "01ff"),
        (pa.scalar(1, pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        (pa.scalar("x").cast(pa.dictionary(pa.int8(), pa.string())), "x"),
    ],
    ids=["int", "bytes", "nanoseconds", "dictionary"],
)
def test_ids_of_any_type_become_text(tmp_path, value, text):
    write_arrow(tmp_path / "t.arrow", pa.table({"text": ["a"], "key": pa.array([value], value.type)}))
    assert only(tmp_path / "t.arrow", id="key").source.id == text


def test_one_question_for_all_rows(table_path):
    write_table(table_path, pa.table({"text": ["a", "b"], "q": ["1", "2"]}))
    assert [record.question for record in read(table_path, fixed_question="Why?")] == ["Why?", "Why?"]


def test_two_sources_of_questions_exclude_each_other():
    with pytest.raises(ConfigError) as caught:
        Columns(question="q", fixed_question="Why?")
    expected = (
        "a question column, a column of questions and one question for all rows exclude each other; "
        "give one of them"
    )
    assert str(caught.value) == expected
    with pytest.raises(ConfigError, match="the question column is the text column, 'text'"):
        Columns(question="text")


def test_an_arrow_stream_under_any_name_is_told_by_its_content(tmp_path):
    table = pa.table({"text": ["a"]})
    write_arrow(tmp_path / "stream.arrow", table, stream=True)
    write_arrow(tmp_path / "file.arrows", table)
    assert open_source([tmp_path / "stream.arrow"], Columns()).total_rows is None
    assert open_source([tmp_path / "file.arrows"], Columns()).total_rows == 1
    assert only(tmp_path / "stream.arrow").text == only(tmp_path / "file.arrows").text == "a"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_arrow_is_read(tmp_path, compression):
    table = pa.table({"text": ["a" * 1000] * 300, "n": range(300)})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    write_arrow(tmp_path / "t.arrow", table, options=options)
    source = open_source([tmp_path / "t.arrow"], Columns())
    assert source.total_rows == 300
    assert [record.source.passthrough.column("n")[0].as_py() for record in source] == list(range(300))


def test_empty_tables_have_no_rows(table_path):
    write_table(table_path, pa.table({"text": pa.array([], pa.string())}))
    source = open_source([table_path], Columns())
    assert list(source) == []
    assert source.fraction_read == 1.0


def test_rows_are_numbered_over_all_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n')
    write_table(tmp_path / "b.parquet", pa.table({"text": ["b"]}))
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    assert [(record.source.row, record.text) for record in read(tmp_path)] == [(0, "a"), (2, "b"), (3, "c")]


LINES = [json.dumps({"text": f"line {i} " + "x" * 100}).encode() + b"\n" for i in range(2000)]


def test_total_rows_is_exact_or_none(tmp_path):
    write_table(tmp_path / "a.parquet", pa.table({"text": ["a"] * 250}))
    write_table(tmp_path / "b.arrow", pa.table({"text": ["a"] * 130}))
    known = open_source([tmp_path], Columns())
    assert known.total_rows == 380 == len(list(known))
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    assert open_source([tmp_path], Columns()).total_rows is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.arrows", "t.jsonl", "t.jsonl.gz", "t.jsonl.zst"])
def test_fraction_read_grows_from_nothing_to_all(tmp_path, name):
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get((tmp_path / name).suffix, bytes)
    if ".jsonl" in name:
        lines = (json.dumps({"text": os.urandom(100).hex()}).encode() + b"\n" for _ in range(10_000))
        (tmp_path / name).write_bytes(compress(b"".join(lines)))
    else:
        write_table(tmp_path / name, pa.table({"text": [f"{i}" * 100 for i in range(2000)]}))
    source = open_source([tmp_path / name], Columns())
    assert source.fraction_read == 0.0
    seen = [source.fraction_read for _ in source]
    assert seen == sorted(seen)
    assert all(0 <= fraction <= 1 for fraction in seen)
    assert len(set(seen)) > 2, "it must move in between"
    assert source.fraction_read == 1.0


def test_a_source_can_be_iterated_again(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b"".join(LINES[:10]))
    source = open_source([tmp_path / "c.jsonl"], Columns())
    assert [record.source.id for record in source] == [record.source.id for record in source]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.arrows", "t.jsonl", "t.jsonl.gz", "t.jsonl.zst"])
def test_files_are_closed_when_iteration_stops_early(tmp_path, name):
    if ".jsonl" in name:
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get((tmp_path / name).suffix, bytes)
        (tmp_path / name).write_bytes(compress(b"".join(LINES)))
    else:
        write_table(tmp_path / name, pa.table({"text": ["a"] * 300}))

    def opened():
        return [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]

    for _ in range(50):  # a file that another thread closes is found open now and then
        records = iter(open_source([tmp_path / name], Columns()))
        next(records)
        records.close()
        assert str(tmp_path / name) not in opened()


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.arrows"])
def test_rows_do_not_keep_their_text_in_memory(tmp_path, name):
    write_table(tmp_path / name, pa.table({"text": ["x" * 1_000_000] * 20, "n": ["small"] * 20}))
    before = pa.total_allocated_bytes()
    kept = [record.source for record in open_source([tmp_path / name], Columns())]
    assert len(kept) == 20
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_parquet_is_not_read_by_whole_column_chunks(tmp_path):
    generator = random.Random(0)
    table = pa.table({"text": [generator.randbytes(50_000).hex() for _ in range(400)]})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False, write_batch_size=8)
    del table
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in open_source([tmp_path / "t.parquet"], Columns()))
    assert most < 25_000_000, "the one row group has 40 MB"


@pytest.mark.slow
def test_few_very_long_documents_are_read_at_a_time(tmp_path):
    table = pa.table({"text": [os.urandom(2_000_000).hex() for _ in range(24)]})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False, write_batch_size=1)
    del table
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in open_source([tmp_path / "t.parquet"], Columns()))
    assert most < 48_000_000, "the one row group has 96 MB"
