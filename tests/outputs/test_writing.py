"""Answers in every output format, published whole or not at all."""

import base64
import dataclasses
import datetime
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_outputs import EXTENSIONS, answers, read, rows, write

from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.own_columns import (
    CHOICE_LOGPROBS,
    LOGPROB_NAMES,
    SELECTION_NAMES,
    SKIPPED_FFNS,
    VALIDITY_NAMES,
    left_out,
)
from pipeline.outputs.writing import output_writer
from pipeline.records import Answer, ChoiceLogprob, OneOfSeveral, PartAnswer, Row, RowError

FULL = Answer(
    id="a",
    row=1,
    answer="yes",
    answers=[
        OneOfSeveral(answer="yes", reasoning=None, finish_reason="stop", new_tokens=1),
        OneOfSeveral(answer="Ö", reasoning="so", finish_reason="length", new_tokens=2),
    ],
    finish_reason="stop",
    document_tokens=10,
    prompt_tokens=12,
    truncated_tokens=0,
    new_tokens=2,
    queue_ms=0.5,
    tokenize_ms=1.5,
    mean_logprob=-0.5,
    min_logprob=-2.25,
    skipped_ffn_ratio=0.25,
    choice_logprobs=[ChoiceLogprob(choice="yes", logprob=-0.25), ChoiceLogprob(choice="no", logprob=None)],
    prefill_ms=2.5,
    ttft_ms=3.5,
    decode_ms=4.5,
    pack_documents=3,
    pack_tokens=40,
    method="dense",
    kept_tokens=[10, 8],
    ffn_tokens=[10, 4],
    kept_ratio=0.75,
    ffn_ratio=0.5,
    attention_ratio=0.4,
    flops_ratio=0.25,
    kv_bytes=1 << 40,
    parts=[
        PartAnswer(
            depth=0, start=0, end=7, status="ok", answer="a", prompt_tokens=5, ttft_ms=1.5, kept_ratio=0.5
        ),
        PartAnswer(depth=0, start=5, end=9),
        PartAnswer(depth=1, start=0, end=2, status="error", error_type="timeout", error_message="late"),
    ],
    row_hash="0f" * 16,
    selection=[b"\0\xff", b""],
    prompt_text="Ö fish",
    prompt_token_chars=[1, 5],
    prompt_spans=[0, 1, 1, 2],
)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_field_comes_back(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    saves = extension != ".jsonl"  # which cannot hold a selection
    lacks = left_out(None, several=True)
    added = (*LOGPROB_NAMES, CHOICE_LOGPROBS, SKIPPED_FFNS)
    write(path, [FULL, Answer(id="b", row=2)], save_selection=saves, added=added, lacks=lacks)
    first, second = rows(path)
    gone = {"passthrough", *VALIDITY_NAMES, *(() if saves else SELECTION_NAMES)}
    names = [field.name for field in dataclasses.fields(Answer) if field.name not in gone]
    expected = {name: getattr(FULL, name) for name in names}
    for name in ("parts", "answers", "choice_logprobs"):
        expected[name] = [dataclasses.asdict(each) for each in getattr(FULL, name)]
    assert first == expected
    assert list(first) == list(expected)
    assert second == {**dict.fromkeys(expected), "id": "b", "row": 2, "status": "ok"}


def test_the_schema_has_explicit_types():
    schema = output_schema(pa.schema([("year", pa.int16())]), {"marsinfer": "1"})
    assert schema.metadata == {b"marsinfer": b"1"}
    assert schema.field("id") == pa.field("id", pa.large_string(), nullable=False)
    assert [str(schema.field(name).type) for name in ("row", "answer", "error_type", "new_tokens")] == [
        "int64",
        "large_string",
        "string",
        "int32",
    ]
    assert schema.field("kept_tokens").type == pa.list_(pa.int32())
    assert schema.names[-1] == "year"


@pytest.mark.parametrize("extension", EXTENSIONS[:-1])
def test_metadata_and_schema_are_kept(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    passthrough = pa.schema([("year", pa.int16())])
    write(path, answers(1), passthrough, metadata={"model": "tiny"})
    expected = output_schema(passthrough, {"model": "tiny"})
    assert read(path).schema == expected
    assert read(path).schema.metadata[b"model"] == b"tiny"


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_no_answers_still_make_a_file(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    write(path, [])
    assert rows(path) == []


def test_failures_become_rows(tmp_path):
    source = Row(row=3, id="x", place="t.parquet row 3")
    failure = RowError(source=source, kind="bad_utf8", message="t.parquet row 3: bad")
    write(tmp_path / "out.parquet", [Answer.from_failure(failure, "dense")])
    (row,) = rows(tmp_path / "out.parquet")
    assert (row["id"], row["row"], row["status"]) == ("x", 3, "error")
    assert (row["error_type"], row["error_message"]) == ("bad_utf8", "t.parquet row 3: bad")


RICH = pa.table(
    {
        "text": ["a", "b"],
        "nested": pa.array([{"x": [1, None]}, None]),
        "category": pa.array(["k", None]).dictionary_encode(),
        "categories": pa.array([["k"], None], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        "when": pa.array([1_500_000_000_123_456_000, None], pa.timestamp("ns", "UTC")),
        "day": pa.array([datetime.date(2020, 1, 2), None]),
        "took": pa.array([5, None], pa.duration("ms")),
        "blob": pa.array([b"\xff\x00", None]),
        "number": pa.array([float("nan"), float("inf")]),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
        "guid": pa.array([bytes(range(16)), None], pa.uuid()),
    }
)


@pytest.fixture
def rich_source(tmp_path):
    pq.write_table(RICH, tmp_path / "in.parquet")
    return open_source([tmp_path / "in.parquet"], Columns())


def pass_all(source, path):
    schema = output_schema(source.schema, {})
    copied = [Answer(id=r.source.id, row=r.source.row, passthrough=r.source.passthrough) for r in source]
    with output_writer(path, schema) as writer:
        writer.write_table(answers_table([*copied, Answer(id="none", row=2)], schema))


@pytest.mark.parametrize("extension", [".parquet", ".arrows"])
def test_copied_columns_come_back_exactly(tmp_path, rich_source, extension):
    path = tmp_path / f"out{extension}"
    pass_all(rich_source, path)
    back = read(path).select(rich_source.schema.names)
    expected = pq.read_table(tmp_path / "in.parquet").drop_columns(["text"])
    # Parquet has no small indices; and rows are compared as text, as NaN differs from itself.
    assert back.drop_columns(["categories"]).schema == expected.drop_columns(["categories"]).schema
    assert str(back.slice(0, 2).to_pylist()) == str(expected.to_pylist())
    assert [column.null_count for column in back.slice(2).columns] == [1] * back.num_columns


def test_an_arrow_file_has_plain_values_for_dictionaries(tmp_path, rich_source):
    path = tmp_path / "out.arrow"
    pass_all(rich_source, path)
    back = read(path)
    assert back.schema.field("category").type == pa.string()
    assert back.schema.field("categories").type == pa.list_(pa.string())
    assert back.column("category").to_pylist() == ["k", None, None]


def test_copied_columns_as_json(tmp_path, rich_source):
    pass_all(rich_source, tmp_path / "out.jsonl")
    first, second, third = rows(tmp_path / "out.jsonl")
    assert {name: first[name] for name in rich_source.schema.names} == {
        "nested": {"x": [1, None]},
        "category": "k",
        "categories": ["k"],
        "when": "2017-07-14T02:40:00.123456000Z",
        "day": "2020-01-02",
        "took": 5,
        "blob": base64.b64encode(b"\xff\x00").decode(),
        "number": None,
        "map": [["k", 1]],
        "guid": "00010203-0405-0607-0809-0a0b0c0d0e0f",
    }
    assert {second[name] for name in rich_source.schema.names} == {None}
    assert {third[name] for name in rich_source.schema.names} == {None}


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_dictionaries_that_differ_by_batch_are_written(tmp_path, extension):
    kind = pa.dictionary(pa.int8(), pa.string())
    schema = pa.schema([("k", kind)])
    many = []
    for i in range(300):  # more values than an int8 counts
        values = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), pa.array([f"value {i}"]))
        batch = pa.RecordBatch.from_arrays([values], schema=schema)
        many.append(Answer(id=str(i), row=i, passthrough=batch))
    path = tmp_path / f"out{extension}"
    write(path, many, schema)
    assert [row["k"] for row in rows(path)] == [f"value {i}" for i in range(300)]


@pytest.mark.parametrize(
    "entries", [pa.array(["x", None]), pa.array([1, None])], ids=lambda array: str(array.type)
)
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_null_entries_of_dictionaries_are_written(tmp_path, extension, entries):
    encoded = pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int8()), entries)
    table = pa.table({"k": encoded, "list": pa.ListArray.from_arrays([0, 1, 2, 3], encoded)})
    copied = table.to_batches()[0]
    path = tmp_path / f"out{extension}"
    many = [Answer(id=str(i), row=i, passthrough=copied.slice(i, 1)) for i in range(3)]
    write(path, many, table.schema)
    first = entries[0].as_py()
    assert [(row["k"], row["list"]) for row in rows(path)] == [
        (first, [first]),
        (None, [None]),
        (None, [None]),
    ]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_half_surrogate_pairs_are_replaced(tmp_path, extension):
    path = tmp_path / f"out{extension}"
    parts = [PartAnswer(depth=0, start=0, end=1, answer="c\ud800", error_message="\udc80 line 1")]
    write(path, [Answer(id="\udc80", row=0, answer="a\ud800b \ud83d\ude00", parts=parts), *answers(1)])
    first, second = rows(path)
    assert (first["parts"][0]["answer"], first["parts"][0]["error_message"]) == ("c\ufffd", "\ufffd line 1")
    assert (first["id"], first["answer"]) == ("\ufffd", "a\ufffdb \N{GRINNING FACE}")
    assert second["answer"] == "answer 0"


@pytest.mark.parametrize("extension", [".parquet", ".jsonl"])
def test_the_name_is_durable_when_the_output_is_published(tmp_path, monkeypatch, extension):
    """Else a machine that loses power forgets which file has the output's name."""
    done, fsync, replace = [], os.fsync, os.replace

    def record_sync(descriptor):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_rename(source, target):
        done.append(("rename", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    path = tmp_path / f"out{extension}"
    write(path, answers(1))
    published = done.index(("rename", path))
    assert "sync" in {what for what, _ in done[:published]}  # the content
    assert ("sync", tmp_path) in done[published:]
