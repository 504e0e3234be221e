"""Lines up to a bound; a longer one costs its row, and no memory."""

from __future__ import annotations

import gzip
import io
import tracemalloc

import pytest
from zstandard import ZstdCompressor

from pipeline.inputs.columns import Columns
from pipeline.inputs.lines import PASSED_BYTES, bounded_lines
from pipeline.inputs.source import open_source


def bounded(content):
    """Lines of at most 5 bytes, and the kinds of errors in the place of others."""
    read = bounded_lines(io.BytesIO(content), 5)
    return [line if isinstance(line, bytes) else line.kind for line in read]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_may_have_as_many_bytes_as_the_bound_without_its_end(end):
    lines = [b"12345" + end, b"123456" + end, end, b"1" * 40 + end, b"12345"]
    expected = [lines[0], "long_line", lines[2], "long_line", lines[4]]
    assert bounded(b"".join(lines)) == expected
    assert bounded(b"1" * 40) == ["long_line"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", ZstdCompressor().compress)],
)
def test_a_line_without_an_end_costs_its_row_and_no_memory(suffix, compress, tmp_path):
    bomb = b'{"text": "' + bytes(30 * PASSED_BYTES) + b'"}\n'
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(compress(b'{"text": "a"}\n' + bomb + b'{"text": "b"}\n'))
    tracemalloc.start()
    first, failed, last = open_source([str(path)], Columns(fixed_question="q", longest_line=1 << 16))
    assert tracemalloc.get_traced_memory()[1] < 8 * PASSED_BYTES
    tracemalloc.stop()
    assert (first.text, last.text) == ("a", "b")
    assert (failed.kind, failed.message) == (
        "long_line",
        f"{path.name} line 2 has more than 65,536 bytes, and was passed over; --longest-line takes longer "
        "ones, for which there must be memory several times over",
    )


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_document_beyond_the_bound_is_one_error_row(tmp_path, name):
    (tmp_path / name).write_text("x" * 100)
    (tmp_path / "b.txt").write_text("y" * 99)
    long, whole = open_source([tmp_path / name, tmp_path / "b.txt"], Columns(longest_line=99))
    assert (long.kind, whole.text) == ("long_line", "y" * 99)
    assert long.message.startswith(f"{name} has more than 99 bytes, and was passed over; --longest-line ")
