"""Outputs are published whole or not at all, whatever goes wrong."""

import errno
import os
import resource
import shutil

import pyarrow as pa
import pytest
from written_outputs import EXTENSIONS, NOTHING, answers, rows, write

from pipeline.errors import ConfigError, StorageError
from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.writing import output_writer
from pipeline.records import Answer

SCHEMA = output_schema(NOTHING, {})


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_exception_leaves_nothing(tmp_path, extension):
    def interrupted():
        with output_writer(tmp_path / f"out{extension}", SCHEMA) as writer:
            writer.write_table(answers_table(answers(1500), SCHEMA))
            assert os.listdir(tmp_path) == [f".out{extension}.partial-{os.getpid()}"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_an_old_output_stays_whole_until_the_new_one_is(tmp_path):
    path = tmp_path / "out.parquet"
    write(path, answers(2))
    old = path.read_bytes()
    with output_writer(path, SCHEMA, overwrite=True) as writer:
        writer.write_table(answers_table(answers(5000), SCHEMA))
        assert path.read_bytes() == old
    assert len(rows(path)) == 5000
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_an_old_output_survives_a_failed_run(tmp_path):
    path = tmp_path / "out.parquet"
    write(path, answers(2))
    with pytest.raises(AttributeError):
        write(path, [*answers(2), None], overwrite=True)
    assert len(rows(path)) == 2
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_an_existing_output_is_refused(tmp_path):
    path = tmp_path / "out.parquet"
    write(path, answers(1))
    with pytest.raises(ConfigError) as caught:
        write(path, answers(1))
    assert str(caught.value) == f"{path} exists; --overwrite replaces it"


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "out.parquet"

    def overtaken():
        with output_writer(path, output_schema(NOTHING, {})):
            path.write_text("another's")

    with pytest.raises(ConfigError, match="exists; --overwrite"):
        overtaken()
    assert path.read_text() == "another's"
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_a_linked_output_replaces_what_it_points_to(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "real.parquet").write_text("old")
    link = tmp_path / "out.parquet"
    link.symlink_to(tmp_path / "store" / "real.parquet")
    write(link, answers(1), overwrite=True)
    assert link.is_symlink()
    assert len(rows(tmp_path / "store" / "real.parquet")) == 1


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_failed_write_is_told_with_its_cause(tmp_path, extension):
    """A real failure of the operating system: files may not grow beyond 100 kB."""
    path = tmp_path / f"out{extension}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = [Answer(id=str(i), row=i, answer=os.urandom(500).hex()) for i in range(3000)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError) as caught:
            write(path, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"{path} cannot be written: File too large; raise the limit on file sizes (ulimit -f) and run again"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "No space left on device; free space there and run again"),
        (errno.EDQUOT, "Disk quota exceeded; free space within your quota and run again"),
        (errno.EIO, "Input/output error; check the disk and run again"),
    ],
)
def test_a_failed_sync_is_told_with_its_cause(tmp_path, monkeypatch, code, told):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError) as caught:
        write(tmp_path / "out.parquet", answers(1))
    assert str(caught.value) == f"{tmp_path}/out.parquet cannot be written: {told}"
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_gone_is_told(tmp_path):
    path = tmp_path / "gone" / "out.parquet"
    path.parent.mkdir()

    def bereft():
        with output_writer(path, SCHEMA) as writer:
            writer.write_table(answers_table(answers(1), SCHEMA))
            shutil.rmtree(path.parent)

    with pytest.raises(StorageError) as caught:
        bereft()
    why = "No such file or directory; its folder is gone; make it again and run again"
    assert str(caught.value) == f"{path} cannot be written: {why}"


def test_a_type_that_a_format_lacks_is_refused_at_once(tmp_path):
    schema = output_schema(pa.schema([("span", pa.month_day_nano_interval())]), {})
    with pytest.raises(ConfigError) as caught, output_writer(tmp_path / "out.parquet", schema):
        pytest.fail("the writer must not open")
    assert str(caught.value).startswith(f"{tmp_path}/out.parquet cannot be written as .parquet: ")
    assert str(caught.value).endswith("; leave that column out with --keep-columns, or choose .arrows")
    assert os.listdir(tmp_path) == []
