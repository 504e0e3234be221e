"""A night's work in object storage: journal, resume, publishing, and storage that fails."""

import errno
import json
import os

import pytest
from journal_runs import EXTENSIONS, SETTINGS, answer, numbered, read, schema_of, work
from object_storage import objects, put

from pipeline.errors import ConfigError, LockedError, StorageError
from pipeline.outputs.lock import lock_output
from pipeline.outputs.mirror import open_journal
from pipeline.outputs.writing import check_output
from pipeline.storage.remote import RemotePath, place_of

pytestmark = pytest.mark.slow

JOURNAL = ".out.parquet.journal"
FIRST = f"{JOURNAL}/part-0001-000000000000"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def output(bucket):
    return f"{bucket}/out.parquet"


def start(output, *, resume=True, settings=SETTINGS, **flags):
    return open_journal(output, schema_of(settings=settings), settings, resume=resume, **flags)


def killed(output, rows, **flags):
    journal = start(output, **flags)
    work(journal, rows)
    return journal


def finish(output, rows, **flags):
    with start(output, **flags) as journal:
        answered = work(journal, rows)
        journal.publish()
    return answered


def refusal(output, error=ConfigError, **flags):
    with pytest.raises(error) as caught:
        start(output, **flags)
    return str(caught.value)


def fetched(output, tmp_path):
    path = tmp_path / output.rpartition("/")[2]
    place_of(output).download(path)
    return [(row["row"], row["id"]) for row in read(path)]


@pytest.mark.slow
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_killed_run_is_continued_and_then_extended(bucket, tmp_path, scratch, extension):
    output = f"{bucket}/deep/out{extension}"
    killed(output, numbered(7))
    assert f"deep/out{extension}" not in objects(bucket)
    with start(output) as journal:
        assert (journal.resumed, dict(journal.done_at_start)) == (True, {"ok": 7})
        assert work(journal, numbered(10)) == ["id 7", "id 8", "id 9"]
        assert journal.publish()
    assert fetched(output, tmp_path) == numbered(10)
    sidecar = [f"deep/out{extension}.run.json"] if extension == ".jsonl" else []
    assert objects(bucket) == [f"deep/out{extension}", *sidecar]
    assert finish(output, numbered(12)) == ["id 10", "id 11"]
    assert fetched(output, tmp_path) == numbered(12)
    assert objects(bucket) == [f"deep/out{extension}", *sidecar]
    with start(output) as journal:
        assert work(journal, numbered(12)) == []
        assert not journal.publish()
    assert objects(bucket) == [f"deep/out{extension}", *sidecar]
    assert len(os.listdir(scratch)) == 1  # of the run that was killed


def test_every_pack_is_an_object(output, bucket):
    killed(output, numbered(6))
    second = f"{JOURNAL}/part-0001-{len(place_of(f'{bucket}/{FIRST}').read_bytes()):012}"
    assert objects(bucket) == [FIRST, second, f"{JOURNAL}/settings.json"]
    killed(output, numbered(7))
    next_run = f"{JOURNAL}/part-0002-000000000000"
    assert objects(bucket) == [FIRST, second, next_run, f"{JOURNAL}/settings.json"]


def test_a_journal_that_cannot_be_taken_in_is_not_said_to_be_gone(output, monkeypatch, scratch):
    killed(output, numbered(3))

    def enter(*args, **flags):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.outputs.rowindex.RowIndex.enter", enter)
        told = refusal(output, StorageError)
    assert told.endswith(
        f"{JOURNAL} cannot be used: Input/output error; the journal is intact, and --resume continues once "
        "that is put right"
    )
    assert finish(output, numbered(4)) == ["id 3"]


@pytest.mark.parametrize("damage", [b"", b"garbage", "cut", "gone", "longer"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_chunk_costs_its_own_rows(output, bucket, tmp_path, damage, which):
    killed(output, numbered(6))
    path = place_of(f"{bucket}/{objects(bucket)[which]}")
    if damage == "gone":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-1], "longer": whole + b"x"}.get(damage, damage))
    lost = [f"id {row}" for row in range(3 * which, 3 * which + 3)]
    # that the last chunk is not whole is no damage: a run may have been killed while it wrote it
    is_told = damage != "longer" and which == 0
    with start(output) as journal:
        assert len(journal.notes) == is_told
        assert work(journal, numbered(6)) == ([] if damage == "longer" else lost)
        renamed = [name for name in objects(bucket) if name.endswith(".damaged")]
        has_object = is_told and damage != "gone"
        assert renamed == ([f"{JOURNAL}/{path.name}.damaged"] if has_object else [])
    with start(output) as journal:
        assert len(journal.notes) == (is_told and damage == "gone")  # which has no object to rename
        assert work(journal, numbered(6)) == []
        journal.publish()
    assert fetched(output, tmp_path) == numbered(6)
    assert objects(bucket) == ["out.parquet"]


