"""--questions: a file of questions, each asked about every document, whose row has a struct for each."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import read, write

import pipeline
from marsinfer_cli.app import run

pytestmark = pytest.mark.slow

ROWS = [
    {"id": "a", "text": "one fish two fish " * 9, "year": 1960},
    {"id": "b", "text": "red fish " * 12, "year": 1961},
    {"id": "c", "text": "  ", "year": 1962},
]
QUESTIONS = [
    {"name": "many", "question": "how many?"},
    {"name": "colour", "question": "what colour?", "max_new_tokens": 5},
]
NEW = {"name": "new", "question": "anything new?"}
FLAGS = ["--max-new-tokens", "3", "--quiet"]
TIMES = {"queue_ms", "tokenize_ms", "prefill_ms", "ttft_ms", "decode_ms", "shared_ms"}


@pytest.fixture
def asked(tmp_path):
    def asked(*questions):
        path = tmp_path / "q.json"
        path.write_text(json.dumps(questions or QUESTIONS))
        return "--questions", path

    return asked


@pytest.fixture
def given(tmp_path):
    return write(tmp_path / "in.jsonl", ROWS)


def answers(rows):
    return {
        row["id"]: {name: row[name]["answer"] for name in row if isinstance(row[name], dict)} for row in rows
    }


def test_a_schema_is_the_form_of_a_questions_answers(call, tmp_path, asked, given):
    """Unless they are to be held against it when they are there; a question beside it has none."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    flags = (*asked(QUESTIONS[0], {**QUESTIONS[1], "max_new_tokens": 12, "schema": schema}), *FLAGS)
    assert call(given, tmp_path / "out.parquet", *flags, "--expand") == 0
    assert call(given, tmp_path / "plain.parquet", *asked(), *FLAGS) == 0
    for row, plain in zip(read(tmp_path / "out.parquet"), read(tmp_path / "plain.parquet"), strict=True):
        assert row["many"]["answer"] == plain["many"]["answer"]
        if row["status"] == "ok":
            assert row["colour"]["value"] == json.loads(row["colour"]["answer"])
            assert row["colour"]["value"]["n"] in (1, 2)
            assert (row["colour"]["valid"], row["colour"]["tries"]) == (True, 1)
            assert row["many"]["valid"] is None
    flags = (*asked({**QUESTIONS[1], "schema": schema}), *FLAGS)
    assert call(given, tmp_path / "held.parquet", *flags, "--retries", "1") == 0
    assert [row["colour"]["tries"] for row in read(tmp_path / "held.parquet")] == [2, 2, None]


def test_a_schema_that_no_answer_can_be_held_to_is_refused(refusal, tmp_path, asked, given):
    unknown = {**QUESTIONS[1], "schema": {"type": "array", "uniqueItems": True}}
    told = refusal(given, tmp_path / "none.parquet", *asked(unknown), *FLAGS)
    assert told.startswith("--questions ")
    assert "the schema of 'colour' cannot be used: " in told


