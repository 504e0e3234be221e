"""Files that are not what their names say, refused in one sentence."""

import gzip

import pytest

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.storage.sniff import CR_ENDS

LINES = '{"text": "a"}\n{"text": "b"}\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
UTF_16 = "is not UTF-8 but UTF-16 or UTF-32; iconv -f UTF-16 -t UTF-8 converts it"
SPREAD = "has JSON objects over several lines, not one a line; jq -c . writes it so"
ARRAY = "is one JSON array, not a JSON object a line; jq -c '.[]' writes it so"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.parquet", LFS, "is a Git LFS pointer, not the file; git lfs pull fetches that"),
        ("a.jsonl", LFS, "is a Git LFS pointer, not the file; git lfs pull fetches that"),
        ("a.jsonl", LINES.encode("utf-16"), UTF_16),
        ("a.ndjson", LINES.encode("utf-16-be"), UTF_16),
        ("a.jsonl", LINES.encode("utf-32"), UTF_16),
        ("a.jsonl", b'[{"text": "a"},\n {"text": "b"}]', ARRAY),
        ("a.jsonl", b'\xef\xbb\xbf[\n  {"text": "a"}\n]', ARRAY),
        ("a.json", b'[{"text": "a"},\n {"text": "b"}]', ARRAY),
        ("a.json", b'\xef\xbb\xbf{\r\n  "text": "a"\r\n}\r\n', SPREAD),
        ("a.jsonl", b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n', SPREAD),
        ("a.jsonl", LINES.replace("\n", "\r").encode(), CR_ENDS),
        (
            "a.jsonl",
            gzip.compress(LINES.encode(), mtime=0),
            "is compressed with gzip, not plain JSON lines, as its name says; rename it",
        ),
        ("a.jsonl", b"PAR1", "is Parquet, not plain JSON lines, as its name says; rename it"),
    ],
)
def test_what_begins_otherwise_is_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(InputError) as caught:
            open_source([given], Columns())
        assert str(caught.value) == f"{tmp_path}/{name} {told}"


def test_long_lines_that_end_in_carriage_returns_say_so(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{"x" * 5000}"}}\r' * 2)
    (failed,) = open_source([tmp_path], Columns())
    assert failed.message.endswith(f"; the file {CR_ENDS}")


@pytest.mark.parametrize(
    "content",
    [b'[1, 2]\n{"text": "a"}\n', b'{\n{"text": "a"}\n', b'\x00\x00\n{"text": "a"}', b'{"text": "a"}\r'],
)
def test_a_file_with_a_row_that_can_be_read_is_read(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert list(open_source([tmp_path], Columns()))[-1].text == "a"
