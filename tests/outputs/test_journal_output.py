"""From a journal to the output, and from a finished output on."""

import errno
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from journal_runs import (
    EXTENSIONS,
    SETTINGS,
    YEAR,
    answer,
    ask,
    finish,
    ids,
    killed,
    numbered,
    read,
    refusal,
    start,
    work,
)

from pipeline.errors import ConfigError, Interrupted, StorageError
from pipeline.outputs.journal import journal_folder
from pipeline.values.dictionaries import settled

pytestmark = pytest.mark.slow

RICH = pa.schema(
    [
        ("category", pa.dictionary(pa.int8(), pa.string())),
        ("categories", pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        ("when", pa.timestamp("s")),
        ("guid", pa.uuid()),
        ("map", pa.map_(pa.string(), pa.int32())),
    ]
)


def rich(row):
    columns = [
        pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), pa.array([f"value {row}"])),
        pa.array([[f"value {row}"]], RICH.field("categories").type),
        pa.array([row], pa.timestamp("s")),
        pa.array([row.to_bytes(16, "big")], pa.uuid()),
        pa.array([[("k", row)]], RICH.field("map").type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=RICH)


def append_rich(journal, rows):
    for row in rows:
        if not ask(journal, row, passthrough=rich(row)):
            journal.append([answer(row, passthrough=rich(row))])