@pytest.mark.parametrize(("source", "out"), [("in.jsonl", "out.parquet"), ("in.parquet", "out.jsonl")])
@pytest.mark.parametrize("group", ["auto", "off"])
def test_each_question_is_answered_as_if_alone(call, tmp_path, asked, source, out, group):
    given, out = write(tmp_path / source, ROWS), tmp_path / out
    assert call(given, out, *asked(), *FLAGS, "--group", group) == 0
    rows = read(out)
    assert [(row["id"], row["row"], row["status"]) for row in rows] == [
        *(("a", 0, "ok"), ("b", 1, "ok"), ("c", 2, "error"))
    ]
    assert list(rows[0])[:5] == ["id", "row", "status", "many", "colour"]
    copied = [json.loads(row["extra"])["year"] if "extra" in row else row["year"] for row in rows]
    assert copied == [1960, 1961, 1962]
    for name, question, tokens in (("many", "how many?", 3), ("colour", "what colour?", 5)):
        alone = tmp_path / f"{name}.parquet"
        flags = ["--question", question, "--max-new-tokens", tokens, "--group", "off", "--quiet"]
        assert call(given, alone, *flags) == 0
        for row, single in zip(rows, read(alone), strict=True):
            same = ("status", "answer", "error_type", "prompt_tokens", "new_tokens", "finish_reason")
            assert [row[name][column] for column in same] == [single[column] for column in same]
            assert row[name]["question"] == question
        assert rows[0][name]["new_tokens"] == tokens
    assert rows[0]["many"]["group_rows"] == (2 if group == "auto" else None)
    assert rows[2]["colour"][
        "error_message"
    ] == f"{source} {'line 3' if 'jsonl' in source else 'row 2'}: " + ("'text' is empty")


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_resume_answers_a_new_question_alone(call, tmp_path, asked, given, name, capfd):
    out = tmp_path / name
    assert call(given, out, *asked(), *FLAGS) == 0
    before = read(out)
    capfd.readouterr()
    assert call(given, out, *asked(NEW, *QUESTIONS), *FLAGS, "--resume", "--json") == 0
    printed = capfd.readouterr()
    assert "resuming: 6 rows are done" in printed.err
    assert json.loads(printed.out)["documents"] == 3
    rows = read(out)
    assert [list(row)[3:6] for row in rows] == [["new", "many", "colour"]] * 3
    assert [{name: row[name] for name in row if name != "new"} for row in rows] == before
    assert [row["new"]["status"] for row in rows] == ["ok", "ok", "error"]
    assert call(given, out, *asked(NEW, *QUESTIONS), *FLAGS, "--resume") == 0
    assert "nothing new: every row was done" in capfd.readouterr().err


def test_resume_answers_a_changed_question_alone(call, tmp_path, asked, given):
    out = tmp_path / "out.parquet"
    assert call(given, out, *asked(), *FLAGS) == 0
    before = read(out)
    changed = {**QUESTIONS[1], "question": "which colour?", "max_new_tokens": 2}
    assert call(given, out, *asked(QUESTIONS[0], changed), *FLAGS, "--resume") == 0
    rows = read(out)
    assert [row["many"] for row in rows] == [row["many"] for row in before]
    assert [row["colour"]["new_tokens"] for row in rows] == [2, 2, None]
    told = {row["id"]: row["colour"]["question"] for row in read(out)}
    assert told == dict.fromkeys("abc", changed["question"])  # of the empty document too


def test_resume_needs_the_questions_of_before(call, refusal, tmp_path, asked, given, capfd):
    out = tmp_path / "out.parquet"
    assert call(given, out, *asked(), *FLAGS) == 0
    capfd.readouterr()
    assert refusal(given, out, *FLAGS, "--resume") == f"{out} was begun with --questions: give its FILE again"
    assert refusal(given, out, *asked(QUESTIONS[0]), *FLAGS, "--resume") == (
        f"{out} answers the question 'colour', which --questions asks no more: put it back; "
        "--overwrite starts over"
    )


def test_failed_questions_are_tried_again_alone(call, tmp_path, asked, given):
    out = tmp_path / "out.parquet"
    assert call(given, out, *asked(), *FLAGS, "--row-timeout", "1e-9") == 3
    assert {row["many"]["error_type"] for row in read(out)} == {"timeout", "empty_document"}
    assert call(given, out, *asked(), *FLAGS, "--resume", "--retry-errors") == 0
    assert [row["status"] for row in read(out)] == ["ok", "ok", "error"]


