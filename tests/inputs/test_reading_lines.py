"""Documents and row failures from JSON lines and text files, through `open_source`."""

import gzip
import json

import pytest
import zstandard

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source


def read(path, **columns):
    return list(open_source([path], Columns(**columns)))


def only(path, **columns):
    (record,) = read(path, **columns)
    return record


def told(record):
    return record.kind, record.message


LINES = [json.dumps({"text": f"line {i} " + "x" * 100}).encode() + b"\n" for i in range(2000)]


def write_lines(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


@pytest.fixture
def line_failure(tmp_path):
    """The kind and message of one JSON line, with the place cut off."""

    def failure(line, **columns):
        kind, message = told(only(write_lines(tmp_path / "c.jsonl", line), **columns))
        assert message.startswith("c.jsonl line 1")
        return kind, message.removeprefix("c.jsonl line 1").lstrip(": ")

    return failure


def test_lines_are_numbered_physically(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", '{"text": "a"}\n', "\n", "  \r\n", "nope\n", '{"text": "b"}')
    first, bad, last = read(path)
    assert [first.source.row, bad.source.row, last.source.row] == [0, 3, 4]
    assert [first.source.place, last.source.place] == ["c.jsonl line 1", "c.jsonl line 5"]
    assert last.source.id == "c.jsonl:4"
    assert told(bad) == ("bad_json", "c.jsonl line 4 is not JSON: Expecting value at character 1")


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ('{"text": "a"', "bad_json", "is not JSON: Expecting ',' delimiter at character 13"),
        ('{"text": "a"} x', "bad_json", "is not JSON: Extra data at character 15"),
        ("\0\0\0", "bad_json", "is not JSON: Expecting value at character 1"),
        ("[" * 200_000, "bad_json", "cannot be read as JSON: too deeply nested"),
        ('{"a":' * 200_000, "bad_json", "cannot be read as JSON: too deeply nested"),
        ("[1]", "not_an_object", "is an array, not an object; each line must be one JSON object"),
        ('"text"', "not_an_object", "is a string, not an object; each line must be one JSON object"),
        ("null", "not_an_object", "is null, not an object; each line must be one JSON object"),
        ("{}", "missing_text", "there is no 'text'; it has: nothing (--text-column names the text)"),
        ('{"text": null}', "missing_text", "'text' is null"),
        ('{"text": 5}', "bad_text_type", "'text' is a number, not a string"),
        ('{"text": true}', "bad_text_type", "'text' is a boolean, not a string"),
        ('{"text": ["a"]}', "bad_text_type", "'text' is an array, not a string"),
        ('{"text": {}}', "bad_text_type", "'text' is an object, not a string"),
        ('{"text": ""}', "empty_document", "'text' is empty"),
        ('{"text": " \\n\\u00a0"}', "empty_document", "'text' is empty"),
        ('{"text": "\\u200b \\ufeff\\u2060\\u3164\\ufe0f\\u0000"}', "empty_document", "'text' is empty"),
        ('{"text": 1E5}', "bad_text_type", "'text' is a number, not a string"),
        (b'{"text": "\xff"}', "bad_utf8", "is not valid UTF-8 at byte 10; convert the file to UTF-8"),
        (
            '{"text": "a\\ud800"}',
            "bad_utf8",
            "'text' has half of a surrogate pair at character 1, which no UTF-8 can hold",
        ),
    ],
    ids=str,
)
def test_bad_lines(line_failure, line, kind, message):
    assert line_failure(line) == (kind, message)


def test_a_byte_order_mark_begins_any_line(tmp_path):
    line = b'\xef\xbb\xbf{"text": "a"}\n'
    assert [
        record.text for record in read(write_lines(tmp_path / "c.jsonl", line, line, b"\xef\xbb\xbf\n"))
    ] == [
        "a",
        "a",
    ]


