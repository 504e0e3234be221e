"""Runs that end at a moment, and what they cost."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from pipeline import run_batch
from pipeline.errors import KEPT, NOTHING_KEPT, DeadlineReached
from pipeline.estimate import Estimate
from pipeline.summary import Summary
from pipeline.texts.words import amount

OPTIONS = {"method": "dense", "question": "what?", "max_new_tokens": 2, "pack_tokens": 1, "in_flight": 1}


@pytest.fixture
def later(monkeypatch):
    """A function that sets the clock of deadlines a day forward."""
    clock = SimpleNamespace(ahead_s=0.0)
    import time

    now = SimpleNamespace(time=lambda: time.time() + clock.ahead_s)
    monkeypatch.setattr("pipeline.interrupts.time", now)

    def later(*_):
        clock.ahead_s = 86_400.0

    return later


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"fish {n} " * 9}) + "\n" for n in range(6)))
    return path


def test_a_deadline_ends_a_run_that_is_resumed(later, source, model_folder, tmp_path):
    out, options = tmp_path / "out.parquet", {**OPTIONS, "model": str(model_folder)}
    with pytest.raises(DeadlineReached) as caught:
        run_batch(source, out, **options, deadline="1h", progress=later)
    assert caught.value.exit_code == 9
    told = str(caught.value)
    assert told.startswith("stopped at the deadline, 20")
    assert told.endswith(f"; {KEPT}")
    assert not out.exists()
    assert (tmp_path / ".out.parquet.journal").is_dir()
    summary = run_batch(source, out, **options, resume=True, deadline="48h")
    assert 0 < summary.documents < 6
    assert pq.read_table(out)["status"].to_pylist() == ["ok"] * 6


def test_nothing_is_answered_after_a_deadline(later, source, model_folder, tmp_path):
    later()
    with pytest.raises(DeadlineReached) as caught:
        run_batch(source, tmp_path / "out.parquet", **OPTIONS, model=str(model_folder), deadline="1h")
    assert str(caught.value).endswith(f"; {NOTHING_KEPT}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_an_output_that_is_being_written_is_finished(later, source, model_folder, tmp_path):
    out = tmp_path / "out.parquet"

    def phase(text):
        if text == "writing the output":
            later()

    run_batch(source, out, **OPTIONS, model=str(model_folder), deadline="1h", phase=phase)
    assert pq.read_table(out).num_rows == 6


def test_the_command_ends_with_9_in_one_line(call, source, tmp_path, capfd):
    words = [source, tmp_path / "out.parquet", "--question", "what?", "--quiet", "--price-per-hour", "2.5"]
    assert call(*words, "--deadline", "2020-01-01T00:00") == 9
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("marsinfer: error: stopped at the deadline, 2020-01-01 00:00: 0 rows in ")
    assert " for 0" in line


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--deadline", "8"], "--deadline '8': give how long, such as 8h or 90m, a time of day such as "),
        (["--deadline", "25:00"], "--deadline '25:00': hour must be in 0..23"),
        (["--price-per-hour", "-1"], "--price-per-hour -1.0: must be between 0 and 1000000"),
        (["--price-per-hour", "nan"], "--price-per-hour nan: must be a number"),
    ],
)
def test_what_is_refused(refusal, source, tmp_path, flags, told):
    assert refusal(source, tmp_path / "out.parquet", "--question", "what?", *flags).startswith(told)
    assert not (tmp_path / "out.parquet").exists()


def test_the_summary_tells_the_cost(call, source, tmp_path, capfd):
    words = [source, tmp_path / "out.parquet", "--question", "what?", "--max-new-tokens", "2", "--json"]
    assert call(*words, "--price-per-hour", "3600") == 0
    printed = capfd.readouterr()
    summary = json.loads(printed.out)
    assert summary["price_per_hour"] == 3600
    assert summary["cost"] == pytest.approx(summary["seconds"])
    assert "cost, at 3600 an hour" in printed.err
    assert call(*words, "--overwrite") == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["cost"] is None
    assert "cost" not in printed.err


def test_a_dry_run_estimates_the_cost_and_says_that_it_does(call, source, tmp_path, capfd, monkeypatch):
    words = [source, tmp_path / "out.parquet", "--question", "what?", "--max-new-tokens", "2", "--dry-run"]
    flags = ["--price-per-hour", "7200", "--deadline", "2020-01-01T00:00"]
    known = {"prefill_s": (0.25, 0.5), "decode_s": 1.0}
    monkeypatch.setattr(
        "pipeline.dryrun.estimate",
        lambda *_, **__: Estimate(**known, new_tokens=2, prefill_at="x", decode_at="y", rates={}),
    )
    assert call(*words, *flags) == 0
    assert capfd.readouterr().out.splitlines()[-2:] == [
        "cost, an estimate from that time: 0.5 to 3.00, at 7200 an hour; loading comes on top",
        "deadline: 2020-01-01 00:00, which is past: the run would stop at once",
    ]
    assert call(*words, *flags, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert report["estimated_cost"] == {"low": 0.5, "high": 3.0}
    assert report["deadline"].startswith("2020-01-01T00:00:00")
    assert call(*words, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["estimated_cost"], report["deadline"]) == (None, None)


def test_amounts_have_no_currency():
    assert [amount(value) for value in (0, 0.01234, 1, 1234.5)] == ["0.00", "0.0123", "1.00", "1,234.50"]
    summary = Summary(method="dense", output="o", price_per_hour=0)
    assert str(summary).endswith("; cost 0.00")
