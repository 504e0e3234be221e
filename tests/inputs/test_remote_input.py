"""Inputs behind URLs: read as local files are, and refused in one line."""

import gzip
import http.server
import importlib
import json
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from io import BytesIO

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard
from object_storage import put

from pipeline.errors import ConfigError, InputError, StorageError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.outputs.own_columns import INDEXED
from pipeline.outputs.writing import check_output
from pipeline.records import Document
from pipeline.storage import remote, remote_files
from pipeline.storage.causes import NetworkError

pytestmark = pytest.mark.slow

TABLE = pa.table({"text": [f"text {i} " * 20 for i in range(300)], "year": list(range(300))})
LINES = "".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()).encode()


def stream_bytes():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=50)
    return sink.getvalue().to_pybytes()


def written(write, **options):
    sink = BytesIO()
    write(TABLE, sink, **options)
    return sink.getvalue()


CSV = b"text,n\n" + b"".join(b'"document ""%d""",%d\n' % (i, i) for i in range(300))
FILES = {
    "a.parquet": partial(written, pq.write_table, row_group_size=100, compression="none"),
    "b.arrow": partial(written, feather.write_feather, chunksize=50, compression="uncompressed"),
    "c.arrows": stream_bytes,
    "d.jsonl": lambda: LINES,
    "e.jsonl.gz": lambda: gzip.compress(LINES),
    "f.jsonl.zst": lambda: zstandard.compress(LINES),
    "g.csv": lambda: CSV,
    "h.csv.gz": lambda: gzip.compress(CSV),
}


@pytest.fixture
def folder(tmp_path, bucket):
    """The same files in a local folder and in a bucket."""
    for name, content in FILES.items():
        data = content()
        (tmp_path / name).write_bytes(data)
        put(f"{bucket}/in/{name}", data)
    return f"{bucket}/in"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(remote_files, "BLOCKS", 3)


def rows(*inputs):
    return [
        (
            record.source.row,
            record.source.id,
            record.text if isinstance(record, Document) else record.message,
            record.source.passthrough,
        )
        for record in open_source(inputs, Columns())
    ]


def refusal(*inputs, error=InputError):
    with pytest.raises(error) as caught:
        rows(*inputs)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_as_locally(folder, tmp_path, name, small_blocks):
    assert rows(f"{folder}/{name}") == rows(tmp_path / name)
    source = open_source([f"{folder}/{name}"], Columns())
    assert source.total_rows == open_source([tmp_path / name], Columns()).total_rows
    assert len(list(source)) == 300
    assert source.fraction_read == 1.0


def test_folders_and_globs_are_read_as_locally(folder, tmp_path):
    assert rows(folder) == rows(tmp_path)
    assert rows(f"{folder}/*.jsonl*") == rows(f"{tmp_path}/*.jsonl*")
    assert rows(f"{folder}/") == rows(tmp_path)


def test_hidden_files_folder_marks_and_other_kinds_are_left_out(bucket):
    put(f"{bucket}/in/", b"")
    put(f"{bucket}/in/.hidden.txt", b"no")
    put(f"{bucket}/in/_SUCCESS", b"")
    put(f"{bucket}/in/b.md", b"b")
    put(f"{bucket}/in/a/z.txt", b"az")
    source = open_source([f"{bucket}/in"], Columns())
    assert [(record.source.id, record.text) for record in source] == [("a/z.txt", "az"), ("b.md", "b")]
    assert source.notes == []


def test_local_and_remote_mix_and_a_file_named_twice_is_read_once(folder, tmp_path):
    source = open_source([tmp_path / "d.jsonl", f"{folder}/d.jsonl", f"{folder}/d.*"], Columns())
    assert source.notes == [f"{folder}/d.jsonl is named more than once and is read once"]
    ids = [record.source.id for record in source]
    assert (ids[0], ids[300], len(ids)) == (f"{tmp_path}/d.jsonl:0", f"{folder}/d.jsonl:0", 600)


def test_partitions_datasets_and_outputs_are_known_as_locally(tmp_path, bucket):
    output = pa.table({name: [None] for name in ("text", "answer", *INDEXED)})
    output = output.replace_schema_metadata({"marsinfer": '{"settings_that_decide": {}}'})
    put(f"{bucket}/in/year=1/a.parquet", written(pq.write_table))
    pq.write_table(output, tmp_path / "out.parquet")
    put(f"{bucket}/in/out.parquet", (tmp_path / "out.parquet").read_bytes())
    put(f"{bucket}/in/set/state.json", b'{"_data_files": [{"filename": "b.arrow"}]}')
    for name in ("b.arrow", "cache-1.arrow"):
        put(f"{bucket}/in/set/{name}", stream_bytes())
    for given in (f"{bucket}/in", f"{bucket}/in/*", f"S3{bucket[2:]}/in/"):
        source = open_source([given], Columns())
        assert {record.source.id.partition(":")[0] for record in source} == {"a.parquet", "b.arrow"}
        assert (
            f"not read, as marsinfer wrote it: {bucket}/in/out.parquet; to read one, name it" in source.notes
        )


