"""Rows of CSV, through `open_source`: what cells become, and what is said of files that are not quite CSV."""

import csv
import gzip
import io
import tracemalloc

import pytest
import zstandard

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.csv import HEADER_BYTES, CsvRows
from pipeline.inputs.source import open_source

CR = "ends its lines with carriage returns alone; tr '\\r' '\\n' converts it"


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def source(tmp_path):
    """The rows of a file of such a content."""

    def source(content, name="c.csv", **columns):
        return open_source([written(tmp_path / name, content)], Columns(**columns))

    return source


@pytest.fixture
def read(source):
    return lambda *arguments, **columns: list(source(*arguments, **columns))


@pytest.fixture
def refusal(source, tmp_path):
    def refusal(*arguments, **columns):
        with pytest.raises(InputError) as caught:
            source(*arguments, **columns)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refusal


def texts(records):
    return [record.text for record in records]


def told(record):
    return record.kind, record.message


def copied(record):
    return record.source.passthrough.to_pylist()[0]


def test_rows_have_texts_questions_ids_and_other_columns(read):
    (record,) = read("id,text,ask,year\nx7,one fish,how many?,1960\n", question="ask", id="id")
    assert (record.text, record.question, record.source.id) == ("one fish", "how many?", "x7")
    assert copied(record) == {"year": "1960"}
    assert record.source.place == "c.csv line 2"


def test_cells_may_hold_quotes_delimiters_and_line_ends(read):
    values = ['he said "no"', "a, b; c", "one\ntwo\r\n\nthree", " spaced ", "é\u2028\x85数"]
    sink = io.StringIO()
    csv.writer(sink).writerows([("text", "n"), *((value, str(i)) for i, value in enumerate(values))])
    records = read(sink.getvalue())
    assert texts(records) == values
    assert [record.source.place for record in records] == [f"c.csv line {n}" for n in (2, 3, 4, 8, 9)]
    assert [record.source.id for record in records] == [f"c.csv:{i}" for i in range(5)]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(
    ("name", "mark"),
    [("c.csv", ","), ("c.csv", ";"), ("c.csv", "\t"), ("c.tsv", "\t"), ("c.tsv", ",")],
    ids=["comma", "semicolon", "tab", "tsv", "tsv_of_commas"],
)
def test_the_header_tells_the_delimiter(read, name, mark, end):
    lines = [mark.join(cells) for cells in (('"a,;\t;,;,;\t\t\t"', "text", "b"), ("1", "one", "2"))]
    (record,) = read(end.join(lines), name)
    assert record.text == "one"
    assert list(copied(record).values()) == ["1", "2"]


def test_a_lone_column_needs_no_delimiter(read):
    assert texts(read("text\na b\nc\n")) == ["a b", "c"]


def test_a_byte_order_mark_and_blank_lines_are_passed_over(read):
    records = read("\ufeff\n\ntext,n\n\none,1\n\r\n\ntwo,2\n")
    assert [(record.text, record.source.row, record.source.place) for record in records] == [
        ("one", 0, "c.csv line 5"),
        ("two", 1, "c.csv line 8"),
    ]


def test_an_empty_cell_is_null(read):
    empty, quoted, full = read('text,n,m\n,1,\n"",2,x\na,,""\n', keep={"n": "int", "m": None})
    assert told(empty) == ("missing_text", "c.csv line 2: 'text' is null")
    assert told(quoted) == ("missing_text", "c.csv line 3: 'text' is null")
    assert copied(full) == {"n": None, "m": None}


def test_a_kept_column_may_get_a_type(read):
    good, bad = read("text,n\na,5\nb,five\n", keep={"n": "int"})
    assert copied(good) == {"n": 5}
    assert told(bad)[0] == "bad_value"
    assert told(bad)[1].startswith("c.csv line 3: 'n' does not fit int64")


def test_numbers_stay_as_they_are_written(read):
    (record,) = read("text,zip,sum\na,01099,1E5\n")
    assert copied(record) == {"zip": "01099", "sum": "1E5"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b", "line 3 has 1 cells, where the first line names 2 columns"),
        ("b,2,3", "line 3 has 3 cells, where the first line names 2 columns"),
        ("b,2,", "line 3 has 3 cells, where the first line names 2 columns"),
        ('"b"x,2', "line 3 has text behind a closing quote; a quote within a cell is written twice"),
        ("b\rx,2", "line 3 has a carriage return outside quotes"),
    ],
)
def test_a_row_that_is_no_csv_fails_alone(read, row, message):
    first, bad, last = read(f"text,n\na,1\n{row}\nc,3\n")
    assert (first.text, last.text) == ("a", "c")
    assert told(bad) == ("bad_csv", f"c.csv {message}")
    assert [record.source.row for record in (first, bad, last)] == [0, 1, 2]
    assert last.source.place == "c.csv line 4"


def test_a_quote_that_is_never_closed_loses_the_rest(source):
    rows = source('text,n\na,1\n"b,2\nc,3\n')
    first, bad = rows
    assert first.text == "a"
    assert told(bad) == (
        "bad_csv",
        "c.csv line 3 and all after it cannot be read: it opens a quote that is never closed",
    )
    assert rows.has_faults


