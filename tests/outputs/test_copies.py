"""Copied columns are those of the input when the output is published, whoever answered the rows."""

import json
import math
import os
import shutil
from itertools import count

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from journal_runs import (
    EXTENSIONS,
    NOTHING,
    SETTINGS,
    answer,
    ask,
    dying_after,
    killed,
    numbered,
    read,
    refusal,
    schema_of,
    start,
    work,
)

from pipeline.errors import ConfigError
from pipeline.outputs import copies, merge
from pipeline.outputs.dropped import dropped_path
from pipeline.outputs.journal import journal_folder
from pipeline.outputs.mirror import open_journal
from pipeline.storage.remote import place_of

YEAR = pa.schema([("year", pa.int16())])
THEN = pa.schema([("year", pa.int16()), ("old", pa.string())])
NOW = pa.schema([("town", pa.large_string()), ("year", pa.string())])


def of(schema, **values):
    return pa.RecordBatch.from_pylist([values], schema)


def then(row):
    return of(THEN, year=1900 + row, old=f"old {row}")


def now(row):
    return of(NOW, year=str(2000 + row), town=f"town {row}")


def take(journal, rows, copy, **answers):
    """What a run does with rows, each with columns of its own; returns the rows that it answers."""
    new = [row for row in rows if not ask(journal, row, passthrough=copy(row))]
    journal.append([answer(row, passthrough=copy(row), **answers) for row in new])
    return new


def publish(path, rows, copy, *, stay=False, order="input", **flags):
    """A whole run; returns whether the output was written."""
    with start(path, passthrough=copy(0).schema, **flags) as journal:
        take(journal, rows, copy)
        if stay:
            journal.stay(fleeting=True)
        return journal.publish(order)


def copied(path, *names):
    return [tuple(row[name] for name in names) for row in read(path)]


def columns(path):
    """Names of the copied columns."""
    names = list(read(path)[0])
    return names[names.index("row_hash") + 1 :]


