"""`marsinfer batch IN OUT` without more: columns, question, ids and method are found."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from journal_runs import read
from row_files import write

from marsinfer_cli.app import run

TINY = ["--model", "random:tiny", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "2"]
ROWS = [
    {"id": 7, "text": "one fish two fish", "question": "How many?", "year": 1960},
    {"id": 7, "text": "red fish", "question": "What colour?", "year": 1961},
    {"id": None, "text": "blue fish", "question": "And this?", "year": 1962},
]


def batch(*words):
    return run(["batch", *map(str, words), *TINY, "--quiet"])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_bare_command_asks_the_questions_that_there_are(tmp_path, kind, capfd):
    given, out = write(tmp_path / f"in.{kind}", ROWS), tmp_path / f"out.{kind}"
    assert batch(given, out) == 0
    rows = read(out)
    default = "in.jsonl:2" if kind == "jsonl" else "in.parquet:2"
    assert [row["id"] for row in rows] == ["7", "7#1", default]
    assert [row["question"] for row in rows] == [row["question"] for row in ROWS]
    assert [row["method"] for row in rows] == ["dense"] * 3
    assert "--method auto: dense" in capfd.readouterr().err
    content = out.read_bytes()
    assert batch(given, out, "--resume") == 0
    assert "nothing new: every row was done" in capfd.readouterr().err
    assert out.read_bytes() == content


def test_without_a_question_it_summarises_and_goes_on_so(tmp_path, capfd):
    rows = [{"body": row["text"]} for row in ROWS]
    given, out = write(tmp_path / "in.parquet", rows[:2]), tmp_path / "out.parquet"
    assert batch(given, out, "--keep-columns=") == 0
    told = capfd.readouterr().err
    assert "the document is the column 'body'" in told
    assert "a short summary is asked for" in told
    # what was decided stays, whatever the columns of tonight say, but no question is passed over in silence
    write(given, [{**row, "question": "?", "id": n} for n, row in enumerate(rows)])
    assert batch(given, out, "--keep-columns=", "--resume") == 2
    assert "in.parquet has a column 'question', which the first file has not" in capfd.readouterr().err
    assert batch(given, out, "--keep-columns=", "--resume", "--summarise") == 0
    assert batch(given, out, "--keep-columns=", "--resume") == 0  # as was said
    first, second, third = read(out)
    assert first["question"] == second["question"] == third["question"]
    assert [row["id"] for row in (first, third)] == ["in.parquet:0", "in.parquet:2"]
    assert batch(given, out, "--keep-columns=", "--resume", "--question", "Why?") == 2
    told = capfd.readouterr().err
    assert 'columns.question was null and is now "Why?"' in told
    config = json.loads(pq.read_schema(out).metadata[b"marsinfer"])["config"]
    assert (config["method"], config["text_column"], config["summarise"]) == ("dense", "body", "short")


@pytest.mark.parametrize(
    ("words", "question"),
    [
        (["--summarise"], "in a few sentences"),
        (["--summarise=page"], "on one page"),
        (["--summarise", "detailed"], "section by section"),
    ],
)
def test_a_summary_may_be_asked_for_with_or_without_its_kind(tmp_path, words, question):
    given, out = write(tmp_path / "in.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    assert batch(*words, given, out) == 0
    assert question in read(out)[0]["question"]


def test_a_question_that_the_first_row_has_not_is_no_summary(tmp_path):
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(given, [{"text": "red fish"}, *ROWS[:1]])
    assert batch(given, out) == 0
    assert [(row["status"], row["error_type"]) for row in read(out)] == [
        ("ok", None),
        ("error", "unasked_question"),
    ]
    write(given, [{"text": "red fish"}, {"text": "blue fish"}, *ROWS[:1]])
    assert batch(given, out, "--resume") == 0
    assert [row["error_type"] for row in read(out)] == [None, None, "unasked_question"]
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "a.parquet", [{"text": "red fish"}])
    write(tmp_path / "two" / "b.parquet", ROWS[:1])
    assert batch(tmp_path / "two", tmp_path / "o.parquet") == 2


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrows", "jsonl"])
def test_an_output_without_rows_decides_nothing(tmp_path, kind):
    given, out = tmp_path / "in.jsonl", tmp_path / f"out.{kind}"
    given.write_text("")
    assert batch(given, out, "--resume") == 0
    content = out.read_bytes()
    assert batch(given, out, "--resume") == 0
    assert out.read_bytes() == content
    write(given, ROWS)
    assert batch(given, out, "--resume", "--dry-run") == 0
    assert batch(given, out, "--resume") == 0
    assert [row["question"] for row in read(out)] == [row["question"] for row in ROWS]
    assert batch(given, out, "--resume", "--question", "Why?") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["", "out.parquet"], "INPUT is empty; is a variable of the shell unset?"),
        (["in.jsonl", ""], "OUTPUT is empty"),
        (["in.jsonl", "out.parquet", "--id-column="], "--id-column is empty"),
        (["in.jsonl", "out.parquet", "--question", " "], "--question is empty"),
        (["in.jsonl", "out.parquet", "--limit", "9" * 30], "--limit a number of many digits: must be a"),
        (["in.jsonl", "out.parquet", "--pack-tokens", "9" * 5000], "--pack-tokens 99999999999999999999...: "),
        (["in.jsonl", "out.parquet", "--kv-memory", "9" * 400 + "GiB"], "--kv-memory inf: must be a"),
        (["in.jsonl", "out.parquet", "--row-timeout", "inf"], "--row-timeout inf: must be a number"),
        (["in.jsonl", "out.parquet", "--shard", "1/" + "9" * 30], "--shard 99999999999999999999...: must"),
        (["in.jsonl", "out.parquet", "--max-errors", "9" * 400], "--max-errors inf: must be a number"),
    ],
)
def test_what_is_empty_or_too_large_is_told_in_one_line(tmp_path, monkeypatch, capfd, words, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", ROWS[:1])
    assert run(["batch", *words]) == 2
    told = capfd.readouterr().err
    assert told.startswith(f"marsinfer: error: {says}")
    assert len(told.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_interrupted_measurement_says_nothing_of_rows(monkeypatch, capfd):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("marsinfer_cli.bench.parse_variants", interrupted)
    assert run(["bench", "ttft", "--model", "random:tiny"]) == 130
    assert capfd.readouterr().err == "marsinfer: error: interrupted; nothing of this run is kept\n"
