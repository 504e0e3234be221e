"""`-` as OUTPUT: answers as JSON lines on standard output, and nothing else there."""

from __future__ import annotations

import datetime
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from journal_runs import read

ASKED = ["--question", "what?", "--max-new-tokens", "2"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    texts = ["one fish", "", "two fish", "red fish"]
    lines = [{"id": f"r{n % 3}", "text": text, "answer": n} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def streamed(call, capfd):
    """The rows that a run prints, and what it says."""

    def streamed(*words, code=0):
        capfd.readouterr()
        assert call(*words) == code
        printed = capfd.readouterr()
        return [json.loads(line) for line in printed.out.splitlines()], printed.err

    return streamed


def test_the_lines_are_those_of_a_file(call, streamed, source, tmp_path):
    flags = [*ASKED, "--id-column", "id", "--columns", "answer,error_message"]
    rows, told = streamed(source, "-", *flags)
    assert call(source, tmp_path / "out.jsonl", *flags) == 0
    assert sorted(rows, key=lambda row: row["row"]) == read(tmp_path / "out.jsonl")
    assert {row["error_type"] for row in rows} == {None, "empty_document", "duplicate_id"}
    assert rows[0]["answer_input"] == rows[0]["row"]
    assert "dense: -" in told


def test_nothing_is_left_on_disk(streamed, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    streamed(source, "-", *ASKED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_values_of_tables_are_written_as_in_a_file(call, streamed, tmp_path):
    source = tmp_path / "in.parquet"
    day = datetime.date(2026, 11, 27)
    kinds = pa.array(["a", "b"]).dictionary_encode()
    pq.write_table(pa.table({"text": ["one fish", "two fish"], "day": [day] * 2, "kind": kinds}), source)
    rows, _ = streamed(source, "-", *ASKED, "--columns", "answer")
    assert call(source, tmp_path / "out.jsonl", *ASKED, "--columns", "answer") == 0
    assert rows == read(tmp_path / "out.jsonl")
    assert [(row["day"], row["kind"]) for row in rows] == [("2026-11-27", "a"), ("2026-11-27", "b")]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--resume"], "--resume needs a file as OUTPUT: standard output (-) keeps nothing"),
        (["--overwrite"], "--overwrite needs a file as OUTPUT: standard output (-) keeps nothing"),
        (["--json"], "--json prints the summary on stdout, where answers are with - as OUTPUT"),
        (["--save-selection"], "--save-selection writes bytes, which - cannot hold: use .parquet"),
    ],
)
def test_what_is_refused(refusal, source, flags, told):
    assert refusal(source, "-", *ASKED, *flags) == told


def test_a_dry_run_tells_it_and_prints_no_answer(call, source, capfd):
    assert call(source, "-", *ASKED, "--dry-run") == 0
    assert "output: standard output, as JSON lines\n" in capfd.readouterr().out
    assert call(source, "-", *ASKED, "--dry-run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["output"] == "-"


def test_exit_codes_are_those_of_a_file(streamed, source, tmp_path):
    rows, told = streamed(source, "-", *ASKED, "--fail-on-error", "--quiet", code=3)
    assert len(rows) == 4
    assert told.startswith("marsinfer: error: 1 of 4 rows failed, which --fail-on-error does not allow; ")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    rows, told = streamed(empty, "-", *ASKED, "--quiet", code=3)
    assert [row["status"] for row in rows] == ["error"]
    assert told.startswith("marsinfer: error: none of 1 row was answered; empty_document")
    rows, told = streamed(source, "-", *ASKED, "--quiet", "--max-errors", "0", code=4)
    assert told.endswith("; rows that ended before are written, and nothing is kept to resume\n")
    assert len(rows) >= 1
    _, told = streamed(source, "-", *ASKED, "--quiet", "--deadline", "2020-01-01T00:00", code=9)
    assert told.endswith("; rows that ended before are written, and nothing is kept to resume\n")


def test_a_reader_that_has_left_ends_the_run_without_a_word(call, source, monkeypatch, capfd):
    read_end, write_end = os.pipe()
    os.close(read_end)
    monkeypatch.setattr("pipeline.outputs.streamed.STDOUT", write_end)
    assert call(source, "-", *ASKED, "--quiet") == 1
    assert capfd.readouterr().err == ""
    os.close(write_end)


def test_a_full_disk(call, source, monkeypatch, capfd):
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr("pipeline.outputs.streamed.STDOUT", full)
    assert call(source, "-", *ASKED, "--quiet") == 8
    assert capfd.readouterr().err == (
        "marsinfer: error: standard output cannot be written: No space left on device\n"
    )
    os.close(full)


def test_what_others_print_comes_not_between_the_answers(streamed, source, monkeypatch):
    from pipeline.engines.local import LocalEngine

    advance = LocalEngine.advance

    def chatty(self):
        sys.stdout.write("by the way\n")
        return advance(self)

    monkeypatch.setattr(LocalEngine, "advance", chatty)
    rows, told = streamed(source, "-", *ASKED)
    assert len(rows) == 4
    assert "by the way" in told