@pytest.mark.parametrize(
    ("questions", "flags", "told"),
    [
        (
            [{"name": "year", "question": "?"}],
            [],
            "the question 'year' has the name of a column that is copied",
        ),
        ([{"name": "row", "question": "?"}], [], "the name 'row' is that of a column beside the questions"),
        ([], ["--question", "what?"], "--question and --questions exclude each other"),
        ([], ["--summarise"], "--questions and --summarise exclude each other"),
        ([], ["--messages-column", "m"], "--messages-column and --questions exclude each other"),
        ([], ["--order", "completion"], "--questions and --order completion exclude each other"),
        (
            [],
            ["--expand"],
            "--expand needs a JSON schema: give --validate FILE or --json-schema, or one in --questions",
        ),
        ([], ["--retries", "2"], "--retries needs a JSON schema: give --validate FILE"),
        ([], ["--columns", "many"], "--columns 'many' is no column of answers"),
        ([], ["--columns", "valid"], "--columns 'valid': a JSON schema (--validate) adds it"),
    ],
)
@pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
def test_what_cannot_work_is_refused_in_a_line(refusal, tmp_path, asked, questions, flags, told, source):
    given = write(tmp_path / source, ROWS)
    assert told in refusal(given, tmp_path / "out.parquet", *asked(*questions), *flags)


def test_a_question_may_have_the_name_of_what_is_not_copied(call, tmp_path, asked, given):
    question = {"name": "year", "question": "which year?"}
    out = tmp_path / "out.parquet"
    assert call(given, out, *asked(question), *FLAGS, "--keep-columns", "") == 0
    assert list(read(out)[0]) == ["id", "row", "status", "year"]
    text = {"name": "text", "question": "which text?"}
    assert call(given, tmp_path / "text.parquet", *asked(text), *FLAGS) == 0
    assert list(read(tmp_path / "text.parquet")[0]) == ["id", "row", "status", "text", "extra"]


def test_a_later_key_with_the_name_of_a_question_is_renamed(call, tmp_path, asked):
    given = write(tmp_path / "in.jsonl", [ROWS[0], {**ROWS[1], "many": 7}])
    out = tmp_path / "out.jsonl"
    assert call(given, out, *asked(), *FLAGS) == 0
    row = read(out)[1]
    assert row["many"]["status"] == "ok"
    assert row["many_input"] == 7


def test_ids_that_come_again(call, tmp_path, asked):
    given = write(tmp_path / "in.jsonl", [ROWS[0], {**ROWS[1], "id": "a"}])
    out = tmp_path / "out.parquet"
    assert call(given, out, *asked(), *FLAGS) == 0
    assert [(row["id"], row["status"]) for row in read(out)] == [("a", "ok"), ("a#1", "ok")]
    assert call(given, out, *asked(*QUESTIONS, NEW), *FLAGS, "--resume") == 0
    assert [(row["id"], row["new"]["status"]) for row in read(out)] == [("a", "ok"), ("a#1", "ok")]
    named = tmp_path / "named.parquet"
    assert call(given, named, *asked(), *FLAGS, "--id-column", "id") == 0
    rows = read(named)
    assert [(row["id"], row["status"]) for row in rows] == [("a", "ok"), ("a", "error")]
    assert {rows[1][name]["error_type"] for name in ("many", "colour")} == {"duplicate_id"}


def test_standard_output_has_a_line_a_document(call, tmp_path, asked, given, capfd):
    out = tmp_path / "out.jsonl"
    assert call(given, out, *asked(), *FLAGS) == 0
    capfd.readouterr()
    assert call(given, "-", *asked(), *FLAGS) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert sorted(line["id"] for line in lines) == ["a", "b", "c"]
    assert answers(lines) == answers(read(out))


def test_columns_are_those_of_each_struct(call, tmp_path, asked, given):
    out = tmp_path / "out.parquet"
    assert call(given, out, *asked(), *FLAGS, "--columns", "answer,stats") == 0
    row = read(out)[0]
    assert list(row) == ["id", "row", "status", "many", "colour", "extra"]
    assert list(row["many"]) == [*("status", "answer", "valid", "tries", "error_type", "stats", "row_hash")]
    assert row["many"]["stats"]["new_tokens"] == 3


