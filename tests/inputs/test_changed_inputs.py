"""Files that are changed while they are read, at equal size: rows of one version come, and it is told."""

import gzip
import hashlib
import http.server
import json
import os
from io import BytesIO

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from object_storage import put
from web_server import served, serving

from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.storage import remote_files
from pipeline.storage.version import Version


def content(name, word):
    table = pa.table({"text": [f"{word} {n:03} " * 20 for n in range(300)]})
    sink = BytesIO()
    if name.endswith("parquet"):
        pq.write_table(table, sink, row_group_size=100, compression="none", use_dictionary=False)
    elif name.endswith("arrow"):
        feather.write_feather(table, sink, chunksize=50, compression="uncompressed")
    elif name.endswith("csv"):
        sink.write(b"text\n" + b"".join(b"%s\n" % text.encode() for text in table["text"].to_pylist()))
    else:
        sink.write("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode())
    return sink.getvalue()


def check_change(place, name, put_new):
    """Read some rows, change the file, read on, and read it again."""
    source = open_source([place], Columns())
    texts = []
    for record in source:
        if len(texts) == 5:
            put_new(content(name, "new"))
        texts.append(record.text)
    assert 5 <= len(texts) < 300
    assert {text[:3] for text in texts} == {"old"}
    told = [f"{place} cannot be read: it was changed during the run"]
    assert (source.out_of_reach, source.has_faults) == (told, False)
    assert list(source) == []
    assert source.out_of_reach == told


NAMES = ["a.parquet", "a.arrow", "a.jsonl", "a.csv"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_replaced", [False, True])
def test_on_this_machine(tmp_path, name, is_replaced):
    path, other = tmp_path / name, tmp_path / "other"
    path.write_bytes(content(name, "old"))
    os.utime(path, (0, 0))

    def put_new(data):
        (other if is_replaced else path).write_bytes(data)
        if is_replaced:
            other.replace(path)

    check_change(path, name, put_new)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(remote_files, "BLOCKS", 3)


MARKS = {
    "ETag": lambda data: {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Last-Modified": "now"},
    "Last-Modified": lambda data: {"Last-Modified": "today" if b"new" in data else "yesterday"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mark"), [*((name, "ETag") for name in NAMES), (NAMES[0], "Last-Modified")])
def test_on_a_web_server(small_blocks, name, mark):
    files = {f"/{name}": content(name, "old")}
    with served(files, MARKS[mark]) as (url, _):
        check_change(f"{url}/{name}", name, lambda data: files.update({f"/{name}": data}))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_object_storage(small_blocks, bucket, name):
    url = put(f"{bucket}/{name}", content(name, "old"))
    check_change(url, name, lambda data: put(url, data))


@pytest.mark.slow
def test_in_storage_of_any_other_kind(small_blocks):
    fsspec = pytest.importorskip("fsspec")
    fs, url = fsspec.filesystem("memory"), "memory://changed/a.jsonl"
    fs.pipe_file(url, content("a.jsonl", "old"))
    check_change(url, "a.jsonl", lambda data: fs.pipe_file(url, data))


class Compressing(http.server.BaseHTTPRequestHandler):
    """Sends no parts and no heads alone, and of a compressed copy an ETag of its own, as Apache does."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        packs = "gzip" in self.headers.get("Accept-Encoding", "")
        data = content("a.jsonl", "old")
        data = gzip.compress(data) if packs else data
        self.send_response(200)
        for header in {"ETag": '"1-gzip"' if packs else '"1"', "Content-Length": str(len(data))}.items():
            self.send_header(*header)
        if packs:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(data)


def test_a_copy_that_a_web_server_compresses_is_no_change(small_blocks):
    with serving(Compressing) as url:
        source = open_source([f"{url}/a.jsonl"], Columns())
        assert (len(list(source)), source.out_of_reach) == (300, [])


def test_what_storage_does_not_tell_is_no_change():
    version = Version()
    for told in ({"size": 3}, {}, {"ETag": '"a"', "size": None}, {"ETag": 'W/"a"', "Last-Modified": "now"}):
        version.check(told)
    version.check({"ETag": '"a"', "Last-Modified": "later"})
    for told in ({"ETag": '"b"'}, {"size": 4}, {"Last-Modified": "later"}):
        with pytest.raises(OSError, match=r"it was changed during the run$"):
            version.check(told)