def test_what_is_not_there_is_refused(bucket):
    assert refusal(f"{bucket}/no.parquet") == f"{bucket}/no.parquet does not exist"
    assert refusal("s3://no-such-bucket/a.jsonl") == "s3://no-such-bucket/a.jsonl does not exist"
    assert refusal(f"{bucket}/*.jsonl").startswith(f"{bucket}/*.jsonl holds no file that can be read; ")
    put(f"{bucket}/a.xml", b"")
    assert refusal(f"{bucket}/a.xml").startswith(f"{bucket}/a.xml has an extension that is not known; ")


def test_damage_is_refused_or_an_error_row_as_locally(folder, bucket, tmp_path):
    data = (tmp_path / "a.parquet").read_bytes()
    put(f"{bucket}/cut.parquet", data[:-100])
    assert refusal(f"{bucket}/cut.parquet").startswith(f"{bucket}/cut.parquet is not a readable Parquet file")
    for name in ("e.jsonl.gz", "f.jsonl.zst", "c.arrows"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / name).write_bytes(data[: len(data) // 2])
        put(f"{bucket}/cut/{name}", data[: len(data) // 2])
        assert rows(f"{bucket}/cut/{name}") == rows(tmp_path / "cut" / name)


def test_without_credentials_or_rights(bucket, monkeypatch):
    import s3fs

    put(f"{bucket}/a.jsonl", LINES)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setattr(s3fs.S3FileSystem, "_cache", {})
    expected = "cannot be read: Unable to locate credentials"
    assert refusal(f"{bucket}/a.jsonl") == f"{bucket}/a.jsonl {expected}"
    assert refusal(f"{bucket}/*.jsonl") == f"{bucket}/*.jsonl {expected}"
    with pytest.raises(ConfigError) as caught:  # the same exit code, whichever is asked for first
        check_output(f"{bucket}/out.parquet", [], overwrite=False)
    assert str(caught.value) == f"{bucket}/out.parquet cannot be written: Unable to locate credentials"
    assert ConfigError.exit_code == InputError.exit_code == 2


def test_a_refused_request_is_told(bucket, monkeypatch):
    import s3fs

    put(f"{bucket}/a.jsonl", LINES)

    async def refuse(*args, **kwargs):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
    told = refusal(f"{bucket}/a.jsonl", error=StorageError)
    assert told == f"{bucket}/a.jsonl cannot be read: Forbidden"


@pytest.mark.parametrize(
    ("url", "module", "extra"), [("s3://b/a.jsonl", "s3fs", "s3"), ("gs://b/a.jsonl", "gcsfs", "gs")]
)
def test_a_missing_package_is_named_by_its_extra(monkeypatch, url, module, extra):
    registry = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(registry, extra, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert refusal(url, error=ConfigError) == (
        f"{url} needs a package that is not installed: pip install 'marsinfer[{extra}]'"
    )


def test_an_unknown_scheme_is_refused():
    assert refusal("foo://a.jsonl", error=ConfigError) == (
        "foo://a.jsonl cannot be used: Protocol not known: foo"
    )


@pytest.mark.parametrize("name", FILES)
def test_storage_that_fails_midway_is_told_and_no_damage(folder, name, small_blocks, s3_server):
    source = open_source([f"{folder}/{name}"], Columns())
    records = []
    try:
        for record in source:
            records.append(record)
            if len(records) == 5:
                s3_server.stop()
    finally:
        s3_server.start()
    assert {type(record) for record in records} == {Document}
    assert 5 <= len(records) <= 300
    # the first block of a compressed file may hold it all
    assert source.out_of_reach or name.endswith((".gz", ".zst"))
    for told in source.out_of_reach:
        assert told.startswith(f"{folder}/{name} cannot be read: Could not connect to the endpoint")


def test_errors_of_any_class_are_told(folder, monkeypatch, small_blocks):
    import s3fs

    class Strange(Exception):
        pass

    def fail(self, start, end):
        raise Strange("no idea")

    source = open_source([f"{folder}/d.jsonl"], Columns())
    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", fail)
    assert list(source) == []
    assert source.out_of_reach == [f"{folder}/d.jsonl cannot be read: no idea"]


def test_columns_that_cannot_be_had_now_are_not_taken_for_none(folder, monkeypatch):
    """Else rows would be asked for a summary, though they have questions."""
    import s3fs

    def fail(self, start, end):
        raise OSError(5, "Internal Server Error")

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", fail)
    with pytest.raises(StorageError) as caught:
        open_source([f"{folder}/d.jsonl"], lambda told: Columns())
    assert str(caught.value) == f"{folder}/d.jsonl cannot be read: Internal Server Error"


def test_what_may_be_an_output_is_no_input_while_storage_does_not_say(bucket, monkeypatch):
    for name in ("docs.jsonl", "answers.jsonl", "answers.jsonl.run.json"):
        put(f"{bucket}/in/{name}", LINES)

    def fail(self):
        raise NetworkError(5, "Internal Server Error")

    monkeypatch.setattr(remote.RemotePath, "read_bytes", fail)
    assert refusal(f"{bucket}/in", error=StorageError) == f"{bucket}/in cannot be read: Internal Server Error"


def test_few_blocks_are_kept(folder, small_blocks):
    with remote.place_of(f"{folder}/d.jsonl").open() as file:
        raw = file.raw
        assert file.read() == LINES
        assert raw._block.cache_info().currsize == 3
        assert file.seek(-10, 2) == len(LINES) - 10
        assert file.read() == LINES[-10:]
        file.seek(3995)
        assert file.read(10) == LINES[3995:4005]
        assert file.seek(len(LINES) + 5) == len(LINES) + 5
        assert file.read(1) == b""


@pytest.fixture
def web(tmp_path):
    """A server that does not send parts of files, which nothing asks it to say."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            with suppress(ConnectionError):
                super().copyfile(source, outputfile)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()


def test_the_web_is_read_and_a_signature_stays_secret(web, tmp_path, small_blocks):
    for name in ("d.jsonl", "e.jsonl.gz", "c.arrows", "f.jsonl.zst"):
        (tmp_path / name).write_bytes(FILES[name]())
        assert rows(f"{web}/{name}?signature=secret") == rows(tmp_path / name)
    source = open_source([f"{web}/d.jsonl?signature=secret"], Columns())
    assert [str(path) for path in source.files] == [f"{web}/d.jsonl?***"]
    assert refusal(f"{web}/no.jsonl?signature=secret") == f"{web}/no.jsonl?*** does not exist"
    (tmp_path / "a.parquet").write_bytes(FILES["a.parquet"]())
    assert "secret" not in refusal(f"{web}/a.parquet?signature=secret")


def test_rows_of_the_web_are_told_apart_without_their_secrets(web, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(LINES)
    host = web.removeprefix("http://")
    found = rows(*(f"http://user:secret@{host}/d.jsonl?key=secret{n}" for n in (1, 2)))
    assert [id for _, id, *_ in found[::300]] == ["d.jsonl#1:0", "d.jsonl#2:0"]
    again = rows(*(f"http://user:another@{host}/d.jsonl?key=another{n}" for n in (1, 2)))
    assert [id for _, id, *_ in again] == [id for _, id, *_ in found]


def test_a_proxy_of_the_environment_is_used(web, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", web)
    folder = tmp_path / "http:" / "files.invalid"  # what it is asked for is a whole address
    folder.mkdir(parents=True)
    (folder / "d.jsonl").write_bytes(LINES)
    assert rows("http://files.invalid/d.jsonl") == rows(folder / "d.jsonl")


def test_an_unreachable_server_is_told():
    told = refusal("http://127.0.0.1:9/a.jsonl?signature=secret", error=StorageError)
    assert told.startswith("http://127.0.0.1:9/a.jsonl?*** cannot be read: ")
    assert "secret" not in told


def test_nothing_of_it_is_imported_for_local_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    program = (
        "import sys; from pipeline.inputs.source import open_source; "
        "from pipeline.inputs.columns import Columns; from pipeline.outputs.writing import check_output; "
        "from pipeline.outputs.lock import lock_output; import pipeline.outputs.mirror; "
        f"list(open_source([{str(tmp_path / 'a.jsonl')!r}], Columns())); "
        f"out = {str(tmp_path / 'out.jsonl')!r}; check_output(out, (), False); lock_output(out); "
        "sys.exit(bool({'fsspec', 's3fs', 'aiohttp', 'asyncio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
