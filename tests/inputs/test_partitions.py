"""Columns that the names of folders say."""

import json

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from columns_told import columns_told

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns, parse_keep_columns
from pipeline.inputs.source import open_source


def write(path, *texts, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": list(texts), **{key: [value] * len(texts) for key, value in more.items()}})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        feather.write_feather(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    else:
        path.write_text(texts[0])
    return path


def copied(*inputs, **columns):
    """The text and the copied columns of every row."""
    source = open_source(inputs, Columns(**columns))
    return [(record.text, *record.source.passthrough.to_pylist()) for record in source]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".txt"])
def test_keys_become_text_columns_of_every_format(tmp_path, suffix):
    write(tmp_path / "year=2024" / "town=San%20Jos%C3%A9" / f"a{suffix}", "a")
    write(tmp_path / "year=__HIVE_DEFAULT_PARTITION__" / f"b{suffix}", "b")
    for given in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**/*{suffix}", f"file://{tmp_path}"):
        rows = copied(given)
        assert [{**row, "extra": None} for _, row in rows] == [
            {"year": "2024", "town": "San José", "extra": None},
            {"year": None, "town": None, "extra": None},
        ]
        assert all(row.get("extra") is None for _, row in rows)
    assert columns_told(tmp_path) == {"year": "large_string", "town": "large_string", "text": "string"}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_keys_can_be_ids_tasks_and_questions(tmp_path, suffix):
    write(tmp_path / "q=how%3F" / "kind=qa" / "key=1" / f"a{suffix}", "a")
    (record,) = open_source([tmp_path], Columns(id="key", task="kind", question="q"))
    assert (record.source.id, record.source.task, record.question) == ("1", "qa", "how?")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
def test_a_column_of_the_file_itself_stands_above(tmp_path, suffix):
    write(tmp_path / "year=2024" / f"a{suffix}", "a", year="own")
    assert copied(tmp_path, keep=parse_keep_columns("year")) == [("a", {"year": "own"})]
    assert copied(tmp_path)[0][1]["year"] == "own"


def test_only_folders_below_the_input_count(tmp_path):
    path = write(tmp_path / "year=2024" / "a.parquet", "a")
    for given in (path, path.parent, f"{path.parent}/*"):
        assert open_source([given], Columns()).schema.names == []


def test_a_file_outside_has_a_null_and_no_id(tmp_path):
    write(tmp_path / "in" / "year=2024" / "a.parquet", "a")
    other = write(tmp_path / "b.parquet", "b")
    assert copied(tmp_path / "in", other) == [("a", {"year": "2024"}), ("b", {"year": None})]
    first, second = open_source([tmp_path / "in", other], Columns(id="year"))
    assert (first.source.id, second.kind) == ("2024", "missing_id")


def test_a_damaged_value_costs_its_row_alone(tmp_path):
    buffers = pa.array(["a", "b"]).buffers()
    bad = pa.Array.from_buffers(pa.string(), 2, [None, buffers[1], pa.py_buffer(b"a\xff")])
    path = tmp_path / "k=v" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": bad}), path)
    good, failed = open_source([tmp_path], Columns())
    assert failed.kind == "bad_utf8"
    assert [each.source.passthrough.to_pylist() for each in (good, failed)] == [[{"k": "v"}]] * 2


def test_texts_without_such_a_folder_take_no_column(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    with pytest.raises(InputError, match="leave out --id-column"):
        open_source([path], Columns(id="year"))


def test_a_folder_that_does_not_fit_its_column_costs_the_row_of_a_text_document(tmp_path):
    (tmp_path / "year=x").mkdir()
    (tmp_path / "year=x" / "a.txt").write_text("a")
    (failed,) = open_source([tmp_path], Columns(keep=parse_keep_columns("year:int")))
    assert failed.kind == "bad_value"
    assert failed.message.startswith("year=x/a.txt: 'year' does not fit int64: ")
