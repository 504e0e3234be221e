"""Finished rows survive a killed run, and only rows that are still the same are taken over."""

import os
import queue
from concurrent.futures import ThreadPoolExecutor

import pytest
from journal_runs import (
    EXTENSIONS,
    SETTINGS,
    answer,
    ask,
    finish,
    hash_of,
    ids,
    killed,
    numbered,
    read,
    refusal,
    start,
    work,
)

from pipeline.outputs.journal import journal_folder
from pipeline.records import RowError


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_killed_run_is_continued(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    killed(path, numbered(7))
    assert not path.exists()
    with start(path) as journal:
        assert (journal.resumed, dict(journal.done_at_start)) == (True, {"ok": 7})
        assert work(journal, numbered(10)) == ["id 7", "id 8", "id 9"]
        journal.publish()
    assert ids(path) == numbered(10)
    sidecars = ["out.jsonl.run.json"] if extension == ".jsonl" else []
    assert sorted(os.listdir(tmp_path)) == [path.name, *sidecars]
    assert read(path)[4]["answer"] == "answer to id 4: text"
    assert read(path)[4]["row_hash"] == hash_of("id 4")


def test_many_killed_runs_add_up(tmp_path):
    path = tmp_path / "out.parquet"
    for count in (2, 5, 5, 9):
        killed(path, numbered(count))
    assert sorted(p.name for p in journal_folder(path).glob("part-*")) == [
        "part-0001",
        "part-0002",
        "part-0003",
    ]
    assert finish(path, numbered(9)) == []
    assert ids(path) == numbered(9)


def test_a_first_run_with_resume_begins_afresh(tmp_path):
    with start(tmp_path / "out.parquet") as journal:
        assert (journal.resumed, dict(journal.done_at_start)) == (False, {})
    assert os.listdir(tmp_path) == []


def test_a_journal_without_answers_is_no_obstacle(tmp_path):
    path = tmp_path / "out.parquet"
    start(path, resume=False)
    assert journal_folder(path).is_dir()
    with start(path, resume=False, settings={"model": "other"}) as journal:
        assert not journal.resumed


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    method = {"name": "marsinfer", "eta": 0.9, "window": 5}
    assert refusal(path, settings={"model": "tiny", "method": method}) == (
        f"{path} was begun with other settings: method.eta was 0.95 and is now 0.9, "
        'stop was ["a", "b"] and is now not set, method.window was not set and is now 5; '
        "--overwrite starts over"
    )
    many = {**SETTINGS, **{f"s{i}": "x" * 100 for i in range(7)}}
    told = refusal(path, settings=many)
    assert told.count(" was ") == 6
    assert told.endswith("xxx..., and 2 more; --overwrite starts over")


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    assert refusal(path, resume=False) == (
        "an unfinished run left .out.parquet.journal; --resume continues it, --overwrite starts over"
    )
    finish(path, numbered(3))
    assert refusal(path, resume=False) == f"{path} exists; --overwrite replaces it"
    both = refusal(path, resume=True, overwrite=True)
    assert both == "--resume and --overwrite exclude each other"


def test_overwrite_starts_over_and_keeps_the_old_output_until_the_end(tmp_path):
    path = tmp_path / "out.parquet"
    finish(path, numbered(3))
    old = path.read_bytes()
    killed(path, numbered(2), resume=False, overwrite=True)
    assert path.read_bytes() == old
    with start(path, resume=False, overwrite=True) as journal:
        assert (journal.resumed, dict(journal.done_at_start)) == (False, {})
        work(journal, numbered(4))
        assert path.read_bytes() == old
        journal.publish()
    assert ids(path) == numbered(4)


def test_an_overwriting_run_that_was_killed_forgets_the_old_output(tmp_path):
    path = tmp_path / "out.parquet"
    finish(path, numbered(5))
    killed(path, numbered(2), resume=False, overwrite=True)
    assert finish(path, numbered(5)) == ["id 2", "id 3", "id 4"]


def test_an_input_that_grew_and_was_reordered(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    names = ["new", "id 2", "id 0", "newer", "id 1"]
    assert finish(path, list(enumerate(names))) == ["new", "newer"]
    assert ids(path) == list(enumerate(names))
    assert [row["answer"] for row in read(path)] == [f"answer to {name}: text" for name in names]


def test_a_row_that_left_the_input_leaves_the_output(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    assert finish(path, [(0, "id 0"), (1, "id 2")]) == []
    assert ids(path) == [(0, "id 0"), (1, "id 2")]


def test_a_changed_text_is_answered_anew(tmp_path):
    path = tmp_path / "out.parquet"
    killed(path, numbered(3))
    with start(path) as journal:
        assert ask(journal, 0)
        assert not ask(journal, 1, text="other")
        journal.append([answer(1, text="other")])
        assert ask(journal, 2)
        journal.publish()
    assert [row["answer"][-5:] for row in read(path)] == [" text", "other", " text"]


def test_an_id_that_comes_twice_is_an_error_row(tmp_path):
    path = tmp_path / "out.parquet"
    for run in range(2):
        with start(path) as journal:
            assert ask(journal, 0, "x") == (run == 1)
            with pytest.raises(RowError) as caught:
                ask(journal, 17, "x")
            assert caught.value.kind == "duplicate_id"
            assert str(caught.value) == "has the id 'x' of row 0; ids must be unique"
            twice = answer(17, "x", status="error", error_type="duplicate_id")
            journal.append([twice, answer(0, "x")] if run == 0 else [twice])
            if run == 1:
                assert journal.done_at_start == {"ok": 1}
                journal.publish()
    rows = read(path)
    assert [(row["row"], row["id"], row["status"]) for row in rows] == [(0, "x", "ok"), (17, "x", "error")]
    with start(path) as journal:
        assert ask(journal, 0, "x")


def test_half_surrogate_pairs_in_ids_are_known_again(tmp_path):
    path = tmp_path / "out.parquet"
    for _ in range(2):
        finish(path, [(0, "a\ud800")])
    with start(path) as journal:
        assert ask(journal, 0, "a\ud800")


def test_errors_are_retried_on_demand_and_skipped_rows_are_not(tmp_path):
    path = tmp_path / "out.parquet"
    journal = start(path)
    for row in range(3):
        ask(journal, row)
    journal.append([answer(0), answer(1, status="error"), answer(2, status="skipped")])
    with start(path) as journal:
        assert journal.done_at_start == {"ok": 1, "error": 1, "skipped": 1}
        assert work(journal, numbered(3)) == []
    with start(path, retry_errors=True) as journal:
        assert journal.done_at_start == {"ok": 1, "skipped": 1}
        assert work(journal, numbered(3)) == ["id 1"]
        journal.publish()
    assert [row["status"] for row in read(path)] == ["ok", "ok", "skipped"]


@pytest.mark.slow
def test_one_thread_may_ask_while_another_appends(tmp_path):
    path = tmp_path / "out.parquet"
    asked = queue.Queue()

    def reader(journal):
        for row, id in numbered(500):
            asked.put(None if ask(journal, row, id) else row)

    with start(path) as journal, ThreadPoolExecutor() as pool:
        reading = pool.submit(reader, journal)
        for _ in range(500):
            journal.append([answer(asked.get(timeout=300))])
        reading.result()
        journal.publish()
    assert ids(path) == numbered(500)