def test_shards_are_merged_and_reports_tell_of_answers(call, tmp_path, asked, given, capfd):
    shards = [tmp_path / f"{n}.parquet" for n in (1, 2)]
    for number, path in enumerate(shards, start=1):
        assert call(given, path, *asked(), *FLAGS, "--shard", f"{number}/2") == 0
    whole = tmp_path / "whole.parquet"
    assert call(given, whole, *asked(), *FLAGS) == 0
    for name in ("merged.jsonl", "merged.parquet"):
        assert run(["merge", str(tmp_path / name), *map(str, shards)]) == 0
        assert answers(read(tmp_path / name)) == answers(read(whole))
        capfd.readouterr()
        assert call(given, tmp_path / name, *asked(), *FLAGS, "--resume") == 0
        assert "nothing new" in capfd.readouterr().err
        assert run(["report", str(tmp_path / name), str(whole)]) == 0
        assert "c#many" in capfd.readouterr().out


def test_a_dry_run_counts_questions(call, tmp_path, asked, given, capfd):
    assert call(given, tmp_path / "out.parquet", *asked(), *FLAGS, "--dry-run") == 0
    printed = capfd.readouterr().out
    assert "rows: 6, of which 4 can be answered" in printed
    assert "answered together: 4 rows about 2 documents\n" in printed


def test_a_check_measures_each_question(tmp_path, asked, model_folder):
    given, result = write(tmp_path / "in.jsonl", ROWS[:2]), tmp_path / "result.json"
    flags = [
        "--model",
        model_folder,
        "--method",
        "marsinfer",
        "--set",
        "start_layer=1",
        "--max-new-tokens",
        "2",
    ]
    words = ["check", given, *asked(), *flags, "--max-drop", "100pt", "--out", result, "--quiet"]
    assert run(list(map(str, words))) in (0, 5, 6)
    rows = json.loads(result.read_text())["rows"]
    assert [row["id"] for row in rows] == ["a#many", "a#colour", "b#many", "b#colour"]


def test_draws_do_not_depend_on_other_questions(call, tmp_path, asked, given):
    flags = ["--temperature", "3", *FLAGS]
    outs = [tmp_path / f"{n}.parquet" for n in range(2)]
    for out, questions in zip(outs, (QUESTIONS, [NEW, *reversed(QUESTIONS)]), strict=True):
        assert call(given, out, *asked(*questions), *flags) == 0
    first, second = (answers(read(out)) for out in outs)
    assert [{**row, "new": second[id]["new"]} for id, row in first.items()] == list(second.values())


def test_rows_in_memory_come_as_documents(tmp_path, asked, model_folder):
    options = {"model": str(model_folder), "method": "dense", "questions": asked()[1], "max_new_tokens": 3}
    rows = list(pipeline.answer(ROWS, **options))
    assert [(row["id"], row["status"], row["year"]) for row in rows] == [
        *(("a", "ok", 1960), ("b", "ok", 1961), ("c", "error", 1962))
    ]
    table = pipeline.answer(ROWS, **options).table()
    of_table = pipeline.answer(pa.Table.from_pylist(ROWS), **options).table()
    assert table.column_names == of_table.column_names == ["id", "row", "status", "many", "colour", "year"]
    assert answers(table.to_pylist()) == answers(of_table.to_pylist()) == answers(rows)
    told = list(pipeline.answer([*ROWS, {"id": "d", "text": "fish", "many": 1}], **options))
    assert told[3]["many_input"] == 1


def test_an_output_is_no_input_of_its_folder(call, tmp_path, asked, given):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "in.parquet", ROWS)
    assert call(folder, folder / "out.parquet", *asked(), *FLAGS) == 0
    assert call(folder, folder / "out.parquet", *asked(), *FLAGS, "--overwrite") == 0
    assert pq.read_table(folder / "out.parquet").num_rows == 3
