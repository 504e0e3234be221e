"""Damaged files: an error that names the file, or failures in place of the rows lost, never a crash."""

import errno
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.records import Document, RowError

REWRITE = "write the file again from its source"


def read(path, **columns):
    return list(open_source([path], Columns(**columns)))


def refusal(path):
    with pytest.raises(InputError) as caught:
        open_source([path], Columns())
    return str(caught.value)


def unchecked(values):
    """A string array whose bytes are not checked."""
    data = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(data), data.buffers())


def write_arrow(path, table, *, stream=False, max_chunksize=100, **options):
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=max_chunksize)


def grouped_parquet(path, **options):
    """Three row groups of 100 rows; the text compresses badly, so that most bytes are its."""
    table = pa.table({"text": [f"{i * 7919 % 1009} text {i}" for i in range(300)], "n": range(300)})
    pq.write_table(table, path, row_group_size=100, use_dictionary=False, **options)


def damage(path, start, length=40):
    data = bytearray(path.read_bytes())
    data[start : start + length] = bytes(byte ^ 0xA5 for byte in data[start : start + length])
    path.write_bytes(data)


@pytest.mark.parametrize("keep", [3, 20, -1, -100])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("named", [False, True])
def test_a_truncated_table_costs_the_other_files_nothing(tmp_path, keep, suffix, named):
    paths = [tmp_path / f"{name}{suffix}" for name in "abc"]
    for path in paths:
        grouped_parquet(path) if suffix == ".parquet" else write_arrow(
            path, pa.table({"text": [f"text {n}" for n in range(300)]})
        )
    paths[1].write_bytes(paths[1].read_bytes()[:keep])
    source = open_source(paths if named else [tmp_path], Columns())
    records = list(source)
    (failure,) = (record for record in records if isinstance(record, RowError))
    assert (failure.kind, failure.is_fault, failure.source.id) == ("unreadable", True, f"b{suffix}:0")
    assert failure.message.startswith(f"b{suffix} row 0 and all after it cannot be read: ")
    assert failure.message.endswith(REWRITE)
    assert (len(records), source.has_faults, source.total_rows) == (601, True, None)
    assert [record.source.row for record in records] == list(range(601))
    for path in (paths[0], paths[2]):
        path.unlink()
    assert "readable" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [3, 20, -1, -8, -100])
def test_a_truncated_parquet_file_is_refused(tmp_path, keep):
    path = tmp_path / "t.parquet"
    grouped_parquet(path)
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(path)
    assert message.startswith(f"{path} is not a readable Parquet file: ")
    assert "\n" not in message


@pytest.mark.parametrize("keep", [3, 20, -1, -8, -100])
def test_a_truncated_arrow_file_is_refused(tmp_path, keep):
    path = tmp_path / "t.arrow"
    write_arrow(path, pa.table({"text": ["a"] * 300}))
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(path).startswith(f"{path} is not a readable Arrow file: ")


def test_other_content_under_a_known_name_is_refused(tmp_path):
    for name in ("t.parquet", "t.arrow", "t.arrows"):
        (tmp_path / name).write_text("just some text that is no table\n" * 10)
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name} is not a readable ")
    (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(100) + b"FEA1")
    assert refusal(tmp_path / "old.feather") == (
        f"{tmp_path}/old.feather is not a readable Arrow file: "
        "it is Feather version 1; write it again as version 2 or as Parquet"
    )


