"""`marsinfer calibrate` as a user runs it, and `batch --profile` with what it found."""

from __future__ import annotations

import json
import random
import tomllib

import pytest

from marsinfer_cli.app import run
from pipeline.bench.flops import passes_flops
from pipeline.quality import calibrate as calibrate_module
from pipeline.quality import evaluate
from pipeline.quality.calibrate import run_calibrate
from pipeline.quality.calibration_report import raise_unless_held
from pipeline.quality.samples import document_key
from pipeline.quality.workbench import Clock
from pipeline.settings.calibrate import CalibrateConfig

STEP_S = 0.03  # that a prefill or a step of an answer counts as
WORDS = ["red", "blue", "green", "old", "new", "fish", "reef", "sea"]


def rows_of(count, words=120, seed=0):
    draw = random.Random(seed)
    return [
        {
            "text": " ".join(draw.choice(WORDS) for _ in range(words + 4 * number)),
            "ask": f"how many {number}?",
            "right": f"about {number}",
        }
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def set_times(monkeypatch):
    """A prefill takes as long as its operations say, and the command's time is that of `calibrated`."""
    real = evaluate.score_answers

    def score_answers(model, *arguments, **options):
        results, prefilled, _ = real(model, *arguments, **options)
        flops = sum(passes_flops(model.shape, passes) for passes in prefilled.by_document())
        return results, prefilled, flops / 1e6

    monkeypatch.setattr(evaluate, "score_answers", score_answers)
    monkeypatch.setattr(calibrate_module, "run_calibrate", calibrated)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "fish.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(10)))
    return path


@pytest.fixture
def flags(sharp_model_folder, data, tmp_path):
    return [
        str(data),
        "--model",
        str(sharp_model_folder),
        "--question-column",
        "ask",
        "--max-new-tokens",
        "5",
        "--out",
        str(tmp_path / "p.toml"),
    ]


def calibrate(*words):
    return run(["calibrate", *map(str, words)])


@pytest.mark.slow
def test_a_profile_is_found_with_which_batch_runs(flags, data, tmp_path, sharp_model_folder, capfd):
    assert calibrate(*flags, "--max-drop", "100pt", "--minutes", "0.2") == 0
    printed = capfd.readouterr()
    assert "Frontier: agreement, at most 100pt below dense" in printed.out
    assert "What sparing cold tokens at one layer costs and saves" in printed.out
    assert "cost model: " in printed.out
    assert "an interval is narrower than it claims" in printed.out
    assert " s left] probing 4 layers on " in printed.err
    profile = tomllib.loads((tmp_path / "p.toml").read_text())
    about = profile["profile"]
    assert about["fingerprint"].startswith("content:")
    assert about["measured"]["speed_up"] > 1
    assert about["measured"]["gates"]["agreement"]["verdict"] == "pass"
    assert about["lengths"]["min"] <= about["lengths"]["p50"] <= about["lengths"]["max"]

    out = tmp_path / "out.jsonl"
    words = [data, out, "--question-column", "ask", "--model", sharp_model_folder, "--quiet"]
    words += ["--max-new-tokens", "2", "--profile", tmp_path / "p.toml"]
    assert run(["batch", *map(str, words)]) == 0
    assert {json.loads(line)["method"] for line in out.open()} == {profile["batch"]["method"]}

    assert calibrate(*flags) == 2
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .endswith("p.toml is there already; name another file, or add --overwrite")
    )


def config_of(data, tmp_path, model, **more):
    settings = {
        "input": (str(data),),
        "model": str(model),
        "question_column": "ask",
        "out": str(tmp_path / "p.toml"),
        "max_new_tokens": 5,
        "minutes": 0.2,
        **more,
    }
    return CalibrateConfig(**settings)


def calibrated(config, check=lambda: None, **options):
    """By a clock that counts prefills and steps of answers: a busy machine does fewer of them in a second."""
    done = 0

    def counted():
        nonlocal done
        done += 1
        check()

    clock = Clock(config.minutes * 60, lambda: done * STEP_S)
    return run_calibrate(config, clock=clock, check=counted, **options)