@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "unfinished"])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_rows_of_earlier_runs_take_the_columns_of_today(tmp_path, extension, is_complete):
    path = tmp_path / f"out{extension}"
    if is_complete:
        assert publish(path, range(5), then)
    else:
        journal = start(path, passthrough=THEN)
        assert take(journal, range(5), then) == list(range(5))
    with start(path, passthrough=NOW) as journal:
        assert take(journal, range(7), now, finish_reason="late") == [5, 6]
        assert journal.publish()
    assert columns(path) == ["town", "year"]
    assert copied(path, "town", "year") == [(f"town {row}", str(2000 + row)) for row in range(7)]
    assert copied(path, "id", "finish_reason")[4:6] == [("id 4", None), ("id 5", "late")]
    assert not publish(path, range(7), now)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_rows_that_are_not_read_keep_their_columns(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    publish(path, range(4), then)
    assert publish(path, [1], now, stay=True)
    kept = [(None, "1900"), ("town 1", "2001"), (None, "1902"), (None, "1903")]
    assert copied(path, "town", "year") == kept
    assert not publish(path, [1], now, stay=True)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_columns_that_are_no_longer_asked_for_go(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    publish(path, range(3), then)
    with start(path) as journal:
        assert work(journal, numbered(2)) == []
        journal.stay(fleeting=True)
        assert journal.publish()
    assert columns(path) == []
    with start(path) as journal:
        assert work(journal, numbered(3)) == []
        assert not journal.publish()


RICH = pa.schema(
    [
        ("number", pa.float64()),
        ("category", pa.dictionary(pa.int8(), pa.string())),
        ("nested", pa.list_(pa.struct([("a", pa.float32())]))),
    ]
)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_output_is_stale_when_one_value_changed_and_only_then(tmp_path, extension):
    path = tmp_path / f"out{extension}"

    def rich(row, changed=None):
        number = math.nan if row == 2 else 7.0 if row == changed else row / 3
        return of(RICH, number=number, category=f"c{row % 2}", nested=[{"a": math.nan}, {"a": 0.1}, None])

    publish(path, range(9), rich)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert not publish(path, range(9), rich)
    assert not publish(path, range(4), rich, stay=True)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert publish(path, range(9), lambda row: rich(row, changed=5))
    assert [row for row, (value,) in enumerate(copied(path, "number")) if value == 7.0] == [5]


def test_columns_in_another_order_or_of_another_type_make_an_output_stale(tmp_path):
    path = tmp_path / "out.parquet"
    publish(path, range(3), then)
    assert publish(path, range(3), lambda row: then(row).select(["old", "year"]))
    assert columns(path) == ["old", "year"]
    assert publish(path, range(3), lambda row: of(YEAR, year=1900 + row))
    wide = pa.schema([("year", pa.int64())])
    assert publish(path, range(3), lambda row: of(wide, year=1900 + row))
    assert pq.read_schema(path).field("year").type == pa.int64()


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_rows_that_come_back_take_the_columns_of_today(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    publish(path, range(4), then)
    publish(path, range(2), then)
    assert publish(path, range(3), now)
    assert copied(path, "town", "year")[2] == ("town 2", "2002")
    assert pq.read_table(dropped_path(path))["year"].to_pylist() == ["1903"]
    with start(path, passthrough=NOW) as journal:
        assert take(journal, range(4), now) == []
        assert journal.publish()
    assert copied(path, "town", "year")[3] == ("town 3", "2003")
    assert not dropped_path(path).exists()


def test_values_of_rows_that_left_need_not_fit_the_columns_of_today(tmp_path):
    path = tmp_path / "out.parquet"
    text = pa.schema([("year", pa.string())])
    publish(path, range(4), lambda row: of(text, year="soon" if row % 2 else str(row)))
    publish(path, [0], lambda row: of(YEAR, year=row))
    kept = pq.read_table(dropped_path(path)).select(["row", "year"]).to_pylist()
    assert kept == [{"row": row, "year": None if row % 2 else row} for row in (1, 2, 3)]


def test_a_value_of_a_row_that_stays_is_not_lost_where_it_does_not_fit(tmp_path):
    path = tmp_path / "out.parquet"
    text = pa.schema([("year", pa.string())])
    publish(path, range(2), lambda row: of(text, year="soon"))
    before = path.read_bytes()
    with start(path, passthrough=YEAR) as journal:
        assert take(journal, [0, 2], lambda row: of(YEAR, year=row)) == [2]
        journal.stay(fleeting=True)
        with pytest.raises(ConfigError) as refused:
            journal.publish()
    assert str(refused.value).startswith(
        "'year' of a row that stays, though this run did not read it, is string and does not fit int16: "
    )
    assert str(refused.value).endswith("; --keep-columns year:string keeps both")
    assert path.read_bytes() == before
    with start(path, passthrough=text) as journal:  # what was answered is in the journal
        assert take(journal, [0, 2], lambda row: of(text, year=str(row))) == []
        journal.stay(fleeting=True)
        journal.publish()
    assert copied(path, "year") == [("0",), ("soon",), ("2",)]


def test_rows_scattered_over_many_chunks_get_their_own_values(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "CHUNK_ROWS", 7)
    monkeypatch.setattr(merge, "GROUP_ROWS", 50)
    monkeypatch.setattr(merge, "CACHED_CHUNKS", 2)
    path = tmp_path / "out.parquet"
    publish(path, range(300), then)
    shuffled = [(row * 79) % 300 for row in range(300)]
    with start(path, passthrough=NOW) as journal:
        for place, row in enumerate(shuffled):
            assert ask(journal, place, f"id {row}", passthrough=now(row)) == (row < 300)
        journal.publish()
    assert copied(path, "id", "town") == [(f"id {row}", f"town {row}") for row in shuffled]


def test_what_waits_in_memory_is_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(merge, "GROUP_BYTES", 100_000)
    path = tmp_path / "out.parquet"
    publish(path, range(50), lambda row: of(NOW, town="x"))
    with start(path, passthrough=NOW) as journal:
        for row in range(50):
            assert ask(journal, row, passthrough=of(NOW, town=str(row % 10) * 20_000))
            size = (journal_folder(path) / "copies.partial").stat().st_size
            assert size > 20_000 * (row + 1)
        journal.publish()
    assert pq.read_metadata(path).num_row_groups >= 10
    assert copied(path, "town") == [(str(row % 10) * 20_000,) for row in range(50)]


def test_a_run_that_copies_nothing_or_resumes_nothing_writes_no_copies(tmp_path):
    for name, schema in (("a", NOTHING), ("b", NOW)):
        path = tmp_path / f"{name}.parquet"
        for resumed in (False, True):
            with start(path, passthrough=schema) as journal:
                rows = numbered(3, first=3 * resumed)
                work(journal, rows, passthrough=now(0) if schema is NOW else None)
                journal._copies.flush()
                assert not (journal_folder(path) / "copies.partial").exists()
                journal.stay(fleeting=True)
                journal.publish()


def test_what_a_killed_run_left_of_its_copies_is_nobody_s(tmp_path):
    path = tmp_path / "out.parquet"
    journal = start(path, passthrough=THEN)
    take(journal, range(3), then)
    journal = start(path, passthrough=NOW)
    take(journal, range(3), now)
    journal._copies.flush()
    left = journal_folder(path) / "copies.partial"
    assert left.exists()
    assert publish(path, range(3), then)
    assert columns(path) == ["year", "old"]
    assert os.listdir(tmp_path) == ["out.parquet"]
    killed(path, numbered(4), passthrough=THEN)
    left.write_bytes(b"torn")
    assert publish(path, range(4), now)
    assert copied(path, "town")[3] == ("town 3",)


def test_copies_that_are_damaged_meanwhile_end_the_run_and_lose_nothing(tmp_path):
    path = tmp_path / "out.parquet"
    publish(path, range(3), then)
    before = path.read_bytes()
    with start(path, passthrough=NOW) as journal:
        assert take(journal, range(4), now) == [3]
        journal._copies.flush()
        (journal_folder(path) / "copies.partial").write_bytes(b"damaged")
        with pytest.raises(Exception, match=r"copies\.partial was damaged during the run"):
            journal.publish()
    assert path.read_bytes() == before
    assert publish(path, range(4), now)
    assert len(copied(path, "town")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("extension", [".parquet", ".jsonl"])
@pytest.mark.parametrize("rows", [range(4), range(3), range(5)], ids=["same", "one leaves", "one is new"])
def test_nothing_is_lost_whenever_a_run_with_other_columns_is_killed(tmp_path, extension, rows):
    folder, kept = tmp_path / "run", tmp_path / "kept"
    folder.mkdir()
    path = folder / f"out{extension}"
    publish(path, range(4), then)
    shutil.copytree(folder, kept)
    for moment in count():
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        with dying_after(moment) as death:
            publish(path, rows, now)
        with start(path, passthrough=THEN if moment % 2 else NOW) as journal:
            again = take(journal, range(4), then if moment % 2 else now)
            assert again == []
            journal.stay(fleeting=True)
            journal.publish()
        if moment % 2:
            assert copied(path, "year", "old")[:4] == [(1900 + row, f"old {row}") for row in range(4)]
        else:
            assert copied(path, "year", "town")[:4] == [(str(2000 + row), f"town {row}") for row in range(4)]
        if not death.came:
            break
    assert moment > 5


def test_lines_of_the_same_size_before_and_after_are_told_by_their_columns(tmp_path):
    path = tmp_path / "out.jsonl"
    first, second = (pa.schema([(name, pa.int16())]) for name in ("aa", "bb"))
    publish(path, range(3), lambda row: of(first, aa=row))
    old = path.read_bytes()
    publish(path, range(3), lambda row: of(second, bb=row))
    assert path.stat().st_size == len(old)
    assert columns(path) == ["bb"]
    assert not publish(path, range(3), lambda row: of(second, bb=row))
    path.write_bytes(old)  # as if the run had been killed before the output was replaced
    assert publish(path, range(3), lambda row: of(second, bb=row))


def test_lines_that_hold_keys_are_left_as_they_are(tmp_path):
    from pipeline.values.jsonvalues import KEYS

    keys = pa.schema([pa.field("extra", pa.large_string(), metadata=KEYS)])
    path = tmp_path / "out.jsonl"

    def held(row, number="1.10"):
        return of(keys, extra=f'{{"n": {number}, "town": "Bärn"}}' if row else None)

    publish(path, range(3), held)
    assert b'"n": 1.10' in path.read_bytes()
    assert not publish(path, range(3), held)
    assert publish(path, range(3), lambda row: held(row, "1.1"))
    assert publish(path, range(1), now, stay=True)
    assert columns(path) == ["town", "year"]


def test_the_answer_s_own_columns_are_not_free(tmp_path):
    path = tmp_path / "out.parquet"
    publish(path, range(2), then)
    wide = schema_of(NOW).insert(3, pa.field("question_index", pa.int64())).remove(2)
    with pytest.raises(ConfigError) as refused:
        open_journal(path, wide, SETTINGS, resume=True)
    assert "was begun with other columns: " in str(refused.value)
    assert "town" not in str(refused.value)
    assert "was begun with other settings" in refusal(path, settings={"model": "big"}, passthrough=NOW)


@pytest.mark.parametrize("extension", [".parquet", ".jsonl"])
def test_an_output_in_object_storage_takes_the_columns_of_today(tmp_path, extension):
    output = f"memory://copies/out{extension}"

    def run(copy, rows, *, ends=True):
        with open_journal(output, schema_of(copy(0).schema), SETTINGS, resume=True) as journal:
            answered = take(journal, rows, copy)
            return answered, journal.publish() if ends else None

    try:
        assert run(then, range(3), ends=False) == ([0, 1, 2], None)
        assert run(now, range(4)) == ([3], True)
        assert run(now, range(4)) == ([], False)
        assert run(then, range(4)) == ([], True)
        assert run(now, range(4)) == ([], True)
        place_of(output).download(tmp_path / f"out{extension}")
        found = copied(tmp_path / f"out{extension}", "town", "year")
        assert found == [(f"town {row}", str(2000 + row)) for row in range(4)]
        names = fsspec.filesystem("memory").find("/copies")
        sidecar = [f"/copies/out{extension}.run.json"] if extension == ".jsonl" else []
        assert names == [f"/copies/out{extension}", *sidecar]
    finally:
        fsspec.filesystem("memory").rm("/copies", recursive=True)


def test_the_metadata_of_both_outputs_is_kept_until_one_is_gone(tmp_path):
    path = tmp_path / "out.jsonl"
    publish(path, range(2), then)
    publish(path, range(2), now)
    told = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    assert list(told["columns"])[-2:] == ["town", "year"]
    assert [list(each["columns"])[-2:] for each in told["before"]] == [["year", "old"]]


def test_a_file_beside_lines_of_an_earlier_version_is_understood(tmp_path):
    path, sidecar = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.json"
    publish(path, range(2), then)
    told = json.loads(sidecar.read_text())
    assert "before" not in told
    for sizes in ([path.stat().st_size, 7], [7, path.stat().st_size]):
        sidecar.write_text(json.dumps({**told, "bytes": sizes}))
        assert not publish(path, range(2), then)