@pytest.mark.parametrize(
    "options", [{"compression": "zstd"}, {"compression": "none", "write_page_checksum": True}]
)
def test_a_damaged_page_costs_only_its_row_group(tmp_path, options):
    path = tmp_path / "t.parquet"
    grouped_parquet(path, **options)
    text = pq.read_metadata(path).row_group(1).column(0)
    checked = "write_page_checksum" in options
    damage(path, text.data_page_offset + (text.total_compressed_size // 2 if checked else 0))
    source = open_source([path], Columns())
    records = list(source)
    assert source.total_rows == 300
    assert [record.source.row for record in records] == [*range(101), *range(200, 300)]
    assert {type(record) for record in records[:100] + records[101:]} == {Document}
    assert records[100].kind == "unreadable"
    assert records[100].message.startswith("t.parquet row 100 to row 199 cannot be read: ")
    assert records[100].message.endswith(REWRITE)
    assert (source.has_faults, source.out_of_reach, source.fraction_read) == (True, [], 1.0)


def test_pages_before_a_damaged_one_are_read(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"text": [f"{i}" * 500 for i in range(1000)]})
    pq.write_table(
        table,
        path,
        use_dictionary=False,
        compression="none",
        write_page_checksum=True,
        data_page_size=20_000,
        write_batch_size=8,
    )
    text = pq.read_metadata(path).row_group(0).column(0)
    damage(path, text.data_page_offset + text.total_compressed_size - 1000)
    *good, bad = read(path)
    assert len(good) >= 64
    assert {type(record) for record in good} == {Document}
    assert bad.message.startswith(f"t.parquet row {len(good)} to row 999 cannot be read: ")


def test_a_parquet_file_that_is_gone_meanwhile(tmp_path):
    grouped_parquet(tmp_path / "t.parquet")
    source = open_source([tmp_path / "t.parquet"], Columns())
    (tmp_path / "t.parquet").unlink()
    assert not list(source)
    assert source.out_of_reach == [f"{tmp_path / 't.parquet'} cannot be read: No such file or directory"]


@pytest.mark.parametrize("name", ["t.arrow", "t.arrows", "t.jsonl", "t.jsonl.gz", "t.txt"])
def test_other_files_that_are_gone_meanwhile(tmp_path, name):
    path = tmp_path / name
    if name.startswith("t.arrow"):
        write_arrow(path, pa.table({"text": ["a"] * 2}), stream=name == "t.arrows")
    else:
        path.write_bytes(gzip.compress(b"{}") if name.endswith("gz") else b"{}")
    source = open_source([path], Columns())
    path.unlink()
    assert not list(source)
    assert source.out_of_reach == [f"{path} cannot be read: No such file or directory"]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.arrows"])
def test_bad_utf8_costs_only_its_row(tmp_path, name):
    table = pa.table(
        {
            "text": unchecked([b"a", b"\xff\xfe", b"c", b"d", b"e"]),
            "q": unchecked([b"q", b"q", b"\xff", b"q", b"q"]),
            "key": unchecked([b"0", b"1", b"2", b"\xff", b"4"]),
            "n": unchecked([b"n", b"n", b"n", b"n", b"\xff"]),
        }
    )
    write = (
        pq.write_table if name == "t.parquet" else lambda *args: write_arrow(*args[::-1], stream="s" in name)
    )
    write(table, tmp_path / name)
    good, *bad = read(tmp_path / name, question="q", id="key")
    assert (good.text, good.source.id) == ("a", "0")
    place = f"{name} row"
    remedy = "is not valid UTF-8; convert the file to UTF-8"
    assert [(record.kind, record.message) for record in bad] == [
        ("bad_utf8", f"{place} 1: 'text' {remedy}"),
        ("bad_utf8", f"{place} 2: 'q' {remedy}"),
        ("bad_utf8", f"{place} 3: 'key' {remedy}"),
        ("bad_utf8", f"{place} 4: 'n' {remedy}"),
    ]
    assert [record.source.id for record in bad] == ["1", "2", f"{name}:3", "4"]
    assert bad[0].source.passthrough.to_pylist() == [{"n": "n"}]
    assert bad[3].source.passthrough is None


def test_a_bad_dictionary_entry_costs_only_rows_that_use_it(tmp_path):
    dictionary = unchecked([b"fine", b"\xff"])
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0], pa.int8()), dictionary)
    write_arrow(tmp_path / "t.arrow", pa.table({"text": ["a", "b", "c", "d"], "k": column}))
    records = read(tmp_path / "t.arrow")
    assert [type(record) for record in records] == [Document, RowError, Document, Document]
    assert [record.source.passthrough.to_pylist() for record in records if isinstance(record, Document)] == [
        [{"k": "fine"}],
        [{"k": None}],
        [{"k": "fine"}],
    ]
    write_arrow(tmp_path / "u.arrow", pa.table({"text": column}))
    assert [getattr(record, "kind", "ok") for record in read(tmp_path / "u.arrow")] == [
        "ok",
        "bad_utf8",
        "missing_text",
        "ok",
    ]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.arrows"])
@pytest.mark.parametrize("column", ["QQQQ", "outer"])
def test_names_that_are_not_utf8_are_refused(tmp_path, name, column):
    path = tmp_path / name
    table = pa.table({"text": ["a"], column: [{"QQQQ": 1}]})
    if name == "t.parquet":
        pq.write_table(table, path, store_schema=False)
    else:
        write_arrow(path, table, stream=name == "t.arrows")
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"Q\xff\xfeQ"))
    if name == "t.parquet":  # pyarrow asks for all names itself
        assert refusal(path).startswith(f"{path} is not a readable Parquet file: 'utf-8' codec can't decode")
    else:
        assert refusal(path) == f"{name} has a column name that is not valid UTF-8; rename the column"


