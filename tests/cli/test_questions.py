"""A list of questions a row: an answer to each, through `marsinfer batch`."""

from __future__ import annotations

import json

import pytest
from row_files import read, write

from marsinfer_cli.app import run

pytestmark = pytest.mark.slow

FLAGS = ["--questions-column", "asks", "--id-column", "id", "--max-new-tokens", "3"]
ROWS = [
    {"id": "a", "text": "one fish two fish " * 9, "asks": ["how many?", "which?", "why so?"], "year": 1960},
    {"id": "b", "text": "red fish " * 12, "asks": ["what colour?"], "year": 1961},
    {"id": "c", "text": "one fish two fish " * 9, "asks": ["blue?", "old?"], "year": None},
]
EXPECTED = [("a#0", 0, 0), ("a#1", 0, 1), ("a#2", 0, 2), ("b#0", 1, 0), ("c#0", 2, 0), ("c#1", 2, 1)]


def places(rows):
    return [(row["id"], row["row"], row["question_index"]) for row in rows]


@pytest.mark.parametrize("method", [("dense",), ("marsinfer", "--set", "start_layer=1", "--group", "any")])
@pytest.mark.parametrize(("source", "out"), [("in.jsonl", "out.parquet"), ("in.parquet", "out.jsonl")])
def test_each_question_has_a_row_that_is_answered_as_if_alone(call, tmp_path, method, source, out):
    given, out = write(tmp_path / source, ROWS), tmp_path / out
    assert call(given, out, *FLAGS, "--method", *method) == 0
    rows = read(out)
    assert places(rows) == EXPECTED
    assert [row["group_rows"] for row in rows] == [5, 5, 5, None, 5, 5]
    assert {row["method"] for row in rows if row["group_rows"]} == {"dense"}
    copied = [json.loads(row["extra"])["year"] if "extra" in row else row["year"] for row in rows]
    assert copied == [1960] * 3 + [1961] + [None] * 2
    single = [{"id": row["id"], "text": row["text"], "ask": ask} for row in ROWS for ask in row["asks"]]
    for one in single:
        one["id"] += f"/{one['ask']}"
    alone = tmp_path / "alone.parquet"
    flags = ["--question-column", "ask", *FLAGS[2:], "--method", "dense", "--group", "off"]
    assert call(write(tmp_path / "single.jsonl", single), alone, *flags) == 0
    expected = read(alone)
    assert [row["question_index"] for row in expected] == [None] * 6
    assert [row["answer"] for row in rows] == [row["answer"] for row in expected]
    assert [row["prompt_tokens"] for row in rows] == [row["prompt_tokens"] for row in expected]


@pytest.mark.parametrize(
    ("asks", "errors"),
    [
        ([], [("a", "missing_question", "in.jsonl line 1: 'asks' is an empty list")]),
        (None, [("a", "missing_question", "in.jsonl line 1: 'asks' is null")]),
        (
            "how many?",
            [
                (
                    "a",
                    "bad_question_type",
                    "in.jsonl line 1: 'asks' is a string, not a list; "
                    "--question-column takes one question a row",
                )
            ],
        ),
        (
            ["how many?", 5, "  ", None, "half \ud800"],
            [
                (
                    "a#1",
                    "bad_question_type",
                    "in.jsonl line 1: question 1 of 'asks' is a number, not a string",
                ),
                ("a#2", "missing_question", "in.jsonl line 1: question 2 of 'asks' is empty"),
                ("a#3", "missing_question", "in.jsonl line 1: question 3 of 'asks' is null"),
                (
                    "a#4",
                    "bad_utf8",
                    "in.jsonl line 1: question 4 of 'asks' has half of a surrogate pair at character 5, "
                    "which no UTF-8 can hold",
                ),
            ],
        ),
    ],
)
def test_questions_that_cannot_be_asked_are_error_rows(call, tmp_path, asks, errors):
    given = write(tmp_path / "in.jsonl", [{"id": "a", "text": "fish", "asks": asks}, ROWS[1]])
    assert call(given, tmp_path / "out.parquet", *FLAGS) == 0
    rows = read(tmp_path / "out.parquet")
    told = [(row["id"], row["error_type"], row["error_message"]) for row in rows if row["status"] == "error"]
    assert told == errors
    assert len(rows) == (len(asks) if isinstance(asks, list) and asks else 1) + 1


def test_a_row_without_the_column_says_what_it_has(call, tmp_path):
    given = write(tmp_path / "in.jsonl", [{"id": "a", "text": "fish"}, {**ROWS[0], "id": "b"}])
    assert call(given, tmp_path / "out.parquet", *FLAGS) == 0
    row = read(tmp_path / "out.parquet")[0]
    assert row["error_message"] == (
        "in.jsonl line 1: there is no 'asks'; it has: id, text (--questions-column names the questions)"
    )


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("text", "in.parquet: column 'text' is string, not a list of strings"),
        ("years", "in.parquet: column 'years' is list<element: int64>, not a list of strings"),
        ("gone", "in.parquet has no column 'gone'; it has: id, text, years"),
    ],
)
def test_a_table_whose_column_holds_no_questions_is_refused(refusal, tmp_path, column, message):
    given = write(tmp_path / "in.parquet", [{"id": "a", "text": "fish", "years": [1, 2]}])
    flags = ["--questions-column", column, "--text-column", "id"]
    told = refusal(given, tmp_path / "out.parquet", *flags)
    assert told == f"{message} (--questions-column names the list of questions)"


def test_one_source_of_questions_is_enough(refusal, fish, tmp_path):
    flags = ["--questions-column", "asks", "--question-column", "ask"]
    assert refusal(fish, tmp_path / "out.parquet", *flags) == (
        "--question-column and --questions-column exclude each other"
    )


