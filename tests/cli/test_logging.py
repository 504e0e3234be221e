"""What `marsinfer batch` says while it runs: events, plain lines, and signs of life."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from marsinfer_cli import progress as module
from marsinfer_cli.app import run
from marsinfer_cli.progress import BatchProgress
from pipeline import run_batch
from pipeline.records import Answer
from pipeline.summary import Summary

ASK = ["--text-column", "body", "--question-column", "ask", "--max-new-tokens", "3"]


def expected(total, fraction_read):
    """The rows of an input, of which none was done before."""
    rows = SimpleNamespace(total=total, fraction_read=fraction_read, most=None)
    return rows, SimpleNamespace(passed_over=0, done_at_start=Counter())


def events(printed):
    return [json.loads(line) for line in printed.splitlines()]


def test_a_run_in_events(call, fish, tmp_path, capfd):
    flags = [*ASK, "--log-format", "json", "--method", "marsinfer", "--set", "start_layer=1"]
    assert call(fish, tmp_path / "out.parquet", *flags) == 0
    printed = capfd.readouterr()
    first, *between, last = events(printed.err)
    assert printed.out == ""
    assert (first["event"], first["config"]["text_column"]) == ("start", "body")
    assert first["time"].endswith("Z")
    *between, unchanged, cut = between
    assert unchanged["message"].startswith("marsinfer changed nothing on all 3 rows: they are too short")
    assert cut["message"].startswith("3 of 3 answers ended by length, ")
    assert {event["event"] for event in between} == {"progress"}
    counts = {"documents", "tokens", "errors", "expected_rows", "tokens_per_second", "seconds_left"}
    assert set(between[0]) >= {*counts, "seconds", "phase"}
    assert (last["event"], last["documents"], last["errors"]) == ("end", 3, 0)
    assert last["seconds"] > between[-1]["seconds"] - 0.06  # one clock, which is rounded there


def test_errors_are_events_too(capfd):
    assert run(["batch", "--no-such-flag", "--log-format", "json"]) == 2
    assert run(["batch", "a", "b", "--question", "q", "--log-format=json", "--order", "x"]) == 2
    usage, config = events(capfd.readouterr().err)
    assert (usage["event"], usage["exit_code"]) == ("error", 2)
    assert "--no-such-flag" in usage["message"]
    assert config["message"] == "--order 'x': choose from input, completion"


def test_an_interrupt_is_an_event(call, fish, tmp_path, monkeypatch, capfd):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.run.run_batch", interrupted)
    assert call(fish, tmp_path / "out.parquet", *ASK, "--log-format", "json", "--quiet") == 130
    (event,) = events(capfd.readouterr().err)
    assert (event["event"], event["exit_code"]) == ("error", 130)


def test_notes_are_events_even_when_quiet(capfd):
    with BatchProgress(quiet=True, as_json=True) as progress:
        progress.note("two\nlines")
        progress(Summary(method="dense", output="o"))
        progress.end(Summary(method="dense", output="o"))
    (event,) = events(capfd.readouterr().err)
    assert (event["event"], event["message"]) == ("note", "two\nlines")


@pytest.fixture
def fast_heart(monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)


def is_beating():
    return "heartbeat" in {thread.name for thread in threading.enumerate()}


def two_lines(capfd):
    """What is printed from now on, once it is two lines or more."""
    printed, deadline = "", time.monotonic() + 300
    while printed.count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        printed += capfd.readouterr().err
    return printed


def test_a_run_that_finishes_nothing_still_gives_signs_of_life(fast_heart, capfd):
    with BatchProgress(quiet=False):
        printed = two_lines(capfd)
    for line in (printed + capfd.readouterr().err).splitlines():
        assert re.fullmatch(r"marsinfer: still running after \d\.\d min; nothing has finished yet", line)
    assert not is_beating()


def test_signs_of_life_say_what_is_being_done(fast_heart, capfd):
    with BatchProgress(quiet=False) as progress:
        progress.phase("loading the model")
        printed = two_lines(capfd)
    last = (printed + capfd.readouterr().err).splitlines()[-1]
    assert re.fullmatch(r"marsinfer: still running after \d\.\d min; nothing .* yet: loading the model", last)


def test_the_phases_of_a_run(fish, tmp_path, model_folder):
    told = []
    options = {"text_column": "body", "question_column": "ask", "max_new_tokens": 1, "pack_tokens": 300}
    run_batch(fish, tmp_path / "o.parquet", model=str(model_folder), phase=told.append, **options)
    weights = told.pop(2)
    assert weights.startswith("loading the model: weights take 0.000")
    assert weights.endswith(" GB free on CPU")
    assert told == [
        "reading and tokenizing",
        "loading the model",
        "warming up",
        "prefilling 393 tokens",
        "decoding",
        "prefilling 293 tokens",
        "decoding",
        "writing the output",
    ]


@pytest.mark.parametrize(
    ("seconds", "told"), [(60, "about 60 s left"), (1200, "about 20 min left"), (7200, "about 2.0 h left")]
)
def test_plain_lines_tell_the_time_left(capfd, clock, seconds, told):
    summary = Summary(method="dense", output="o")
    summary.count("ok", prompt_tokens=100)
    summary.expect(2, *expected(total=2, fraction_read=1.0))
    clock.now += seconds
    with BatchProgress(quiet=False) as progress:
        progress(summary)
    assert capfd.readouterr().err.endswith(f" tokens/s, {told}\n")


def test_a_run_with_nothing_new_prints_no_table(capfd):
    with BatchProgress(quiet=False) as progress:
        progress.end(Summary(method="dense", output="o"))
    assert capfd.readouterr().err == ""


def test_the_table_shows_the_first_message_of_each_kind(capfd):
    summary = Summary(method="dense", output="o")
    row = Answer(id="a", row=0, status="error", error_type="over_long", error_message="line 1: too long")
    summary.add([row, row])
    with BatchProgress(quiet=False) as progress:
        progress.end(summary)
    printed = capfd.readouterr().err
    assert printed.endswith("first over_long: line 1: too long\n")
    assert re.search(r"rows +│ +2 │", printed)


def test_signs_of_life_repeat_the_last_numbers(fast_heart, capfd):
    summary = Summary(method="dense", output="o")
    summary.expect(0, *expected(total=7, fraction_read=0.0))
    with BatchProgress(quiet=False, as_json=True) as progress:
        progress(summary)
        printed = two_lines(capfd)
    found = events(printed + capfd.readouterr().err)
    assert {(event["event"], event["documents"], event["expected_rows"]) for event in found} == {
        ("progress", 0, 7)
    }


def test_quiet_has_no_signs_of_life(fast_heart, capfd):
    with BatchProgress(quiet=True):
        assert not is_beating()
    assert capfd.readouterr().err == ""


def test_an_error_stops_the_heartbeat(fast_heart):
    with pytest.raises(ValueError, match="broken"), BatchProgress(quiet=False):
        raise ValueError("broken")
    assert not is_beating()
