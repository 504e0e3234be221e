"""Where a report's rows come from: finished outputs of all formats, and journals that nobody disturbs."""

from __future__ import annotations

import os

import pyarrow.parquet as pq
import pytest
from report_outputs import METADATA, SETTINGS, answered, failed, schema_of, write

from pipeline.errors import ConfigError
from pipeline.outputs import parts as journal_files
from pipeline.outputs.journal import Journal, journal_folder
from pipeline.outputs.lock import lock_output
from pipeline.outputs.mirror import open_journal
from pipeline.records import Row
from pipeline.report.output_reading import opened


def rows_of(given, columns=("id", "row", "status", "answer")):
    with opened([str(given)]) as (run,):
        tables = list(run.tables(columns))
        return run, [row for table in tables for row in table.to_pylist()]


def start(path, **flags):
    return Journal(path, schema_of(), SETTINGS, resume=True, **flags)


def run_of(path, answers, *, finish=False, **flags):
    """A run that answers these and is then finished, or stopped; returns what is in its folder."""
    with start(path, **flags) as journal:
        for answer in answers:
            if not journal.is_done(Row(row=answer.row, id=answer.id, place=""), answer.row_hash):
                journal.append([answer])
        if finish:
            journal.publish()


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if name != "index.sqlite"}


@pytest.mark.parametrize("extension", [".parquet", ".arrow", ".arrows", ".jsonl"])
def test_every_format_is_read_with_its_metadata(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    run_of(path, [answered(0, answer='<b>"x"</b>'), failed(1)], finish=True)
    run, rows = rows_of(path)
    assert [(row["id"], row["status"]) for row in rows] == [("id 0", "ok"), ("id 1", "error")]
    assert rows[0]["answer"] == '<b>"x"</b>'
    assert run.finished
    assert run.metadata == METADATA


def test_json_lines_are_read_without_the_file_that_describes_them(tmp_path):
    path = write(tmp_path / "out.jsonl", [answered(n) for n in range(3)])
    run, rows = rows_of(path, ["id", "kept_tokens"])
    assert rows[2] == {"id": "id 2", "kept_tokens": answered(2).kept_tokens}
    assert run.metadata == {}


def test_columns_that_an_older_output_lacks_are_null(tmp_path):
    path = write(tmp_path / "out.parquet", [answered(0)])
    pq.write_table(pq.read_table(path).drop_columns(["attention_ratio"]), path)
    assert rows_of(path, ["attention_ratio", "row"])[1] == [{"attention_ratio": None, "row": 0}]


def test_an_output_without_rows_is_read(tmp_path):
    assert rows_of(write(tmp_path / "out.parquet", []))[1] == []
    assert rows_of(write(tmp_path / "out.jsonl", []))[1] == []


def test_a_running_journal_is_read_while_its_lock_is_held(tmp_path):
    path = tmp_path / "out.parquet"
    with lock_output(path), start(path) as journal:
        journal.append([answered(0), answered(1)])
        run, rows = rows_of(path)
        assert [row["id"] for row in rows] == ["id 0", "id 1"]
        assert not run.finished
        assert run.metadata == {"settings_that_decide": SETTINGS}
        journal.append([answered(2)])  # the run goes on
        assert len(rows_of(journal_folder(path))[1]) == 3, "the journal's folder names the run as well"
        assert not path.exists()


def test_a_torn_journal_is_read_up_to_the_tear_and_left_as_it_is(tmp_path):
    path = tmp_path / "out.parquet"
    run_of(path, [answered(n) for n in range(4)])
    (part,) = journal_folder(path).glob("part-*")
    os.truncate(part, part.stat().st_size - 5)
    before = contents(journal_folder(path))
    assert [row["id"] for row in rows_of(path)[1]] == ["id 0", "id 1", "id 2"]
    assert contents(journal_folder(path)) == before


def test_a_row_that_was_run_again_counts_once(tmp_path):
    path = tmp_path / "out.parquet"
    run_of(path, [answered(0), failed(1), answered(2)])
    run_of(path, [answered(1, answer="second try"), answered(3)], retry_errors=True)
    rows = {row["id"]: row for row in rows_of(path)[1]}
    assert len(rows_of(path)[1]) == len(rows) == 4
    assert rows["id 1"]["answer"] == "second try"


def test_an_id_that_was_refused_stands_beside_the_one_that_has_it(tmp_path):
    path = tmp_path / "out.parquet"
    run_of(path, [answered(0)])
    with start(path) as journal:
        refused = failed(5, "duplicate_id")
        refused.id = "id 0"
        journal.append([refused])
    assert sorted(row["row"] for row in rows_of(path)[1]) == [0, 5]


def test_a_failed_row_stands_beside_the_question_that_has_its_id(tmp_path):
    path = tmp_path / "out.parquet"
    alone = failed(1)
    alone.id = "a#1"
    run_of(path, [alone])
    run_of(path, [answered(0, id="a#1", question_index=1)])
    assert sorted(row["row"] for row in rows_of(path)[1]) == [0, 1]


def test_an_output_that_is_being_extended_is_read_with_its_journal(tmp_path):
    path = tmp_path / "out.parquet"
    run_of(path, [answered(0), failed(1)], finish=True)
    run_of(path, [answered(1, answer="at last"), answered(2)], retry_errors=True)
    run, rows = rows_of(path)
    assert sorted((row["row"], row["status"]) for row in rows) == [(0, "ok"), (1, "ok"), (2, "ok")]
    assert run.metadata["model"] == "tiny"
    assert run.notes == (
        "the run is not finished: these are the rows of out.parquet and of .out.parquet.journal",
    )


def test_an_output_that_is_being_replaced_gives_way_to_the_run_that_replaces_it(tmp_path):
    path = write(tmp_path / "out.parquet", [answered(n) for n in range(9)])
    with Journal(path, schema_of(), SETTINGS, resume=False, overwrite=True) as journal:
        journal.append([answered(0)])
        run, rows = rows_of(path)
    assert len(rows) == 1
    assert "of an earlier run" in run.notes[1]


def test_a_run_that_ends_while_it_is_read_is_read_to_the_end(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        for n in range(3):
            journal.is_done(Row(row=n, id=f"id {n}", place=""), f"hash {n}")
            journal.append([answered(n)])
        with opened([str(path)]) as (run,):
            journal.publish()
            assert not journal_folder(path).exists()
            assert sum(table.num_rows for table in run.tables(["id"])) == 3


def test_a_journal_that_goes_before_it_is_opened_is_looked_for_again(tmp_path, monkeypatch):
    path = write(tmp_path / "out.parquet", [answered(0)])
    real, gone = journal_files.journal_parts, [tmp_path / ".out.parquet.journal" / "part-0001"]
    monkeypatch.setattr(
        "pipeline.report.output_reading.journal_parts", lambda folder: [gone.pop()] if gone else real(folder)
    )
    assert len(rows_of(path)[1]) == 1


@pytest.mark.parametrize("finished", [True, False])
def test_object_storage_is_read_and_left_as_it_is(bucket, finished):
    url = f"{bucket}/out.parquet"
    with open_journal(url, schema_of(), SETTINGS, resume=True) as journal:
        for n in range(3):
            journal.is_done(Row(row=n, id=f"id {n}", place=""), f"hash {n}")
            journal.append([answered(n)])
        if finished:
            journal.publish()
    for _ in range(2):
        run, rows = rows_of(url)
        assert [row["id"] for row in rows] == ["id 0", "id 1", "id 2"]
        assert run.finished is finished


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("out.parquet", None, "does not exist, nor does the journal of a run that writes it"),
        ("out.csv", b"a,b", "is no output of marsinfer batch: those are .parquet"),
        ("out.parquet", b"PAR1 no", "cannot be read: "),
        ("out.jsonl", b"[1]\n", "cannot be read: its first line is no JSON object"),
        ("out.jsonl", b'{"text": "x"}\n', "is no output of marsinfer batch: it has no column 'id'"),
        (
            "out.jsonl",
            b'{"id": "a", "row": 1, "status": "ok"}\n{"id": 3}\n',
            "cannot be read: it has other columns",
        ),
    ],
)
def test_what_is_no_output_is_refused(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        rows_of(path)
    assert said in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; name an output"):
        rows_of(tmp_path)


def test_labels_tell_outputs_of_one_name_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "out.parquet", [answered(0)])
    names = [str(tmp_path / folder / "out.parquet") for folder in ("a", "b")]
    with opened([*names, str(write(tmp_path / "dense.arrow", []))]) as runs:
        assert [run.label for run in runs] == [*names, "dense"]


def test_a_large_journal_is_read_in_tables_of_a_bounded_size(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        for n in range(0, 2_400, 8):
            journal.append([answered(m) for m in range(n, n + 8)])
    with opened([str(path)]) as (run,):
        sizes = [table.num_rows for table in run.tables(["id", "kept_tokens"])]
    assert sizes == [1_000, 1_000, 400]


def test_a_damaged_journal_is_told(tmp_path):
    path = tmp_path / "out.parquet"
    with Journal(path, schema_of(), SETTINGS, resume=True) as journal:
        for n in range(3):
            journal.is_done(Row(row=n, id=f"id {n}", place=""), f"hash {n}")
            journal.append([answered(n)])
    (part,) = journal_folder(path).glob("part-*")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with opened([str(path)]) as (run,):
        assert sum(table.num_rows for table in run.tables(["id"])) == 2
        assert run.notes[-1] == "the journal is damaged: 1 finished row cannot be read; these are all others"
    assert part.exists()
