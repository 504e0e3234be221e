"""A check that is stopped and goes on, its journal, and its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checks.checking import run_check
from pipeline.checks.reports import as_dict, speed_text
from pipeline.errors import ConfigError, MarsError
from pipeline.model.loading import load_model
from pipeline.pruning.dense import Dense
from pipeline.settings.check_settings import CheckConfig

LICENSES = Path(__file__).parents[2] / "examples" / "licenses.jsonl"
BROKEN = {"eta": 0.3, "start_layer": 0, "prefix": 0, "window": 1}


class Stopped(Exception):
    """As a signal would."""


@pytest.fixture
def config(sharp_model_folder, tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"text": f"word{n} " * (5 + 3 * n), "answer": ["a b", "c"][: 1 + n % 2]} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CheckConfig(
        input=(str(path),),
        question="What?",
        model=str(sharp_model_folder),
        scope="rows",
        method="marsinfer",
        settings=BROKEN,
        max_new_tokens=7,
        out=str(tmp_path / "result.json"),
    )


@pytest.fixture(scope="module")
def model(sharp_model_folder):
    return load_model(str(sharp_model_folder), device="cpu")


@pytest.fixture
def journal(tmp_path):
    return tmp_path / ".result.json.journal"


def stop_after(rows):
    """A callback that stops the check when so many results are finished."""
    done = []

    def progress(tally):
        done.append(tally.documents)
        if len(done) == rows:
            raise Stopped

    return progress


def without_times(result):
    found = as_dict(result)
    for key in ("speed", "about", "settings"):
        del found[key]
    for row in found["rows"]:
        del row["ttft_ms"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("with_references", [False, True])
@pytest.mark.parametrize("finished", [1, 4, 6, 9])
def test_a_check_that_was_stopped_goes_on(config, model, journal, finished, with_references):
    config = replace(config, reference_column="answer" if with_references else None, generate=with_references)
    whole = run_check(config, model=model)
    with pytest.raises(Stopped):
        run_check(config, model=model, progress=stop_after(finished))
    assert len(journal.read_bytes().splitlines()) == 1 + finished
    with journal.open("ab") as file:
        file.write(b'{"side": "dense", "id": "to')  # of a process that was killed
    notes, tallies = [], []
    resumed = run_check(
        replace(config, resume=True),
        model=model,
        note=notes.append,
        progress=lambda tally: tallies.append((tally.documents, tally.expected_rows)),
    )
    assert notes == [f"resuming: {finished} results are done"]
    assert resumed.speed["speed_up"] is None
    assert tallies[-1] == (12 - finished, 12 - finished)
    assert without_times(resumed) == without_times(whole)
    assert not journal.exists()


def test_without_resume_a_check_starts_over(config, model, journal):
    with pytest.raises(Stopped):
        run_check(config, model=model, progress=stop_after(3))
    tallies = []
    run_check(config, model=model, progress=lambda tally: tallies.append(tally.documents))
    assert tallies == list(range(1, 13))


def test_a_journal_of_other_settings_is_refused_by_name(config, model, journal):
    with pytest.raises(Stopped):
        run_check(config, model=model, progress=stop_after(2))
    other = replace(config, settings={**BROKEN, "eta": 0.5}, resume=True)
    with pytest.raises(ConfigError) as refused:
        run_check(other, model=model)
    assert str(refused.value) == (
        f"{journal} was begun with other settings: method.settings.eta was 0.3 and is now 0.5; "
        "leave out --resume to start over"
    )


def test_a_damaged_line_of_a_journal_costs_its_row_alone(config, model, journal):
    with pytest.raises(Stopped):
        run_check(config, model=model, progress=stop_after(3))
    first, *lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([first, b"{damage\n", *lines[1:]]))
    notes = []
    run_check(replace(config, resume=True), model=model, note=notes.append)
    assert notes == [
        f"1 line of {journal} cannot be read: their rows run again",
        f"resuming: {len(lines) - 1} results are done",
    ]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_of_the_user_under_the_journals_name_is_left_alone(
    config, model, journal, tmp_path, resume, is_link
):
    victim = tmp_path / "victim" if is_link else journal
    victim.write_text("precious")
    if is_link:
        journal.symlink_to(victim)
    with pytest.raises(ConfigError, match="is in the way, and"):
        run_check(replace(config, resume=resume), model=model)
    assert victim.read_text() == "precious"


def test_a_row_that_changed_is_run_again(config, model):
    with pytest.raises(Stopped):
        run_check(config, model=model, progress=stop_after(6))
    path = Path(config.input[0])
    path.write_text(path.read_text().replace("word2", "other"))
    tallies = []
    run_check(
        replace(config, resume=True), model=model, progress=lambda tally: tallies.append(tally.documents)
    )
    assert len(tallies) == 1 + 6


def test_a_resumed_check_with_all_rows_done_loads_no_weights(config, model, monkeypatch):
    with pytest.raises(Stopped):
        run_check(config, progress=stop_after(12))

    def refuse(self):
        raise AssertionError("loaded")

    monkeypatch.setattr("pipeline.model.loading.UnloadedModel.load", refuse)
    result = run_check(replace(config, resume=True))
    assert result.counts["rows"] == 6


def test_a_row_that_fails_is_named(config, model):
    class Failing(Dense):
        def observe(self, *arguments, **options):
            raise RuntimeError("no kernel for this")

        def plan(self, shape, lengths):
            if lengths != (1,):
                raise RuntimeError("no kernel for this")
            return super().plan(shape, lengths)

    with pytest.raises(MarsError, match=r"in\.jsonl line 1, \d+ tokens, fails under .*no kernel for this"):
        run_check(config, model=model, method=Failing())


def test_lists_of_references_and_what_is_left_out(config, model):
    result = run_check(replace(config, reference_column="answer"), model=model)
    assert {pair.row.sample.references for pair in result.pairs} == {("a b",), ("a b", "c")}
    assert result.counts["forced_tokens"] == 6 * 3  # of the first reference, a token a byte
    shorter = run_check(replace(config, reference_column="answer", max_new_tokens=2), model=model)
    assert (shorter.counts["references_cut"], shorter.counts["forced_tokens"]) == (6, 12)


def test_dense_of_another_run_gives_no_speed_up(config, model, tmp_path):
    config = replace(config, baseline=str(tmp_path / "dense.parquet"))
    assert run_check(config, model=model).speed["speed_up"] > 0
    notes = []
    result = run_check(config, model=model, note=notes.append)
    assert (result.speed["speed_up"], result.speed["dense_ttft_p50_ms"]) == (None, None)
    assert len(notes) == 1
    assert speed_text(result).startswith(
        f"TTFT p50 {result.speed['method_ttft_p50_ms']:,.1f} ms (no speed-up is told: "
    )