@pytest.mark.slow
def test_without_a_drop_what_holds_is_exact_or_nothing_is_written(data, tmp_path, sharp_model_folder):
    result = calibrated(config_of(data, tmp_path, sharp_model_folder, max_drop="0pt"))
    if result.profile is None:
        with pytest.raises(Exception, match="nothing holds, so no profile is written") as refused:
            raise_unless_held(result)
        assert refused.value.exit_code == 5
        assert not (tmp_path / "p.toml").exists()
    else:
        (gate,) = result.chosen.gates
        assert (gate.drop.drop, gate.drop.high) == (0, 0)


@pytest.mark.slow
def test_documents_held_out_are_never_searched_on(data, tmp_path, sharp_model_folder):
    # two questions about each document, which must stay on one side
    rows = rows_of(10)
    twice = [{**row, "ask": f"{row['ask']} {turn}"} for row in rows for turn in "ab"]
    data.write_text("".join(json.dumps(row) + "\n" for row in twice))
    config = config_of(
        data, tmp_path, sharp_model_folder, max_drop="100pt", reference_column="right", minutes=0.3
    )
    result = calibrated(config)
    searched = {score.document_key for trial in result.trials for score in trial.scores}
    held_out = {score.document_key for each in result.verifications for score in each.scores}
    assert searched
    assert held_out
    assert not searched & held_out
    assert searched | held_out <= {document_key(row["text"]) for row in rows}
    assert result.seconds < 0.3 * 60 + 2
    assert {score.tokens for trial in result.trials for score in trial.scores} == {5}  # of the references


@pytest.mark.slow
def test_needles_are_gates_of_their_own(data, tmp_path, sharp_model_folder):
    sentences = [{**row, "text": row["text"].replace(" sea ", " sea. ")} for row in rows_of(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in sentences))
    config = config_of(
        data,
        tmp_path,
        sharp_model_folder,
        max_drop="100pt",
        needle_drop="100pt",
        suite=("needles",),
        needle_kinds=("single",),
        needle_lengths=(700,),
        needle_count=4,
    )
    result = calibrated(config)
    tasks = {score.task for trial in result.trials if trial.complete for score in trial.scores}
    assert tasks == {"fish", "needles-single"}
    for verification in result.verifications:
        gates = {gate.gate: gate.judgement.bound for gate in verification.gates}
        assert gates == {"agreement": 100, "needles-single": 100}


def test_nothing_that_holds_ends_with_5(flags, tmp_path, capfd):
    # without time nothing is searched
    assert calibrate(*flags, "--minutes", "0.0001", "--quiet") == 5
    printed = capfd.readouterr()
    error = printed.err.splitlines()[-1]
    assert error.startswith("marsinfer: error: nothing holds, so no profile is written: ")
    assert printed.out.startswith("no layer was probed: ")  # and no title without a table
    assert not (tmp_path / "p.toml").exists()


@pytest.mark.slow
def test_a_plot(flags, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "frontier.png"
    assert calibrate(*flags, "--max-drop", "100pt", "--minutes", "0.1", "--plot", picture, "--quiet") in (
        0,
        5,
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--max-drop", "1"], "--max-drop '1': write a number and unit, 1pt (points of the score) or 1%"),
        (["--needle-drop", "x"], "--needle-drop 'x': write a number and unit"),
        (["--objective", "memory"], "--objective 'memory': TTFT is all that calibrate can make least"),
        (["--minutes", "0"], "--minutes 0.0: must be above 0 and at most 1440"),
        (["--suite", "needles", "--suite", "needles"], "--suite needles is given twice"),
        (["--on-overlong", "split"], "--on-overlong split: each prompt is measured by itself"),
        (["--mass", "1.5"], "--mass 1.5: must be between 0 and 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(flags, words, complaint, capfd):
    assert calibrate(*flags, *words) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"marsinfer: error: {complaint}")


def test_a_single_document_cannot_be_verified_on(flags, data, capfd):
    data.write_text(json.dumps(rows_of(1)[0]) + "\n")
    assert calibrate(*flags, "--quiet") == 2
    assert "calibrate needs rows of at least two documents" in capfd.readouterr().err