def test_offsets_out_of_bounds_do_not_crash(tmp_path):
    """Arrow does not check offsets when it reads: following these would read foreign memory."""
    offsets = pa.py_buffer(b"".join(value.to_bytes(4, "little") for value in (0, 1, 2_000_000_000, 3)))
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abc")])
    path = tmp_path / "t.arrow"
    write_arrow(path, pa.table({"text": ["a", "b", "c"]}))
    data = path.read_bytes()
    sound = b"".join(value.to_bytes(4, "little") for value in (0, 1, 2, 3))
    assert data.count(sound) == 1
    path.write_bytes(data.replace(sound, bytes(text.buffers()[1])[:16]))
    records = read(path)
    assert [getattr(record, "kind", "ok") for record in records] == ["ok", "unreadable", "unreadable"]
    assert records[1].message.startswith("t.arrow row 1: 'text' cannot be read: ")


def test_a_damaged_batch_costs_the_rest_of_an_arrow_file(tmp_path):
    path = tmp_path / "t.arrow"
    texts = [f"{i * 7919 % 100003} text" for i in range(300)]
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    write_arrow(path, pa.table({"text": texts}), options=options)
    start = path.read_bytes().index(b"\x28\xb5\x2f\xfd", len(path.read_bytes()) // 3)
    damage(path, start, 4)
    records = read(path)
    assert [type(record) for record in records] == [Document] * 100 + [RowError]
    assert records[100].message.startswith("t.arrow row 100 to row 299 cannot be read: ")


def test_an_arrow_stream_cut_short_keeps_its_whole_batches(tmp_path):
    path = tmp_path / "t.arrows"
    write_arrow(path, pa.table({"text": ["a" * 50] * 300}), stream=True)
    path.write_bytes(path.read_bytes()[:-500])
    *rows, last = read(path)
    assert [type(record) for record in rows] == [Document] * 200
    assert last.kind == "unreadable"
    assert last.message.startswith("t.arrows row 200 and all after it cannot be read: ")
    assert last.message.endswith(REWRITE)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_compressed_lines_cut_short_keep_what_was_before(tmp_path, suffix, compress):
    lines = [json.dumps({"text": f"{i * 7919 % 100003} line"}).encode() + b"\n" for i in range(20_000)]
    data = compress(b"".join(lines[:15_000])) + compress(b"".join(lines[15_000:]))
    path = tmp_path / f"c.jsonl.{suffix}"
    path.write_bytes(data[: len(data) * 9 // 10])
    (tmp_path / "d.jsonl").write_bytes(lines[0])
    *rows, last, after = read(tmp_path)
    assert len(rows) >= 15_000
    assert {type(record) for record in rows} == {Document}
    assert last.kind == "unreadable"
    assert last.message.startswith(f"c.jsonl.{suffix} line {len(rows) + 1} and all after it cannot be read: ")
    assert last.message.endswith(REWRITE)
    assert (after.source.row, after.source.place) == (len(rows) + 1, "d.jsonl line 1")


def test_a_line_cut_short_is_one_bad_line(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b')
    good, bad = read(tmp_path / "c.jsonl")
    assert (good.text, bad.kind) == ("a", "bad_json")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.arrows", "a.jsonl", "a.jsonl.gz", "a.txt"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET])
def test_a_file_out_of_reach_is_no_damage(tmp_path, monkeypatch, name, number):
    """Neither from the beginning nor later: the other files are read, and it is told."""
    path, other = tmp_path / name, tmp_path / ("b.txt" if name == "a.txt" else "b.jsonl")
    if name.startswith("a.arrow"):
        write_arrow(path, pa.table({"text": ["a"] * 2}), stream=name == "a.arrows")
    elif name == "a.parquet":
        pq.write_table(pa.table({"text": ["a"]}), path)
    else:
        path.write_bytes(gzip.compress(b"{}") if name.endswith("gz") else b"{}")
    other.write_text('{"text": "b"}\n')

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    def out_of_reach(patch):
        for place in (pa, pq):
            for opener in ("OSFile", "memory_map", "ParquetFile"):
                patch.setattr(place, opener, fail, raising=False)
        real = Path.open
        patch.setattr(Path, "open", lambda self, *mode: fail() if self == path else real(self, *mode))

    for opened_before in (True, False):
        with monkeypatch.context() as patch:
            if not opened_before:
                out_of_reach(patch)
            source = open_source([tmp_path], Columns())
            out_of_reach(patch)
            (record,) = source
        assert isinstance(record, Document)
        assert record.source.id.startswith("b.")
        assert source.out_of_reach == [f"{path} cannot be read: {os.strerror(number)}"]
        assert not source.has_faults
