"""Rows that leave an output stay beside it, and come back without being answered again."""

import os
import shutil
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from journal_runs import (
    EXTENSIONS,
    answer,
    ask,
    dying_after,
    finish,
    ids,
    killed,
    numbered,
    read,
    refusal,
    start,
    work,
)

from pipeline.outputs.dropped import dropped_path

ROWS = numbered(6)


def dropped(path):
    rows = pq.read_table(dropped_path(path)).to_pylist() if dropped_path(path).exists() else []
    return [(row["row"], row["id"]) for row in rows]


def settled(path, rows):
    """A run over these rows that answers nothing."""
    with start(path) as journal:
        assert work(journal, rows) == []
        counts = journal.leaving(), journal.returned
        journal.publish()
    assert ids(path) == rows
    return counts


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_rows_leave_and_come_back_in_every_format(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    finish(path, ROWS)
    before = read(path)
    path.chmod(0o640)
    assert settled(path, ROWS[:3]) == (3, 0)
    assert dropped(path) == ROWS[3:]
    assert dropped_path(path).stat().st_mode & 0o777 == 0o640
    assert settled(path, ROWS[:5]) == (0, 2)
    assert dropped(path) == ROWS[5:]
    assert settled(path, ROWS[1:]) == (1, 1)
    assert dropped(path) == ROWS[:1]
    assert settled(path, ROWS) == (0, 1)
    assert not dropped_path(path).exists()
    assert read(path) == before


def test_rows_of_an_unfinished_run_leave_too(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, ROWS[:3])
    assert settled(path, ROWS[:2]) == (1, 0)
    assert settled(path, ROWS[:3]) == (0, 1)


def test_another_version_of_a_row_does_not_come_back(tmp_path):
    path = tmp_path / "out.parquet"
    finish(path, ROWS)
    settled(path, ROWS[:5])
    with start(path) as journal:
        assert not ask(journal, 5, text="other")
        assert journal.returned == 0
        journal.append([answer(5, text="other")])
        assert work(journal, ROWS[:5]) == []
        journal.publish()
    assert settled(path, ROWS[:5]) == (1, 0)
    with start(path) as journal:
        assert ask(journal, 5, text="other")  # the latest is kept


def test_what_was_not_read_stays(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        work(journal, ROWS[:4])
        failed = [answer(6, "torn", status="error", error_type="unreadable")]
        journal.append([*failed, answer(7, "id 0", status="error", error_type="duplicate_id")])
        journal.publish()
    rows = ids(path)
    for fleeting in (True, False):
        with start(path) as journal:
            work(journal, ROWS[:2])
            assert journal.stay(fleeting=fleeting) == 2
            journal.publish()
        assert ids(path) == (rows if fleeting else ROWS[:4])
    assert not dropped_path(path).exists()


def test_errors_that_are_to_be_tried_again_stay_where_they_are_not_selected(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        work(journal, ROWS, status="error")
        journal.publish()
    with start(path, retry_errors=True) as journal:
        assert journal.done_at_start == {}
        assert work(journal, ROWS[:2]) == ["id 0", "id 1"]
        journal.stay(fleeting=True)
        journal.publish()
    assert [row["status"] for row in read(path)] == ["ok"] * 2 + ["error"] * 4


@pytest.mark.parametrize("how", ["damaged", "of other settings"])
def test_a_file_that_cannot_be_used_is_moved_away(tmp_path, how):
    path = tmp_path / "out.parquet"
    finish(path, ROWS)
    if how == "damaged":
        dropped_path(path).write_bytes(b"precious")
    else:
        finish(tmp_path / "x.parquet", ROWS, settings={"model": "other"})
        shutil.copy(tmp_path / "x.parquet", dropped_path(path))
    content = dropped_path(path).read_bytes()
    assert settled(path, ROWS[:4]) == (2, 0)
    assert dropped(path) == ROWS[4:]
    assert dropped_path(path).with_name(".out.parquet.dropped.parquet.1").read_bytes() == content


def test_starting_over_forgets_what_had_left(tmp_path):
    path = tmp_path / "out.parquet"
    finish(path, ROWS)
    settled(path, ROWS[:4])
    assert finish(path, ROWS, resume=False, overwrite=True) == [id for _, id in ROWS]
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_where_parquet_has_no_room_rows_stay(tmp_path):
    path = tmp_path / "out.arrows"
    span = pa.schema([("span", pa.month_day_nano_interval())])
    finish(path, ROWS, passthrough=span)
    with start(path, passthrough=span) as journal:
        assert not journal.can_drop


def test_an_output_says_of_which_files_it_is_made(tmp_path):
    path = tmp_path / "out.parquet"
    for files, was_written in ([("a", 6)], True), ([("a", 6)], False), ([("a", 2), ("b", 4)], True):
        with start(path) as journal:
            work(journal, ROWS)
            assert journal.publish(files=files) == was_written
        with start(path) as journal:
            assert journal.files == files
    assert refusal(path, settings={"model": "other"}).startswith(f"{path} was begun with other settings")


@pytest.mark.parametrize("extension", [".parquet", ".jsonl"])
@pytest.mark.parametrize(
    ("left_before", "rows"),
    [(ROWS, ROWS[:3]), (ROWS[:3], ROWS), (ROWS[:3], ROWS[2:]), (ROWS, [*ROWS[:3], (9, "new")])],
    ids=["leave", "return", "both", "leave and grow"],
)
def test_no_row_is_lost_whenever_a_run_is_killed(tmp_path, extension, left_before, rows):
    folder, kept = tmp_path / "run", tmp_path / "kept"
    folder.mkdir()
    path = folder / f"out{extension}"
    finish(path, ROWS)
    settled(path, left_before)
    shutil.copytree(folder, kept)
    for moment in count():
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        with dying_after(moment) as death, start(path) as journal:
            assert work(journal, rows) == [id for _, id in rows if id == "new"]
            journal.publish()
        if moment % 2:  # the next run may have fewer rows again
            assert finish(path, rows) in ([], ["new"])
        settled(path, ROWS)
        assert dropped(path) in ([], [(9, "new")])
        if not death.came:
            break
    assert moment > 5
