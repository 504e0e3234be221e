"""Outputs whose rows are documents, with a struct for each question, and outputs with typed values."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from journal_runs import EXTENSIONS, NOTHING, YEAR, read

from pipeline.errors import ConfigError
from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.journal import Journal
from pipeline.outputs.layout import Together, layout_of
from pipeline.outputs.own import is_own_table, may_be_replaced
from pipeline.outputs.own_columns import left_out
from pipeline.outputs.published import Published
from pipeline.outputs.sidecar import needs_sidecar, read_sidecar
from pipeline.outputs.writing import output_writer
from pipeline.records import Answer, Row

SCHEMA = {
    "type": "object",
    "properties": {"amount": {"type": "number"}, "parties": {"items": {"type": "string"}}},
}
VALUE_TYPE = pa.struct([("amount", pa.float64()), ("parties", pa.list_(pa.large_string()))])
SAID = '{"amount": 3, "parties": ["A", null]}'
VALUE = {"amount": 3.0, "parties": ["A", None]}
NAMES = ("law", "value")


def settings_of(names):
    return {"model": "tiny", **({"questions": list(names)} if names else {})}


def schema_of(layout, passthrough=NOTHING, columns=("answer", "new_tokens")):
    settings = settings_of(layout.questions)
    about = {"settings_that_decide": settings, "layout": layout.as_dict()}
    return output_schema(passthrough, {"marsinfer": json.dumps(about)}, lacks=left_out(columns))


def source(row, name, index, id=None, passthrough=None):
    asked = {"question_index": index, "question_name": name}
    return Row(row=row, id="", place="", passthrough=passthrough, **asked).called(id or f"d{row}")


def answer(row, name, index, text="text", **values):
    asked = source(row, name, index, passthrough=values.pop("passthrough", None))
    values.setdefault("answer", f"{name} of {row}: {text}")
    made = Answer.begin(asked, "dense")
    made.row_hash = f"{asked.id} {text}"
    for key, value in values.items():
        setattr(made, key, value)
    return made


def run(path, layout, rows, *, text="text", dies=False, passthrough=NOTHING, pack=3, failing=(), **flags):
    """What a run does; returns the ids that it answered. One that `dies` publishes nothing."""
    settings = settings_of(layout.questions)
    journal = Journal(path, schema_of(layout, passthrough), settings, resume=True, **flags)
    new = []
    for row in rows:
        copied = None if not passthrough.names else pa.RecordBatch.from_pylist([{"year": row}], passthrough)
        for index, name in enumerate(layout.questions):
            asked = source(row, name, index, passthrough=copied)
            if not journal.is_done(asked, f"{asked.id} {text}"):
                failed = {"status": "error", "answer": None, "error_type": "timeout"}
                values = failed if asked.id in failing else {}
                new.append(answer(row, name, index, text, passthrough=copied, **values))
    for i in range(0, len(new), pack):
        journal.append(new[i : i + pack])
    if not dies:
        journal.publish()
    journal.close()
    return [each.id for each in new]


def written(path, layout, answers, passthrough=NOTHING):
    schema = schema_of(layout, passthrough)
    with output_writer(path, schema) as writer:
        for each in answers:  # one by one, so that documents are divided
            writer.write_table(answers_table([each], schema))


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_a_row_is_a_document_and_each_question_a_struct(tmp_path, suffix):
    path, layout = tmp_path / f"out{suffix}", layout_of(NAMES, {"value": SCHEMA})
    assert run(path, layout, range(3), passthrough=YEAR, failing={"d1#law"}) == [
        *("d0#law", "d0#value", "d1#law", "d1#value", "d2#law", "d2#value")
    ]
    rows = read(path)
    assert [list(row) for row in rows] == [["id", "row", "status", "law", "value", "year"]] * 3
    assert [(row["id"], row["row"], row["status"], row["year"]) for row in rows] == [
        *(("d0", 0, "ok", 0), ("d1", 1, "error", 1), ("d2", 2, "ok", 2))
    ]
    law = {"status": "ok", "answer": "law of 0: text", "error_type": None, "new_tokens": None}
    assert rows[0]["law"] == law | {"row_hash": "d0#law text"}
    assert rows[1]["law"]["error_type"] == "timeout"
    assert rows[1]["value"]["status"] == "ok"
    assert rows[0]["value"].pop("value") is None  # it is no JSON


@pytest.mark.parametrize("suffix", EXTENSIONS)
@pytest.mark.parametrize("questions", [NAMES, ()])
def test_rows_come_back_as_they_were_written(tmp_path, suffix, questions):
    path = tmp_path / f"out{suffix}"
    layout = layout_of(questions, {"value" if questions else "": SCHEMA})
    copied = [pa.RecordBatch.from_pylist([{"year": row}], YEAR) for row in range(3)]
    answers = [
        answer(row, name, index, answer=SAID, passthrough=copied[row])
        for row in range(3)
        for index, name in enumerate(questions or [None])
    ]
    if not questions:
        for each in answers:
            each.question_index = None
    written(path, layout, answers, YEAR)
    lines_schema = None
    if needs_sidecar(path):  # which a journal would have written
        lines_schema = layout.file_schema(schema_of(layout, YEAR))
    published = Published(path, lines_schema=lines_schema)
    expected = answers_table(answers, schema_of(layout, YEAR))
    read_back = pa.concat_tables([published.read(group) for group in published])
    assert read_back.to_pylist() == expected.to_pylist()
    assert published.schema.names == expected.schema.names
    some = ["id", "year", "status"]
    read_back = pa.concat_tables([published.read(group, some) for group in published])
    assert read_back.to_pylist() == expected.select(some).to_pylist()


def test_what_answers_say_has_the_types_of_the_schema(tmp_path):
    path = tmp_path / "out.parquet"
    layout = layout_of(NAMES, {"value": SCHEMA})
    fenced, half = f"```json\n{SAID}\n```", '{"parties": ["\\ud800"]}'
    texts = [SAID, fenced, '{"amount": "3"}', "[]", "3 EUR", None, half]
    answers = [
        answer(row, name, index, answer=text)
        for row, text in enumerate(texts)
        for index, name in enumerate(NAMES)
    ]
    written(path, layout, answers)
    table = pq.read_table(path)
    assert (
        table.schema.field("value")
        .type.field("value")
        .type.equals(
            pa.struct(
                [("amount", pa.float64()), ("parties", pa.list_(pa.field("element", pa.large_string())))]
            )
        )
    )
    nothing = {"amount": None, "parties": None}
    assert [row["value"]["value"] for row in table.to_pylist()] == [
        *(VALUE, VALUE, nothing, None, None, None, nothing | {"parties": ["\ufffd"]})
    ]
    assert table.schema.field("law").type.get_field_index("value") == -1


def test_without_questions_the_values_are_a_column_behind_the_answers_own(tmp_path):
    path, layout = tmp_path / "out.arrow", layout_of((), {"": SCHEMA})
    copied = pa.RecordBatch.from_pylist([{"year": 7}], YEAR)
    written(path, layout, [answer(0, None, None, answer=SAID, passthrough=copied)], YEAR)
    (row,) = read(path)
    assert list(row)[-2:] == ["value", "year"]
    assert (row["value"], row["year"]) == (VALUE, 7)


@pytest.mark.parametrize("suffix", EXTENSIONS)
@pytest.mark.parametrize("dies", [True, False])
def test_a_resumed_run_answers_the_questions_that_have_no_answer(tmp_path, suffix, dies):
    path, layout = tmp_path / f"out{suffix}", layout_of(NAMES, {})
    run(path, layout, range(3), dies=dies, failing={"d1#value"})
    assert run(path, layout, range(4)) == ["d3#law", "d3#value"]
    assert run(path, layout, range(4), retry_errors=True) == ["d1#value"]
    rows = read(path)
    assert [(row["id"], row["status"]) for row in rows] == [(f"d{n}", "ok") for n in range(4)]
    content = path.read_bytes()
    assert run(path, layout, range(4)) == []
    assert path.read_bytes() == content


@pytest.mark.parametrize("suffix", EXTENSIONS)
@pytest.mark.parametrize("dies", [True, False])
def test_a_question_that_comes_is_answered_and_the_others_stay(tmp_path, suffix, dies):
    path = tmp_path / f"out{suffix}"
    run(path, layout_of(NAMES, {}), range(2), dies=dies)
    more = layout_of(("new", "value", "law"), {})
    assert run(path, more, range(2), dies=dies) == ["d0#new", "d1#new"]
    assert run(path, more, range(2)) == []
    rows = read(path)
    assert [list(row) for row in rows] == [["id", "row", "status", "new", "value", "law"]] * 2
    assert [[row[name]["answer"] for name in more.questions] for row in rows] == [
        [f"{name} of {n}: text" for name in more.questions] for n in range(2)
    ]


@pytest.mark.parametrize("dies", [True, False])
def test_a_question_must_not_go(tmp_path, dies):
    path = tmp_path / "out.parquet"
    run(path, layout_of(NAMES, {}), range(2), dies=dies)
    told = "out.parquet answers the question 'value', which --questions asks no more: put it back"
    with pytest.raises(ConfigError, match=told):
        run(path, layout_of(("law",), {}), range(2))
    with pytest.raises(ConfigError, match="begun with other settings: questions"):
        run(path, layout_of((), {}), range(2))


def test_a_changed_question_is_answered_anew(tmp_path):
    path, layout = tmp_path / "out.parquet", layout_of(NAMES, {})
    run(path, layout, range(2))
    assert run(path, layout, range(2), text="other") == ["d0#law", "d0#value", "d1#law", "d1#value"]
    assert {row["law"]["answer"] for row in read(path)} == {"law of 0: other", "law of 1: other"}


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_documents_that_leave_come_back_with_all_their_answers(tmp_path, suffix):
    path, layout = tmp_path / f"out{suffix}", layout_of(NAMES, {})
    run(path, layout, range(4), pack=1)
    run(path, layout, [0, 2])
    assert [row["id"] for row in read(path)] == ["d0", "d2"]
    assert run(path, layout, range(4)) == []
    assert [row["id"] for row in read(path)] == ["d0", "d1", "d2", "d3"]


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_typed_values_come_and_go_without_new_answers(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    plain, typed = layout_of(NAMES, {}), layout_of(NAMES, {"law": SCHEMA})
    run(path, plain, range(2))
    for layout in (typed, plain):
        assert run(path, layout, range(2)) == []
        assert ["value" in row["law"] for row in read(path)] == [layout is typed] * 2


@pytest.mark.parametrize("suffix", EXTENSIONS)
@pytest.mark.parametrize("questions", [NAMES, ()])
def test_such_an_output_is_known_as_ours(tmp_path, suffix, questions):
    path = tmp_path / f"out{suffix}"
    layout = layout_of(questions, {"law" if questions else "": SCHEMA})
    run(path, layout, range(2))
    assert may_be_replaced(path)
    schema = read_sidecar(path) if suffix == ".jsonl" else layout.file_schema(schema_of(layout))
    assert is_own_table(schema)
    renamed = pa.schema([schema.field("id").with_name("key"), *list(schema)[1:]], metadata=schema.metadata)
    assert not is_own_table(renamed)


def test_answers_wait_for_those_of_the_same_document():
    together = Together(2)
    answers = {(row, name): answer(row, name, NAMES.index(name)) for row in range(2) for name in NAMES}
    assert together.take([answers[0, "value"], answers[1, "law"]]) == []
    assert together.take([answers[0, "law"]]) == [[answers[0, "law"], answers[0, "value"]]]
    assert together.take([answers[1, "value"]]) == [[answers[1, "law"], answers[1, "value"]]]
    assert Together(1).take(answers.values()) == [[each] for each in answers.values()]


def test_two_documents_of_one_number_are_two_rows(tmp_path):
    """Where rows of a file cannot be read any more, what stands for them has the number of one that stays."""
    path, layout = tmp_path / "out.parquet", layout_of(NAMES, {})
    rows = [answer(3, name, index) for index, name in enumerate(NAMES)]
    faults = [answer(3, name, index) for index, name in enumerate(NAMES)]
    for fault, name in zip(faults, NAMES, strict=True):
        fault.id = f"other#{name}"
    written(path, layout, [rows[0], faults[0], rows[1], faults[1], answer(4, "value", 1)])
    made = read(path)
    assert [row["id"] for row in made] == ["d3", "other", "d4"]
    assert made[2]["law"] is None
