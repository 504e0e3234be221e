"""JSON lines from standard input."""

import gzip
import io
import subprocess
import sys
import threading

import pytest
from columns_told import columns_told

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source


class Piped(io.TextIOWrapper):
    def __init__(self, data, raw=None):
        super().__init__(io.BufferedReader(raw or io.BytesIO(data)))


@pytest.fixture
def pipe(monkeypatch):
    def pipe(data):
        monkeypatch.setattr(sys, "stdin", Piped(data))

    return pipe


def refusal(*inputs):
    with pytest.raises(InputError) as caught:
        open_source(inputs, Columns())
    return str(caught.value)


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_lines_are_read_once(pipe, name):
    pipe(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two", "year": 1}\n{broken')
    source = open_source([name], Columns())
    records = list(source)
    assert [record.source.id for record in records] == ["stdin:0", "stdin:2", "stdin:3"]
    assert [record.text for record in records[:2]] == ["one", "two"]
    assert records[2].message.startswith("stdin line 4 is not JSON")
    assert records[1].source.passthrough.to_pylist() == [{"extra": '{"year": 1}'}]
    assert source.total_rows is None
    assert source.fraction_read == 1.0
    assert [path.is_file() for path in source.files] == [False]
    with pytest.raises(InputError, match="standard input can be read only once"):
        list(source)
    assert not sys.stdin.closed


def test_the_first_line_tells_columns_and_is_not_lost(pipe):
    pipe(b'{"text": "one"}\n{"text": "two"}\n')
    source = open_source(["-"], Columns())
    assert columns_told("-") == {"text": "string"}
    assert len(list(source)) == 2


def test_a_first_line_longer_than_the_buffer_tells_none(pipe):
    pipe(b'{"text": "%s"}\n' % (b"x" * 50_000))
    assert columns_told("-") is None


def test_more_than_a_buffer_of_lines(pipe):
    pipe(b'{"text": "%s"}\n' % (b"x" * 50_000) * 20)
    assert len(list(open_source(["-"], Columns()))) == 20


def test_nothing_is_no_rows(pipe):
    pipe(b"")
    assert list(open_source(["-"], Columns())) == []


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PAR1\x15", "Parquet"),
        (b"ARROW1\0\0", "Arrow"),
        (
            gzip.compress(b"{}", mtime=0),
            "compressed with gzip",
        ),  # without the time, a part of the test's name
    ],
)
def test_other_formats_are_refused(pipe, data, kind):
    pipe(data)
    assert refusal("-") == (
        f"standard input is {kind}, and must be plain JSON lines; save it to a file and name that"
    )


def test_it_must_be_the_only_input(pipe, tmp_path):
    pipe(b"{}")
    assert refusal("-", str(tmp_path)).startswith("standard input (-) cannot be mixed with other inputs")


def test_a_terminal_is_refused(monkeypatch, pipe):
    pipe(b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert refusal("-").startswith("standard input is a terminal; ")
    monkeypatch.setattr(sys, "stdin", None)
    assert refusal("-").startswith("there is no standard input; ")


def test_a_reader_that_waits_does_not_hold_up_the_end_of_the_process():
    program = (
        "import threading, time; from pipeline.inputs.columns import Columns; "
        "from pipeline.inputs.source import open_source; "
        "source = open_source(['-'], Columns()); "
        "threading.Thread(target=lambda: print(len(list(source))), daemon=True).start(); time.sleep(0.3)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b'{"text": "a"}\n')
    process.stdin.flush()
    ended = threading.Timer(300, process.kill)
    ended.start()
    assert process.wait() == 0
    ended.cancel()
    assert process.stderr.read() == b""