@pytest.mark.parametrize("extension", EXTENSIONS[:-1])
def test_a_published_output_is_extended_with_all_its_columns(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    for count in (150, 300):
        with start(path, passthrough=RICH) as journal:
            assert journal.resumed == (count == 300)
            append_rich(journal, range(count))
            journal.publish()
    assert ids(path) == numbered(300)
    assert [row["category"] for row in read(path)] == [f"value {row}" for row in range(300)]
    assert [row["categories"] for row in read(path)] == [[f"value {row}"] for row in range(300)]
    assert [row["when"].timestamp() for row in read(path)][-1] > 0
    assert [int(row["guid"].int) for row in read(path)] == list(range(300))


@pytest.mark.parametrize("extension", EXTENSIONS[:-1])
def test_a_published_output_survives_kills_while_it_is_extended(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    finish(path, numbered(1500))
    old = path.read_bytes()
    killed(path, numbered(1504))
    assert path.read_bytes() == old
    shuffled = [(1503 - row, id) for row, id in numbered(1504)]
    with start(path) as journal:
        assert journal.done_at_start == {"ok": 1504}
        assert work(journal, sorted(shuffled)) == []
        journal.publish()
    assert ids(path) == sorted(shuffled)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("order", ["input", "completion"])
def test_a_published_output_with_nothing_new_is_not_touched(tmp_path, extension, order):
    path = tmp_path / f"out{extension}"
    finish(path, numbered(1500), order)
    before, files = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino), os.listdir(tmp_path)
    with start(path) as journal:
        assert work(journal, numbered(1500)) == []
        assert journal.passed_over == 1500
        assert not journal.publish(order)
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert os.listdir(tmp_path) == files


@pytest.mark.parametrize(
    "rows", [numbered(4), numbered(5, first=1), [(0, "id 1"), (1, "id 0"), *numbered(3, first=2)]]
)
def test_an_output_whose_rows_have_gone_or_moved_is_written_again(tmp_path, rows):
    path = tmp_path / "out.parquet"
    finish(path, numbered(6))
    with start(path) as journal:
        assert work(journal, rows) == []
        assert journal.publish()
    assert ids(path) == rows


def test_an_output_in_another_order_is_written_again(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        for row in range(3):
            ask(journal, row)
        journal.append([answer(row) for row in (2, 0, 1)])
        journal.publish("completion")
    assert [row for row, _ in ids(path)] == [2, 0, 1]
    assert finish(path, numbered(3), "input") == []
    assert ids(path) == numbered(3)


@pytest.mark.parametrize("calls", [1, 2, 30])
def test_publishing_can_be_ended_and_goes_on_from_the_journal(tmp_path, calls):
    path = tmp_path / "out.parquet"
    called = []

    def check():
        called.append(1)
        if len(called) == calls:
            raise Interrupted("enough", 143)

    with start(path) as journal:
        work(journal, numbered(300))
        with pytest.raises(Interrupted):
            journal.publish(check=check)
    assert os.listdir(tmp_path) == [".out.parquet.journal"]
    assert not any(path.name.endswith(".partial") for path in journal_folder(path).iterdir())
    assert finish(path, numbered(300)) == []
    assert ids(path) == numbered(300)


def test_a_published_output_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "out.parquet"
    finish(path, numbered(2), passthrough=YEAR)
    assert refusal(path, settings={**SETTINGS, "model": "big"}, passthrough=YEAR) == (
        f'{path} was begun with other settings: model was "tiny" and is now "big"; --overwrite starts over'
    )
    assert os.listdir(tmp_path) == ["out.parquet"]


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("is_complete", [True, False])
def test_columns_that_are_copied_in_another_layout_now_are_gone_on_with(tmp_path, extension, is_complete):
    """Versions before copied structs with fields that are not null as such."""
    path = tmp_path / f"out{extension}"
    then = pa.schema([("m", pa.list_(pa.struct([pa.field("a", pa.int64(), nullable=False)])))])
    copied = pa.RecordBatch.from_pylist([{"m": [{"a": 1}]}], then)
    with start(path, passthrough=then) as journal:
        work(journal, numbered(2), passthrough=copied)
        if is_complete:
            journal.publish()
    now = pa.schema([(field.name, settled(field.type)) for field in then])
    with start(path, passthrough=now) as journal:
        work(journal, numbered(1, first=2))  # a row without values to copy
        journal.stay(fleeting=True)
        journal.publish()
    assert [row["m"] for row in read(path)] == [[{"a": 1}], [{"a": 1}], None]


def test_outputs_that_do_not_say_how_they_were_made_are_refused(tmp_path):
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "out.parquet")
    assert refusal(tmp_path / "out.parquet") == (
        f"{tmp_path}/out.parquet does not say with which settings it was made; --overwrite starts over"
    )
    (tmp_path / "out.arrow").write_bytes(b"no Arrow file")
    assert refusal(tmp_path / "out.arrow").startswith(f"{tmp_path}/out.arrow cannot be read: ")


def test_a_type_that_the_format_lacks_is_refused_before_the_work(tmp_path):
    span = pa.schema([("span", pa.month_day_nano_interval())])
    told = refusal(tmp_path / "out.parquet", resume=False, passthrough=span)
    assert told.startswith(f"{tmp_path}/out.parquet cannot be written as .parquet: ")
    assert os.listdir(tmp_path) == []


def test_completion_order_is_that_of_appending(tmp_path):
    path = tmp_path / "out.parquet"
    journal = start(path)
    for row in range(4):
        ask(journal, row)
    journal.append([answer(3), answer(1)])
    journal.append([answer(2)])
    assert finish(path, numbered(5), order="completion") == ["id 0", "id 4"]
    assert ids(path) == [(row, f"id {row}") for row in (3, 1, 2, 0, 4)]


def test_a_publication_that_fails_can_be_repeated(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        work(journal, numbered(3))

        def fail(*names):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(StorageError) as caught:
                journal.publish()
    assert str(caught.value).endswith("and --resume continues once that is put right")
    assert finish(path, numbered(3)) == []
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_a_run_killed_right_after_publishing_publishes_again(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    journal = start(path)
    work(journal, numbered(3))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.outputs.journal.remove_journal", lambda folder: None)
        journal.publish()
    assert path.exists()
    assert finish(path, numbered(4)) == ["id 3"]
    assert ids(path) == numbered(4)
    assert os.listdir(tmp_path) == ["out.parquet"]


def test_another_file_that_appeared_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        work(journal, numbered(3))
        path.write_text("another's")
        with pytest.raises(ConfigError, match="exists; --overwrite replaces it"):
            journal.publish()
    assert path.read_text() == "another's"


def test_many_rows_of_many_chunks_come_out_in_order(tmp_path):
    path = tmp_path / "out.parquet"
    count = 20_000
    order = [(row * 7919) % count for row in range(count)]
    with start(path) as journal:
        for row in range(count):
            assert not ask(journal, row)
        for i in range(0, count, 100):
            journal.append([answer(row) for row in order[i : i + 100]])
        journal.publish()
    table = pq.read_table(path, columns=["row", "id"])
    assert table["row"].to_pylist() == list(range(count))
    assert table["id"].to_pylist() == [f"id {row}" for row in range(count)]


def test_parquet_has_groups_of_ten_thousand_rows_however_appended(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        work(journal, numbered(20_500), pack=700)
        journal.publish()
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [10_000, 10_000, 500]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.slow
def test_long_answers_make_smaller_groups(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as journal:
        work(journal, numbered(6), answer="x" * (20 << 20))
        journal.publish()
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 2]
