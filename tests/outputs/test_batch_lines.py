"""Outputs in the form of OpenAI's Batch API: two files, which go on as one."""

from __future__ import annotations

import json
from collections import Counter
from itertools import count

import pyarrow as pa
import pytest
from journal_runs import NOTHING, SETTINGS, answer, ask, dying_after, numbered
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion

from pipeline.errors import ConfigError
from pipeline.outputs.answers import output_schema
from pipeline.outputs.batch_lines import output_of, with_response
from pipeline.outputs.journal import Journal
from pipeline.outputs.own import is_own_lines
from pipeline.outputs.own_columns import left_out
from pipeline.outputs.published import Published
from pipeline.outputs.sidecar import read_sidecar
from pipeline.outputs.writing import check_output
from pipeline.values.jsonvalues import KEYS

EXTRA = pa.schema([pa.field("extra", pa.large_string(), metadata=KEYS)])
ABOUT = {
    "settings_that_decide": SETTINGS,
    "requests": True,
    "model": "tiny",
    "started": "2026-11-27T04:00:00Z",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def errors(tmp_path):
    return tmp_path / "out.errors.jsonl"


def start(path, *, resume=True, passthrough=NOTHING, columns=None, about=ABOUT, **flags):
    schema = output_schema(passthrough, {"marsinfer": json.dumps(about)}, lacks=left_out(columns))
    return Journal(path, schema, about["settings_that_decide"], resume=resume, **flags)


def done(number, **values):
    values = {"finish_reason": "stop", "prompt_tokens": 9, "new_tokens": 3, **values}
    return answer(number, **values)


def failed(number, kind="unsupported", **values):
    told = {
        "status": "error",
        "error_type": kind,
        "error_message": f"row {number}: so\nit is",
        "answer": None,
    }
    return answer(number, **told, **values)


def work(journal, rows, *, fails=lambda row: False):
    """Answer the rows that are not done; returns which those were."""
    new = [row for row in rows if not ask(journal, row)]
    for first in range(0, len(new), 3):
        some = new[first : first + 3]
        journal.append([failed(row) if fails(row) else done(row) for row in some])
    return new


def finish(path, rows, *, fails=lambda row: False, **flags):
    with start(path, **flags) as journal:
        new = work(journal, rows, fails=fails)
        journal.publish()
    return new


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def held(path):
    """The rows of both files, by their ids; every one must be there once, in the order of the input."""
    both = [lines(path), lines(path.with_name("out.errors.jsonl"))]
    for found in both:
        assert [line["marsinfer"]["row"] for line in found] == sorted(
            line["marsinfer"]["row"] for line in found
        )
    assert {line["response"]["status_code"] for line in both[0]} <= {200}
    assert {line["response"]["status_code"] for line in both[1]} <= {400, 500}
    counts = Counter(line["custom_id"] for found in both for line in found)
    assert set(counts.values()) <= {1}
    return [sorted(line["marsinfer"]["row"] for line in found) for found in both]


def is_odd(row):
    return row % 2 == 1


def test_the_clients_types_take_what_is_written(path, errors):
    with start(path) as journal:
        journal.append([done(0, reasoning="I think"), done(1, finish_reason="length", answer="")])
        journal.append([failed(2), failed(3, "over_long"), failed(4, "out_of_memory")])
        journal.append([failed(5)])
        journal.publish()
    ok, bad = lines(path), lines(errors)
    completions = [ChatCompletion.model_validate(line["response"]["body"]) for line in ok]
    assert [each.choices[0].finish_reason for each in completions] == ["stop", "length"]
    assert [each.choices[0].message.content for each in completions] == ["answer to id 0: text", ""]
    assert [each.usage.total_tokens for each in completions] == [12, 12]
    assert {(each.model, each.created) for each in completions} == {("tiny", 1795752000)}
    assert ok[0]["response"]["body"]["choices"][0]["message"]["reasoning_content"] == "I think"
    told = [ErrorObject.model_validate(line["response"]["body"]["error"]) for line in bad]
    assert [(each.code, each.type) for each in told] == [
        ("unsupported", "invalid_request_error"),
        ("context_length_exceeded", "invalid_request_error"),
        ("out_of_memory", "server_error"),
        ("unsupported", "invalid_request_error"),
    ]
    assert [line["response"]["status_code"] for line in bad] == [400, 400, 500, 400]
    assert told[0].message == "row 2: so\nit is"
    every = ok + bad
    assert [line["custom_id"] for line in every] == [f"id {row}" for row in range(6)]
    assert all(list(line) == ["id", "custom_id", "response", "error", "marsinfer"] for line in every)
    assert len({line["id"] for line in every}) == 6


ADDRESSED = pa.schema([pa.field("url", pa.large_string())])


def test_a_prompt_has_a_text_completion(path):
    with start(path, passthrough=ADDRESSED) as journal:
        for number, url in enumerate(("/v1/completions", "/v1/chat/completions", None)):
            copied = pa.RecordBatch.from_pylist([{"url": url}], schema=ADDRESSED)
            ask(journal, number, passthrough=copied)
            journal.append([done(number, passthrough=copied, finish_reason="length")])
        journal.publish()
    first, *others = (line["response"]["body"] for line in lines(path))
    answer = Completion.model_validate(first)
    assert (answer.id[:5], answer.object, answer.usage.total_tokens) == ("cmpl-", "text_completion", 12)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("answer to id 0: text", "length")
    assert [ChatCompletion.model_validate(each).object for each in others] == ["chat.completion"] * 2
    published = Published(path, lines_schema=read_sidecar(path))
    table = pa.concat_tables(published.read(group) for group in published)
    assert table["answer"].to_pylist() == [f"answer to id {number}: text" for number in range(3)]
    assert table["url"].to_pylist() == ["/v1/completions", "/v1/chat/completions", None]


def test_a_run_that_goes_on_answers_no_row_twice(path, errors):
    assert finish(path, range(4), fails=is_odd) == [0, 1, 2, 3]
    before = [file.read_bytes() for file in (path, errors)]
    with start(path) as journal:
        assert work(journal, range(4)) == []
        assert not journal.publish()  # all is as it was
    assert [file.read_bytes() for file in (path, errors)] == before
    assert finish(path, range(9), fails=is_odd) == [4, 5, 6, 7, 8]
    assert held(path) == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


def test_failed_rows_that_run_again_change_files(path, errors):
    finish(path, range(6), fails=is_odd)
    assert finish(path, range(6), fails=lambda row: row == 5, retry_errors=True) == [1, 3, 5]
    assert held(path) == [[0, 1, 2, 3, 4], [5]]
    assert finish(path, range(6), retry_errors=True) == [5]
    assert held(path) == [[0, 1, 2, 3, 4, 5], []]
    assert not errors.exists()


def test_all_columns_come_back(path):
    with start(path, passthrough=EXTRA) as journal:
        for number in range(6):
            copied = pa.RecordBatch.from_pylist(
                [{"extra": f'{{"n": 1.10, "number": {number}}}'}], schema=EXTRA
            )
            ask(journal, number, passthrough=copied)
            make = failed if is_odd(number) else done
            values = {"passthrough": copied, "kept_tokens": [1, number], "parts": None}
            journal.append([make(number, **values)])
        journal.publish()
    published = Published(path, lines_schema=read_sidecar(path))
    rows = [row for group in published for row in published.read(group).to_pylist()]
    assert [row["row"] for row in rows] == [1, 3, 5, 0, 2, 4]
    for row in rows:
        make = failed if is_odd(row["row"]) else done
        expected = make(row["row"], kept_tokens=[1, row["row"]])
        assert {name: row[name] for name in row if name != "extra"} == {
            name: getattr(expected, name) for name in row if name != "extra"
        }
        assert row["extra"] == f'{{"n": 1.10, "number": {row["row"]}}}'


def test_chosen_columns_leave_what_a_response_takes(path, errors):
    for columns in (["answer"], ["stats"]):
        finish(path, range(3), fails=is_odd, columns=with_response(columns), resume=False, overwrite=True)
        (first, second), (bad,) = lines(path), lines(errors)
        body = ChatCompletion.model_validate(first["response"]["body"])
        assert body.choices[0].message.content == "answer to id 0: text"
        assert body.usage.total_tokens == 12
        assert "ttft_ms" not in second["marsinfer"]
        assert bad["response"]["body"]["error"]["message"] == "row 1: so\nit is"
        assert finish(path, range(3), columns=with_response(columns)) == []


def test_an_output_of_other_rows_has_no_second_file(path, errors):
    finish(path, range(3), fails=is_odd)
    finish(path, range(3), fails=is_odd, about={**ABOUT, "requests": False}, resume=False, overwrite=True)
    assert len(lines(path)) == 3
    assert not errors.exists()


JOBS = {
    "a first run": (None, {"fails": is_odd}),
    "a run that goes on": (is_odd, {"fails": is_odd}),
    "failed rows that run again": (is_odd, {"fails": lambda row: row == 3, "retry_errors": True}),
    "the last failed row": (is_odd, {"retry_errors": True}),
    "rows that leave": (is_odd, {"fails": is_odd, "first": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_dies_anywhere_loses_no_row_and_doubles_none(job, tmp_path):
    before, options = JOBS[job]
    first, fails = options.get("first", 0), options.get("fails", lambda row: False)
    flags = {"retry_errors": True} if "retry_errors" in options else {}
    rows = range(first, 7)
    for moment in count():
        path = tmp_path / str(moment) / "out.jsonl"
        path.parent.mkdir()
        if before is not None:
            finish(path, range(5), fails=before)
        with dying_after(moment) as death, start(path, **flags) as journal:
            work(journal, rows, fails=fails)
            journal.publish()
        finish(path, rows, fails=fails, **flags)
        ok = [row for row in rows if not fails(row)]
        assert held(path) == [ok, [row for row in rows if fails(row)]], moment
        names = {name.name for name in path.parent.iterdir() if not name.name.endswith(".dropped.parquet")}
        assert names - {"out.errors.jsonl"} == {"out.jsonl", "out.jsonl.run.json"}
        if not death.came:
            break
    assert moment > 10


@pytest.mark.parametrize("change", ["longer", "gone"])
def test_a_file_of_failed_rows_that_was_changed(path, errors, change):
    finish(path, range(4), fails=is_odd)
    if change == "gone":  # by whoever has seen to them
        errors.unlink()
        assert finish(path, range(4)) == [1, 3]
        assert held(path) == [[0, 1, 2, 3], []]
        return
    errors.write_text(errors.read_text() + "{}\n")
    with pytest.raises(ConfigError, match=r"out\.errors\.jsonl has .* bytes, and by out\.jsonl\.run\.json"):
        start(path)


def test_what_no_run_wrote_is_not_replaced(path, errors):
    errors.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"out\.errors\.jsonl, which is to hold the rows without an answer"):
        check_output(path, (), True, of_requests=True)
    errors.write_text("")
    check_output(path, (), True, of_requests=True)
    finish(path, range(4), fails=is_odd)
    check_output(path, (), True, of_requests=True)


def test_both_files_are_known_as_an_output(path, errors, tmp_path):
    finish(path, range(4), fails=is_odd)
    other = tmp_path / "other.errors.jsonl"
    other.write_text("{}\n")
    assert [is_own_lines(file, ()) for file in (path, errors, other)] == [True, True, False]
    finish(path, range(4), retry_errors=True)
    errors.write_text("{}\n")  # of whoever
    assert [is_own_lines(file, ()) for file in (path, errors)] == [True, False]
    assert output_of("a.b.errors.jsonl") == "a.b.jsonl"
    assert [output_of(name) for name in ("a.errors.parquet", "errors.jsonl", "a.jsonl")] == [None, None, None]


def test_all_rows_may_have_failed(path, errors):
    assert finish(path, range(3), fails=lambda row: True) == [0, 1, 2]
    assert (path.read_bytes(), len(lines(errors))) == (b"", 3)
    assert finish(path, range(3)) == []
    assert numbered(3) == [(line["marsinfer"]["row"], line["custom_id"]) for line in lines(errors)]