def test_bytes_that_are_no_utf_8_cost_their_row_alone(read):
    rows = read(b"text,n\na,1\nM\xfcnchen,2\nb,\xfc\nc,4\n", keep={"n": None})
    assert [record.kind for record in rows[1:3]] == ["bad_utf8", "bad_utf8"]
    assert rows[1].message == "c.csv line 3: 'text' is not valid UTF-8; convert the file to UTF-8"
    assert rows[2].message == "c.csv line 4: 'n' is not valid UTF-8; convert the file to UTF-8"
    assert (rows[0].text, rows[3].text) == ("a", "c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"text,M\xfcnze\na,1\n",
            "c.csv has a column name that is not UTF-8; convert the file, as by iconv",
        ),
        ("text,n\na,1\n".encode("utf-16"), "c.csv is not UTF-8 but UTF-16 or UTF-32; "),
        ("text,n\na,1\n".encode("utf-16-le"), "c.csv is not UTF-8 but UTF-16 or UTF-32; "),
        ("text,n\na,1\n".encode("utf-16-be"), "c.csv is not UTF-8 but UTF-16 or UTF-32; "),
        (b"text,n\ra,1\rb,2\r", f"c.csv {CR}"),
        (b"PAR1", "c.csv is Parquet, not plain CSV, as its name says; rename it"),
        (
            b"PK\x03\x04...",
            "c.csv is a ZIP archive or a workbook, not plain CSV, as its name says; rename it",
        ),
        (
            gzip.compress(b"text\na\n", mtime=0),
            "c.csv is compressed with gzip, not plain CSV, as its name says",
        ),
        ("text,text\na,b\n", "c.csv has more than one column 'text'; rename one of them"),
        ("\n \n\n", "c.csv has blank lines alone, and no names of columns in the first"),
        ("a long text " * 50 + ",1\nb,2\n", "c.csv names no columns in its first line: 'a long text a long"),
        ('"text,n\na,1\n', "c.csv is not a readable CSV file: its first line opens a quote"),
        (
            "x" * (HEADER_BYTES + 1),
            "c.csv is not a readable CSV file: its first line has more than 1,048,576",
        ),
        ("body,n\na,1\n", "c.csv has no column 'text'; it has: body, n (--text-column names the text)"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("c.csv") else "",
)
def test_a_file_that_cannot_be_read_is_refused(refusal, content, message):
    assert refusal(content).startswith(message)


def test_columns_without_a_name_are_called_by_their_place(read):
    (record,) = read(",text,\n0,a,x\n")
    assert copied(record) == {"column 1": "0", "column 3": "x"}


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".csv.gz", gzip.compress), (".tsv.zst", zstandard.compress)]
)
def test_compressed_rows_are_read(source, suffix, compress):
    lines = [f"text {i},{i}\n".encode() for i in range(2000)]
    content = compress(b"text,n\n" + b"".join(lines[:1000])) + compress(b"".join(lines[1000:]))
    rows = source(content, f"c{suffix}")
    assert texts(rows) == [f"text {i}" for i in range(2000)]
    assert rows.fraction_read == 1.0


def test_what_is_cut_short_loses_its_end_alone(source):
    content = gzip.compress(b"text,n\n" + b"".join(f"text {i},{i}\n".encode() for i in range(5000)))
    rows = list(source(content[: len(content) // 2], "c.csv.gz"))
    assert texts(rows[:-1]) == [f"text {i}" for i in range(len(rows) - 1)]
    assert len(rows) > 100
    assert rows[-1].kind == "unreadable"
    assert "and all after it cannot be read" in rows[-1].message


def test_a_row_over_the_bound_is_passed_over(read):
    long = '"' + "x\n" * 100 + 'y ""z""",1'
    records = read(f"text,n\na,1\n{long}\nb,2\n{'x' * 90},3\nc,4", longest_line=50)
    assert [record.source.row for record in records] == [0, 1, 2, 3, 4]
    assert texts([records[0], records[2], records[4]]) == ["a", "b", "c"]
    assert {record.kind for record in (records[1], records[3])} == {"long_line"}
    assert records[1].message.startswith("c.csv line 3 has more than 50 bytes, and was passed over")
    assert records[4].source.place == "c.csv line 106"


def test_cells_longer_than_the_csv_module_takes_by_itself_are_read(read):
    long = "x" * 3_000_000
    assert texts(read(f"text,n\n{long},1\n")) == [long]


def test_files_of_other_columns_and_formats_are_joined(tmp_path):
    written(tmp_path / "a.csv", "text,n\na,1\n")
    written(tmp_path / "b.csv", "m,text\n2,b\n")
    written(tmp_path / "c.jsonl", '{"text": "c"}\n')
    source = open_source([tmp_path], Columns())
    assert [(record.text, record.source.row) for record in source] == [("a", 0), ("b", 1), ("c", 2)]
    assert [copied(record) for record in source] == [
        {"n": "1", "m": None, "extra": None},
        {"n": None, "m": "2", "extra": None},
        {"n": None, "m": None, "extra": None},
    ]
    assert source.total_rows is None


def test_memory_does_not_grow_with_the_rows(source):
    def peak(rows):
        content = b"text,n\n" + b"".join(b"some text of this row,%d\n" % i for i in range(rows))
        records = source(content)
        tracemalloc.start()
        count = sum(1 for _ in records)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == rows
        return most

    assert peak(20_000) < peak(2_000) + 100_000


def test_bytes_that_are_no_csv_end(tmp_path):
    """Whatever the bytes, rows end, and each is cells or a reason."""
    content = bytes((i * 7919 + i // 251) % 256 for i in range(50_000))
    rows = CsvRows(io.BytesIO(b"a,b\n" + content), 1000)
    assert rows.header() == ["a", "b"]
    parsed = list(rows)
    assert parsed
    assert all(len(each.cells) == 2 for each in parsed if isinstance(each.cells, list))
