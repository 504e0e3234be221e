"""The command with URLs and standard input, from its flags to its exit codes."""

from __future__ import annotations

import io
import json
import signal
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import SAVED, held_run
from object_storage import objects, put

from pipeline.outputs.lock import lock_output
from pipeline.storage.remote import place_of

FLAGS = ["--question", "what?", "--id-column", "id", "--max-new-tokens", "3", "--pack-tokens", "1"]
ROWS = 24


@pytest.fixture
def documents(tmp_path, bucket):
    """The same Parquet locally and in the bucket."""
    rows = [{"id": f"doc-{n}", "text": f"fish {n} " * 30, "year": n} for n in range(ROWS)]
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    return path, put(f"{bucket}/in.parquet", path.read_bytes())


def rows_of(data):
    timed = ("_ms", "pack_")
    return [
        {name: value for name, value in row.items() if not any(word in name for word in timed)}
        for row in pq.read_table(io.BytesIO(data)).to_pylist()
    ]


@pytest.mark.slow
def test_a_killed_run_from_bucket_to_bucket_is_resumed(
    call, model_folder, documents, tmp_path, bucket, monkeypatch, capfd
):
    local, remote = documents
    output = f"{bucket}/night/out.parquet"
    words = ["batch", "--model", str(model_folder), *FLAGS, "--resume", f"{bucket}/*.parquet", output]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with held_run(words, tmp_path / "printed") as process:
        assert sum("part-0001" in name for name in objects(bucket)) > 2
        process.signal(signal.SIGSTOP)
        assert call(remote, output, *FLAGS) == 7
        assert f"{output} is being written by process {process.pid} on " in capfd.readouterr().err
        process.signal(signal.SIGKILL)
        process.wait()
    assert "night/out.parquet" not in objects(bucket)
    assert any(name.startswith("night/.out.parquet.lock-") for name in objects(bucket))

    assert call(remote, output, *FLAGS) == 2
    assert "--resume continues it" in capfd.readouterr().err
    assert call(remote, output, *FLAGS, "--resume", "--json", "--quiet") == 0
    assert 0 < json.loads(capfd.readouterr().out)["documents"] <= ROWS - SAVED
    assert objects(bucket) == ["in.parquet", "night/out.parquet"]
    assert call(local, tmp_path / "out.parquet", *FLAGS) == 0
    answered = rows_of(place_of(output).read_bytes())
    assert [row["id"] for row in answered] == [f"doc-{n}" for n in range(ROWS)]
    assert answered == rows_of((tmp_path / "out.parquet").read_bytes())


@pytest.mark.slow
def test_storage_that_fails_is_exit_code_8(call, documents, bucket, capfd, s3_server, monkeypatch):
    _, remote = documents
    from pipeline.outputs.mirror import Mirror

    put_chunks, count = Mirror.put_chunks, []

    def fail_the_third_time(self):
        count.append(1)
        if len(count) == 3:
            s3_server.stop()
        put_chunks(self)

    monkeypatch.setattr(Mirror, "put_chunks", fail_the_third_time)
    try:
        assert call(remote, f"{bucket}/out.parquet", *FLAGS, "--limit", "10") == 8
    finally:
        s3_server.start()
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith(f"marsinfer: error: {bucket}/out.parquet")
    assert "Could not connect to the endpoint" in message
    assert call(remote, f"{bucket}/out.parquet", *FLAGS, "--limit", "10", "--resume") == 0
    assert objects(bucket) == ["in.parquet", "out.parquet"]


def test_what_cannot_be_used_is_one_line(refusal, bucket, documents):
    local, remote = documents
    out = f"{bucket}/out.parquet"
    assert refusal(f"{bucket}/no.parquet", out, *FLAGS) == f"{bucket}/no.parquet does not exist"
    assert refusal(local, "s3://no-such-bucket/out.parquet", *FLAGS) == (
        "s3://no-such-bucket/out.parquet cannot be written: The specified bucket does not exist; "
        "make the bucket first"
    )
    assert refusal(remote, remote, *FLAGS, "--overwrite").endswith(
        "/in.parquet exists, and marsinfer did not write it: name another output"
    )
    assert "https:// cannot lock it" in refusal(local, "https://host/out.parquet", *FLAGS)
    with lock_output(out):
        assert objects(bucket) == [".out.parquet.lock-000001", "in.parquet"]


@pytest.fixture
def pipe(monkeypatch):
    def pipe(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(text.encode()))))

    return pipe


def lines(count):
    return "".join(json.dumps({"id": f"doc-{n}", "text": f"fish {n} " * 9}) + "\n" for n in range(count))


def test_standard_input_is_answered_resumed_and_tried(call, pipe, tmp_path, capfd):
    output = tmp_path / "out.parquet"
    pipe(lines(3))
    assert call("-", output, *FLAGS, "--dry-run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 3
    pipe(lines(3))
    assert call("-", output, *FLAGS) == 0
    pipe(lines(5))
    assert call("-", output, *FLAGS, "--resume", "--json", "--quiet") == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["documents"] == 2
    assert pq.read_table(output)["id"].to_pylist() == [f"doc-{n}" for n in range(5)]


def test_a_sample_of_standard_input_is_refused(refusal, pipe, tmp_path):
    pipe(lines(3))
    assert refusal("-", tmp_path / "out.parquet", *FLAGS, "--quiet", "--sample", "1") == (
        "--sample counts the rows first, and stdin can be read only once: save it to a file, or use --limit"
    )


def test_an_unusable_input_leaves_nothing_in_the_bucket(call, tmp_path, bucket, capfd):
    source = tmp_path / "in.jsonl"
    source.write_text("{broken\n" * 300 + '{"id": "a", "body": "fish"}\n' * 300)
    assert call(source, f"{bucket}/out.parquet", *FLAGS) == 2
    assert "no row has 'text' of the 512 rows read so far" in capfd.readouterr().err
    assert objects(bucket) == []


def test_a_dry_run_knows_what_the_bucket_holds(call, documents, bucket, capfd):
    _, remote = documents
    output = f"{bucket}/out.parquet"
    assert call(remote, output, *FLAGS, "--limit", "3", "--quiet") == 0
    before = objects(bucket)
    flags = [*FLAGS, "--limit", "5", "--dry-run"]
    assert call(remote, output, *flags, "--resume") == 0
    assert capfd.readouterr().out.startswith(f"output: {output}, resumed: 3 rows done, 2 new\n")
    assert call(remote, output, *flags, "--resume", "--seed", "9") == 2
    assert capfd.readouterr().out.startswith(f"output: refused: {output} was begun with other settings: ")
    assert call(remote, output, *flags) == 2
    assert capfd.readouterr().err.startswith(f"marsinfer: error: {output} exists; ")
    assert objects(bucket) == before