def test_a_huge_integer_does_not_crash(line_failure):
    kind, message = line_failure('{"text": "a", "n": ' + "9" * 5000 + "}")
    assert kind == "bad_json"
    assert message.startswith("cannot be read as JSON: Exceeds the limit (4300 digits)")


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (
            '{"text": "a"}',
            "missing_question",
            "there is no 'q'; it has: text (--question-column names the question)",
        ),
        ('{"text": "a", "q": null}', "missing_question", "'q' is null"),
        ('{"text": "a", "q": " "}', "missing_question", "'q' is empty"),
        ('{"text": "a", "q": 1}', "bad_question_type", "'q' is a number, not a string"),
    ],
)
def test_bad_questions(line_failure, line, kind, message):
    assert line_failure(line, question="q") == (kind, message)


@pytest.mark.parametrize("value", ["null", '""', '" "'])
def test_missing_ids_of_lines(line_failure, value):
    line = '{"text": "a", "key": ' + value + "}"
    expected = ("missing_id", "there is no id in 'key'; --id-column names the id")
    assert line_failure(line, id="key") == line_failure('{"text": "a"}', id="key") == expected


@pytest.mark.parametrize(
    ("value", "text"), [('"x"', "x"), ("7", "7"), ("true", "true"), ("1.5", "1.5"), ("[1, 2]", "[1, 2]")]
)
def test_ids_of_lines_become_text(tmp_path, value, text):
    path = write_lines(tmp_path / "c.jsonl", '{"text": "a", "key": ' + value + "}")
    assert only(path, id="key").source.id == text


def test_surrogate_pairs_and_repeated_keys_are_fine(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", '{"text": "no", "text": "\\ud83d\\ude00"}')
    assert only(path).text == "\N{GRINNING FACE}"


def test_a_byte_order_mark_is_tolerated(tmp_path):
    assert only(write_lines(tmp_path / "c.jsonl", b'\xef\xbb\xbf{"text": "a"}\n')).text == "a"
    assert only(write_lines(tmp_path / "c.txt", b"\xef\xbb\xbfa")).text == "a"


def test_a_line_of_fifty_megabytes(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", json.dumps({"text": "x" * 50_000_000}))
    assert len(only(path).text) == 50_000_000


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".jsonl.gz", gzip.compress), (".ndjson.zst", zstandard.compress)]
)
def test_compressed_lines_of_several_members_are_read(tmp_path, suffix, compress):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(compress(b"".join(LINES[:1000])) + compress(b"".join(LINES[1000:])))
    source = open_source([path], Columns())
    records = list(source)
    assert [record.text[:9].split()[1] for record in records] == [str(i) for i in range(2000)]
    assert records[-1].source.place == f"c{suffix} line 2000"
    assert source.fraction_read == 1.0


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
def test_an_empty_file_of_lines_has_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path / name) == []


@pytest.mark.parametrize(("name", "kind"), [("c.jsonl.gz", "gzip"), ("c.jsonl.zst", "zstd")])
def test_a_wrong_compression_is_refused(tmp_path, name, kind):
    path = write_lines(tmp_path / name, '{"text": "a"}\n')
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value) == f"{path} is not compressed with {kind}, as its name says; rename it"


def test_a_text_file_is_one_document(tmp_path):
    record = only(write_lines(tmp_path / "notes.md", "one\n\ntwo\n"), fixed_question="Why?")
    assert (record.text, record.question) == ("one\n\ntwo\n", "Why?")
    assert (record.source.id, record.source.place) == ("notes.md", "notes.md")
    assert record.source.passthrough is None


def test_bad_text_files(tmp_path):
    assert told(only(write_lines(tmp_path / "a.txt", b"\xff"))) == (
        "bad_utf8",
        "a.txt: 'text' is not valid UTF-8; convert the file to UTF-8",
    )
    assert told(only(write_lines(tmp_path / "b.txt", " \n"))) == ("empty_document", "b.txt: 'text' is empty")


@pytest.mark.parametrize("column", ["question", "id"])
def test_text_files_have_no_columns(tmp_path, column):
    path = write_lines(tmp_path / "a.txt", "a")
    with pytest.raises(InputError, match=r"a\.txt is a text document without columns"):
        read(path, **{column: "q"})