def test_text_documents_have_no_questions(refusal, tmp_path):
    (tmp_path / "a.txt").write_text("fish")
    assert refusal(tmp_path / "a.txt", tmp_path / "out.parquet", "--questions-column", "asks") == (
        "a.txt is a text document without columns; give one question for all documents"
    )


def test_ids_stay_unique_and_duplicates_are_told(call, tmp_path):
    given = write(tmp_path / "in.jsonl", [ROWS[1], {**ROWS[2], "id": "b", "asks": ["x?", "what colour?"]}])
    assert call(given, tmp_path / "out.parquet", *FLAGS) == 0
    rows = read(tmp_path / "out.parquet")
    assert places(rows) == [("b#0", 0, 0), ("b#0", 1, 0), ("b#1", 1, 1)]
    assert [row["error_type"] for row in rows] == [None, "duplicate_id", "duplicate_id"]
    assert rows[1]["error_message"] == (
        "in.jsonl line 2 question 0: has the id 'b' of row 0; ids must be unique"
    )
    assert call(given, tmp_path / "named.parquet", *FLAGS[:2], *FLAGS[4:]) == 0
    assert places(read(tmp_path / "named.parquet")) == [("b#0", 0, 0), ("b#1#0", 1, 0), ("b#1#1", 1, 1)]


@pytest.mark.parametrize("named", [True, False], ids=["named", "renamed"])
def test_a_row_that_fails_may_have_the_id_of_a_question(call, tmp_path, named):
    whole = {"id": "a", "text": "one fish", "asks": ["how many?", "which?"]}
    rows = [{**whole, "id": "a#1", "text": None}, whole] if named else [whole, {**whole, "asks": "which?"}]
    flags = [*FLAGS, "--method", "dense"] if named else [*FLAGS[:2], *FLAGS[4:], "--method", "dense"]
    given, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet"
    assert call(given, out, *flags) == 0
    expected = [("a#1", "missing_text"), ("a#0", None), ("a#1", None)]
    if not named:
        expected = [("a#0", None), ("a#1", None), ("a#1", "bad_question_type")]
    once = read(out)
    assert [(row["id"], row["error_type"]) for row in once] == expected
    assert call(given, out, *flags, "--resume", "--retry-errors") == 0
    assert read(out) == once
    shards = [tmp_path / f"{n}.parquet" for n in (1, 2)]
    for number, shard in enumerate(shards, start=1):
        assert call(given, shard, *flags, "--shard", f"{number}/2") in (0, 3)  # 3: nothing in it is answered
    assert run(["merge", str(out), *map(str, shards), "--overwrite"]) == 0
    assert [(row["id"], row["error_type"]) for row in read(out)] == expected


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_resume_answers_new_questions_alone(call, tmp_path, name, capfd):
    out = tmp_path / name
    given = write(tmp_path / "in.jsonl", ROWS)
    assert call(given, out, *FLAGS) == 0
    before = read(out)
    changed = [{**ROWS[0], "asks": ["how many?", "which?", "how old?", "new?"]}, *ROWS[1:]]
    write(given, changed)
    capfd.readouterr()
    assert call(given, out, *FLAGS, "--resume", "--quiet") == 0
    assert "resuming: 6 rows are done" in capfd.readouterr().err
    rows = read(out)
    assert places(rows) == [*EXPECTED[:3], ("a#3", 0, 3), *EXPECTED[3:]]
    kept = {row["id"]: row for row in before if row["id"] != "a#2"}
    assert {row["id"]: row for row in rows if row["id"] in kept} == kept
    assert call(given, out, *FLAGS, "--resume", "--quiet") == 0
    assert "nothing new: every row was done" in capfd.readouterr().err


def test_the_summary_counts_questions(call, tmp_path, capfd):
    given = write(tmp_path / "in.jsonl", ROWS)
    assert call(given, tmp_path / "out.parquet", *FLAGS, "--json", "--method", "dense") == 0
    printed = capfd.readouterr()
    summary = json.loads(printed.out)
    assert (summary["documents"], summary["grouped_rows"]) == (6, 5)
    assert 0 < summary["shared_prefill_s"] < summary["prefill_s"]
    assert summary["ms_per_row"] > 0
    assert "rows that shared a document" in printed.err
    assert "its prefill, all together" in printed.err
    assert printed.err.count("rows about the same document are answered together (--group auto)") == 1


def test_a_limit_counts_rows_of_the_input(call, tmp_path):
    given = write(tmp_path / "in.parquet", ROWS)
    assert call(given, tmp_path / "out.parquet", *FLAGS, "--limit", "2") == 0
    assert places(read(tmp_path / "out.parquet")) == EXPECTED[:4]


def test_draws_differ_by_question_and_not_by_group(call, tmp_path):
    rows = [{**ROWS[0], "asks": ["how many?"] * 4}]
    given = write(tmp_path / "in.jsonl", rows)
    flags = [*FLAGS, "--temperature", "3", "--method", "dense"]
    answers = []
    for group in ("auto", "off"):
        out = tmp_path / f"{group}.parquet"
        assert call(given, out, *flags, "--group", group) == 0
        answers.append([row["answer"] for row in read(out)])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_a_dry_run_tells_what_is_answered_together(call, tmp_path, capfd):
    given = write(tmp_path / "in.jsonl", ROWS)
    assert call(given, tmp_path / "out.parquet", *FLAGS, "--dry-run") == 0
    printed = capfd.readouterr().out
    assert "rows: 6, of which 6 can be answered" in printed
    assert "answered together: 5 rows about 1 document\n" in printed
    assert call(given, tmp_path / "out.parquet", *FLAGS, "--dry-run", "--group", "off") == 0
    assert "answered together" not in capfd.readouterr().out
