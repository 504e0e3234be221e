"""Rows put together by document on disk, and what that makes of a run."""

from __future__ import annotations

import json
import os
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StorageError
from pipeline.inputs import sorting
from pipeline.inputs.columns import Columns
from pipeline.inputs.sorting import by_document
from pipeline.inputs.source import open_source
from pipeline.records import Document


def test_rows_follow_the_first_of_their_document(tmp_path):
    table = pa.table(
        {
            "text": ["a b", "c", "", "a b", "d", "c", "a b"],
            "q": list("1234567"),
            "n": pa.array(range(7)),
            "kind": pa.array(["x", "y", "z", None, "x", "y", "z"]).dictionary_encode(),
            "when": pa.array([[1], [2], None, [4], [5], [6], [7]], pa.list_(pa.timestamp("us"))),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    source = open_source([tmp_path / "in.parquet"], Columns(question="q"))
    given = {record.source.row: record for record in source}
    found = list(by_document(source))
    assert [record.source.row for record in found] == [0, 3, 6, 1, 5, 2, 4]
    for record in found:
        original = given[record.source.row]
        assert type(record) is type(original)
        assert record.source.passthrough.to_pylist() == original.source.passthrough.to_pylist()
        assert record.source.passthrough.schema == original.source.passthrough.schema
        assert (record.source.id, record.source.place) == (original.source.id, original.source.place)
        if isinstance(record, Document):
            assert (record.text, record.question) == (original.text, original.question)
        else:
            assert record == original or record.message == original.message


def test_rows_without_copied_columns_and_odd_texts_come_back(tmp_path):
    texts = ["nul \0 inside", "é" * 1000, "\U0001f41f"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 2))
    source = open_source([tmp_path / "in.jsonl"], Columns(keep={}))
    found = list(by_document(source))
    assert [record.text for record in found] == [text for text in texts for _ in "ab"]
    assert [record.source.row for record in found] == [0, 3, 1, 4, 2, 5]
    assert {record.source.passthrough for record in found} == {None}


def test_no_file_is_left(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 300)))
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    rows = by_document(open_source([tmp_path / "in.jsonl"], Columns()))
    next(rows)
    assert os.listdir(tmp_path) == ["in.jsonl"]
    rows.close()


def test_no_room_is_an_error_of_the_storage(tmp_path, monkeypatch):
    def connect(*arguments, **options):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sorting.sqlite3, "connect", connect)
    with pytest.raises(StorageError, match="cannot be sorted by document: unable to open database file; let"):
        list(by_document([]))


def test_scattered_rows_come_within_one_window(call, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pipeline.engines.packing.windows.__kwdefaults__", {"documents": 4, "tokens": 4_000_000}
    )
    texts = [f"fish {n} " * 9 for n in range(4)]
    rows = [{"id": str(n), "text": texts[n % 4], "ask": f"is it {n}?"} for n in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--question-column", "ask", "--id-column", "id", "--max-new-tokens", "3", "--method", "dense"]
    tables = []
    for sort in ([], ["--sort-by-document"]):
        out = tmp_path / f"out{len(sort)}.parquet"
        assert call(tmp_path / "in.jsonl", out, *flags, *sort) == 0
        tables.append(pq.read_table(out).to_pylist())
    plain, ordered = tables
    assert {row["group_rows"] for row in plain} == {None}
    assert sum(row["group_rows"] is not None for row in ordered) >= 8
    assert [row["id"] for row in ordered] == [str(n) for n in range(12)]
    assert [row["answer"] for row in ordered] == [row["answer"] for row in plain]


def test_a_resumed_run_sorts_what_is_new(call, tmp_path):
    flags = ["--question", "what?", "--id-column", "id", "--max-new-tokens", "2", "--sort-by-document"]
    rows = [{"id": str(n), "text": f"fish {n % 2} " * 9} for n in range(6)]
    for count in (3, 6):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        assert call(tmp_path / "in.jsonl", tmp_path / "out.parquet", *flags, "--resume") == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == [str(n) for n in range(6)]
    assert table["status"].to_pylist() == ["ok"] * 6