def test_when_all_chunks_are_damaged_all_rows_run_again(output, bucket):
    killed(output, numbered(3))
    put(f"{bucket}/{FIRST}", b"garbage")
    with start(output) as journal:
        assert not journal.resumed
        assert work(journal, numbered(3)) == ["id 0", "id 1", "id 2"]
    second = f"{JOURNAL}/part-0002-000000000000"
    assert objects(bucket) == [FIRST, second, f"{JOURNAL}/settings.json"]


@pytest.mark.parametrize("moment", range(4))
def test_a_journal_that_is_being_removed_counts_for_nothing(output, bucket, moment, monkeypatch):
    finish(output, numbered(3))
    removed = []
    real = RemotePath.unlink

    def unlink(self):
        if len(removed) == moment:
            raise KeyboardInterrupt
        removed.append(self.name)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.outputs.mirror.AT_ONCE", 1)
        patch.setattr(RemotePath, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            finish(output, numbered(9))
    assert any(name.startswith(JOURNAL) for name in objects(bucket))
    with start(output) as journal:
        assert (journal.notes, journal.done_at_start.total()) == ([], 9)
        assert work(journal, numbered(9)) == []
        assert not journal.publish()
    assert objects(bucket) == ["out.parquet"]


@pytest.mark.parametrize("settings", [b"{", None])
def test_chunks_stand_without_the_settings(output, bucket, settings):
    killed(output, numbered(3))
    place_of(f"{bucket}/{JOURNAL}/settings.json").unlink()
    if settings is not None:
        put(f"{bucket}/{JOURNAL}/settings.json", settings)
    assert "an unfinished run left" in refusal(output, resume=False)
    assert finish(output, numbered(4)) == ["id 3"]
    assert objects(bucket) == ["out.parquet"]


def test_what_versions_before_left_of_a_removal_is_no_journal(output, bucket):
    killed(output, numbered(3))
    chunk = place_of(f"{bucket}/{FIRST}").read_bytes()
    finish(output, numbered(3))
    put(f"{bucket}/{FIRST}", chunk)
    assert finish(output, numbered(4)) == ["id 3"]
    assert objects(bucket) == ["out.parquet"]


def test_a_run_without_answers_leaves_nothing(output, bucket, scratch):
    with start(output):
        assert objects(bucket) == [f"{JOURNAL}/settings.json"]
    assert objects(bucket) == []
    assert os.listdir(scratch) == []


def test_what_is_there_is_not_replaced_unasked(output, bucket, tmp_path):
    killed(output, numbered(3))
    assert refusal(output, resume=False) == (
        f"an unfinished run left {JOURNAL}; --resume continues it, --overwrite starts over"
    )
    finish(output, numbered(3))
    assert refusal(output, resume=False) == f"{output} exists; --overwrite replaces it"
    journal = killed(output, numbered(2), resume=False, overwrite=True)
    assert fetched(output, tmp_path) == numbered(3)
    journal.publish()
    assert fetched(output, tmp_path) == numbered(2)


def test_an_output_that_came_meanwhile_is_not_replaced(output, bucket):
    journal = killed(output, numbered(3))
    put(output, b"precious")
    with pytest.raises(ConfigError, match="exists; --overwrite replaces it"):
        journal.publish()
    assert place_of(output).read_bytes() == b"precious"
    assert FIRST in objects(bucket)


def test_other_settings_are_refused_under_the_output_s_own_name(output, bucket):
    killed(output, numbered(3))
    told = f'{output} was begun with other settings: method.name was "marsinfer" and is now not set'
    assert refusal(output, settings={"model": "tiny"}).startswith(told)
    finish(output, numbered(3))
    assert refusal(output, settings={"model": "tiny"}).startswith(told)
    assert objects(bucket) == ["out.parquet"]


def test_a_run_that_was_killed_after_the_upload_publishes_again(output, bucket, tmp_path, monkeypatch):
    journal = killed(output, numbered(3))
    monkeypatch.setattr(type(journal._mirror), "forget", lambda self: None)
    journal.publish()
    monkeypatch.undo()
    assert objects(bucket) == [FIRST, f"{JOURNAL}/settings.json", "out.parquet"]
    assert finish(output, numbered(4)) == ["id 3"]
    assert fetched(output, tmp_path) == numbered(4)


def test_storage_that_fails_stops_the_run_which_can_go_on(output, bucket, s3_server, tmp_path):
    with start(output) as journal:
        work(journal, numbered(3))
        s3_server.stop()
        try:
            with pytest.raises(StorageError) as caught:
                journal.append([answer(3)])
        finally:
            s3_server.start()
    assert str(caught.value).startswith(f"{output} cannot be written: Could not connect to the endpoint")
    assert str(caught.value).endswith("; finished rows are kept, and --resume continues")
    with start(output) as journal:
        assert work(journal, numbered(5)) == ["id 3", "id 4"]
        s3_server.stop()
        try:
            with pytest.raises(StorageError, match="cannot be read: Could not connect"):
                journal.publish()
        finally:
            s3_server.start()
    assert "out.parquet" not in objects(bucket)
    assert finish(output, numbered(5)) == []
    assert fetched(output, tmp_path) == numbered(5)


def test_an_upload_that_fails_leaves_the_journal(output, bucket, monkeypatch, tmp_path):
    import s3fs

    real = s3fs.S3FileSystem._call_s3

    async def fail(self, method, *args, **kwargs):
        if kwargs.get("Key") == "out.parquet" and method == "put_object":
            raise RuntimeError("no idea")
        return await real(self, method, *args, **kwargs)

    with start(output) as journal:
        work(journal, numbered(3))
        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", fail)
        with pytest.raises(StorageError) as caught:
            journal.publish()
    assert str(caught.value) == (
        f"{output} cannot be written: no idea; the journal is intact, and --resume continues"
    )
    monkeypatch.undo()
    assert objects(bucket) == [FIRST, f"{JOURNAL}/settings.json"]
    assert finish(output, numbered(3)) == []
    assert fetched(output, tmp_path) == numbered(3)


def test_a_run_whose_lock_was_taken_over_writes_nothing_more(output, bucket):
    with lock_output(output) as lock, start(output, check=lock.check) as journal:
        work(journal, numbered(3))
        put(f"{bucket}/.out.parquet.lock-000002", b"{}")
        before = objects(bucket)
        for attempt in (lambda: journal.append([answer(3)]), journal.publish):
            with pytest.raises(LockedError, match="was taken over by another run"):
                attempt()
    assert objects(bucket) == before


def test_two_runs_cannot_write_one_chunk(output):
    one, other = start(output), start(output)
    work(one, numbered(3))
    with pytest.raises(LockedError, match="another run has written"):
        work(other, numbered(3, first=1))


def test_scratch_space_that_fails_is_named(output, bucket, scratch, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(scratch / "gone"))
    assert refusal(output, StorageError) == (
        "there is no scratch space: No such file or directory; set TMPDIR"
    )
    assert objects(bucket) == []


def test_names_with_the_signs_of_patterns(bucket, tmp_path):
    output = f"{bucket}/run[1]*.parquet"
    with lock_output(output) as lock:
        killed(output, numbered(3), check=lock.check)
        assert finish(output, numbered(4), check=lock.check) == ["id 3"]
    assert objects(bucket) == ["run[1]*.parquet"]


def test_a_file_url_is_a_local_output(tmp_path):
    output = f"file://{tmp_path}/out.jsonl"
    check_output(output, (), False)
    with lock_output(output):
        finish(output, numbered(2))
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").open()] == ["id 0", "id 1"]


def test_memory_is_storage_too(tmp_path):
    output = "memory://journal/out.parquet"
    killed(output, numbered(3))
    assert finish(output, numbered(5)) == ["id 3", "id 4"]
    assert fetched(output, tmp_path) == numbered(5)


def test_rows_leave_and_come_back_in_storage(tmp_path):
    output, beside = "memory://leaving/out.parquet", "memory://leaving/.out.parquet.dropped.parquet"
    finish(output, numbered(5))
    for rows, dropped in ((3, numbered(2, first=3)), (4, numbered(1, first=4)), (5, None)):
        assert finish(output, numbered(rows)) == []
        assert fetched(output, tmp_path) == numbered(rows)
        assert (fetched(beside, tmp_path) if place_of(beside).exists() else None) == dropped


def test_rows_that_left_are_durable_before_the_output_is_written(monkeypatch):
    output, beside = "memory://killed/out.parquet", "memory://killed/.out.parquet.dropped.parquet"
    finish(output, numbered(5))
    put = RemotePath.upload

    def upload(self, file):
        assert self.name != "out.parquet", "killed"
        put(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "upload", upload)
        with pytest.raises(AssertionError):
            finish(output, numbered(3))
    assert place_of(beside).exists()
    assert finish(output, numbered(5)) == []
