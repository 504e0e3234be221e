"""What we write is open to those who could read what it replaces, and goes into nobody else's files."""

import os
import stat

import pyarrow as pa
import pytest
from journal_runs import answer, finish, killed, numbered, refusal, start, work

from pipeline.errors import ConfigError
from pipeline.outputs.answers import output_schema
from pipeline.outputs.journal import journal_folder
from pipeline.outputs.writing import output_writer
from pipeline.storage.whole_file import give_access, writing


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def group(path):
    return path.stat().st_gid


@pytest.fixture
def other_group(tmp_path):
    """A group that a file may be given to, another than that of new files."""
    probe = tmp_path / "probe"
    probe.touch()
    for number in (set(os.getgroups()) | ({4711} if os.geteuid() == 0 else set())) - {group(probe)}:
        return number
    pytest.skip("this user has one group alone")


@pytest.mark.parametrize("extension", [".parquet", ".jsonl"])
def test_mode_and_group_of_an_output_are_kept_and_given_to_its_journal(tmp_path, other_group, extension):
    path = tmp_path / f"out{extension}"
    finish(path, numbered(2))
    beside = list(tmp_path.glob("out*"))
    for file in beside:
        os.chown(file, -1, other_group)
        file.chmod(0o640)
    folder = journal_folder(path)
    with start(path) as journal:
        work(journal, numbered(4))
        written = [folder, folder / "part-0001", folder / "settings.json"]
        assert [mode(file) for file in written] == [0o750, 0o640, 0o640]
        assert {group(file) for file in written} == {other_group}
        journal.publish()
    assert [(mode(file), group(file)) for file in beside] == [(0o640, other_group)] * len(beside)


def test_no_other_group_reads_what_one_could_read(tmp_path, other_group, monkeypatch):
    secret, file = tmp_path / "secret", tmp_path / "file"
    secret.touch()
    os.chown(secret, -1, other_group)
    file.touch()
    model = secret.stat()

    def refused(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "chown", refused)
    give_access(file, model, 0o660)
    assert mode(file) == 0o600


def test_a_report_and_the_like_keep_the_mode(tmp_path):
    path = tmp_path / "page.html"
    path.touch()
    path.chmod(0o600)
    with writing(path) as file:
        assert mode(tmp_path / f".page.html.partial-{os.getpid()}") == 0o600
        file.write(b"page")
    assert (path.read_bytes(), mode(path)) == (b"page", 0o600)


def test_a_link_under_the_name_of_a_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    partial = tmp_path / f".out.parquet.partial-{os.getpid()}"
    partial.symlink_to(victim)
    for write in (
        lambda: writing(tmp_path / "out.parquet").__enter__(),
        lambda: output_writer(tmp_path / "out.parquet", output_schema(pa.schema([]), {})).__enter__(),
    ):
        with pytest.raises(ConfigError, match="is in the way, and it is a link, which is not followed"):
            write()
    assert (victim.read_text(), partial.is_symlink()) == ("precious", True)


def test_a_temporary_file_of_a_killed_run_is_no_obstacle(tmp_path):
    (tmp_path / f".page.html.partial-{os.getpid()}").write_text("half")
    with writing(tmp_path / "page.html") as file:
        file.write(b"page")
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("name", [".out.parquet.journal", ".out.parquet.journal-discarded"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_of_the_user_is_not_removed(tmp_path, name, is_link):
    path, folder = tmp_path / "out.parquet", tmp_path / name
    real = tmp_path / "real" if is_link else folder
    real.mkdir()
    (real / "thesis.txt").write_text("precious")
    if is_link:
        folder.symlink_to(real)
    for flags in ({}, {"resume": False, "overwrite": True}):
        assert refusal(path, **flags).startswith(f"{folder} is in the way, and ")
    assert (real / "thesis.txt").read_text() == "precious"


def test_a_file_put_into_a_journal_during_the_run_outlives_it(tmp_path):
    path = tmp_path / "out.parquet"
    journal = killed(path, numbered(2))
    (journal_folder(path) / "thesis.txt").write_text("precious")
    journal.publish()
    assert [file.read_text() for file in tmp_path.glob(".out.parquet.journal*/*")] == ["precious"]
    assert path.exists()


def test_what_a_killed_run_left_of_a_removal_goes(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(2))
    journal_folder(path).rename(tmp_path / ".out.parquet.journal-discarded")
    with start(path) as journal:
        journal.append([answer(0)])
        assert os.listdir(tmp_path) == [".out.parquet.journal"]
