"""`marsinfer calibrate` as a user runs it, and `batch --profile` with what it found."""

from __future__ import annotations

import json
import random
import re
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from marsinfer_cli.app import run
from pipeline.calibration import calibrating as calibrate_module
from pipeline.calibration import phases
from pipeline.calibration.calibrating import run_calibrate
from pipeline.calibration.calibration_report import layer_heads, layer_rows, lines, raise_unless_held
from pipeline.errors import GateFailed
from pipeline.evaluate import workbench
from pipeline.evaluate.workbench import Deadline
from pipeline.model.loading import UnloadedModel, open_model
from pipeline.pruning.operations import passes_flops
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.suites.samples import document_key, searched_keys

STEP_S = 0.03  # that a prefill or a step of an answer counts as
WORDS = ["red", "blue", "green", "old", "new", "fish", "reef", "sea"]
FEW_NEEDLES = {
    "suite": ("needles",),
    "needle_kinds": ("single",),
    "needle_lengths": (700,),
    "needle_count": 4,
}


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
    real = workbench.score_answer

    def score_answer(model, *arguments, **options):
        forced, prefilled, _ = real(model, *arguments, **options)
        flops = sum(passes_flops(model.shape, passes) for passes in prefilled.by_document())
        return forced, prefilled, flops / 1e6

    monkeypatch.setattr(workbench, "score_answer", score_answer)
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
    assert calibrate(*flags, "--max-drop", "90pt", "--minutes", "0.2") == 0
    printed = capfd.readouterr()
    assert "Ladder: agreement, at most 90pt below dense" in printed.out
    assert "note: agreement: to show a drop within 90pt takes at least 2 documents held out" in printed.err
    assert " s left] mars sparse_attention=none last_full=1: " in printed.err
    profile = tomllib.loads((tmp_path / "p.toml").read_text())
    about = profile["profile"]
    assert about["fingerprint"].startswith("content:")
    assert about["measured"]["speed_up"] > 1
    assert about["measured"]["gates"]["agreement"]["verdict"] == "pass"
    ladder = about["ladder"]
    assert [rung["verdict"] for rung in ladder] == ["pass"] * len(ladder)
    assert about["measured"]["speed_up"] == max(rung["speed_up"] for rung in ladder)
    assert about["measured"]["gates"] in [rung["gates"] for rung in ladder]
    # of the documents held out, by which the guard goes; a token is a byte
    texts = {document_key(row["text"]): len(row["text"]) for row in rows_of(10)}
    held_out = [length for key, length in texts.items() if key not in searched_keys(texts, "0")]
    assert about["lengths"]["max"] - about["lengths"]["min"] == max(held_out) - min(held_out)

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

    clock = Deadline(config.minutes * 60, lambda: done * STEP_S)
    return run_calibrate(config, clock=clock, check=counted, **options)


@pytest.mark.slow
def test_the_ladder_ends_at_the_first_rung_that_does_not_pass(
    data, tmp_path, sharp_model_folder, monkeypatch
):
    # documents that lose nothing would pass, and here all methods mistake two tokens of five
    real = workbench.score_answer

    def score_answer(model, method, *arguments, **options):
        forced, *more = real(model, method, *arguments, **options)
        if method.name != "dense":
            forced = replace(forced, choices=np.where(np.arange(len(forced.choices)) < 2, -1, forced.choices))
        return forced, *more

    monkeypatch.setattr(workbench, "score_answer", score_answer)
    result = calibrated(config_of(data, tmp_path, sharp_model_folder, max_drop="47pt"))
    (tested,) = result.tested
    assert tested.rung is result.ladder[0]
    assert (tested.verdict, tested.passes) == ("inconclusive", False)
    assert tested.gates[0].drop.drop >= 40
    assert (result.profile, result.chosen) == (None, None)
    with pytest.raises(GateFailed) as refused:
        raise_unless_held(result)
    assert refused.value.exit_code == 5
    assert str(refused.value).startswith(
        "nothing holds, so no profile is written: the first rung, mars sparse_attention=none last_full=1 "
        "exit_maps=exit-1.safetensors, did not pass: agreement dropped by 4"
    )
    assert " documents would tell" in str(refused.value)
    assert not (tmp_path / "p.toml").exists()


@pytest.mark.slow
def test_documents_held_out_are_never_searched_on(data, tmp_path, sharp_model_folder):
    # two questions about each document, which must stay on one side
    rows = rows_of(10)
    twice = [{**row, "ask": f"{row['ask']} {turn}"} for row in rows for turn in "ab"]
    data.write_text("".join(json.dumps(row) + "\n" for row in twice))
    config = config_of(
        data, tmp_path, sharp_model_folder, max_drop="90pt", reference_column="right", minutes=0.3
    )
    result = calibrated(config)
    searched = {score.document_key for rung in result.ladder for score in rung.trial.scores}
    held_out = {score.document_key for each in result.tested for score in each.trial.scores}
    assert searched
    assert not searched & held_out
    assert searched | held_out <= {document_key(row["text"]) for row in rows}
    assert len(held_out) == 6  # all that are not searched on
    assert result.seconds < 0.3 * 60 + 2
    assert {score.tokens for rung in result.ladder for score in rung.trial.scores} == {5}  # of the references


@pytest.mark.slow
def test_long_prompts_are_probed_layer_by_layer(data, tmp_path, sharp_model_folder):
    config = config_of(data, tmp_path, sharp_model_folder, max_drop="90pt", minutes=0.4)
    model = open_model(config)
    model.attention.sparse_from = 1
    told = []
    result = calibrated(config, model=model, progress=lambda text, left_s: told.append(text))
    assert {probe.layer for probe in result.probes} == {0, 1, 2, 3}
    assert layer_heads(result)[:3] == ["layer", "0.9, nats", "0.9, pairs"]
    assert [row[0] for row in layer_rows(result)] == ["0", "1", "2", "3"]
    assert any(probe.attended < 1 for probe in result.probes)
    a_mass_a_layer = re.compile(r"mars sparse_attention=[\d.]+,[\d.]+,[\d.]+,1: ")
    assert any(map(a_mass_a_layer.match, told))


@pytest.mark.slow
def test_needles_are_gates_of_their_own(data, tmp_path, sharp_model_folder):
    sentences = [{**row, "text": row["text"].replace(" sea ", " sea. ")} for row in rows_of(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in sentences))
    config = config_of(
        data,
        tmp_path,
        sharp_model_folder,
        max_drop="90pt",
        needle_drop="90pt",
        **FEW_NEEDLES,
    )
    result = calibrated(config)
    tasks = {score.task for rung in result.ladder for score in rung.trial.scores}
    assert tasks == {"fish", "needles-single"}
    assert result.tested
    for tested in result.tested:
        gates = {gate.gate: gate.judgement.bound for gate in tested.gates}
        assert gates == {"agreement": 90, "needles-single": 90}


@pytest.mark.slow
@pytest.mark.parametrize("needles", [False, True])
def test_rows_too_short_to_be_pruned_show_nothing(data, tmp_path, sharp_model_folder, needles, monkeypatch):
    """A task of such rows is not verified, so that they run dense; a kind of such needles passes nothing."""
    real = workbench.score_answer

    def score_answer(model, method, document, answer, **options):
        forced, *more = real(model, method, document, answer, **options)
        return replace(forced, choices=np.array(answer)), *more  # needles are found, whatever is pruned

    monkeypatch.setattr(workbench, "score_answer", score_answer)
    monkeypatch.setattr(phases, "mapped_rungs", lambda *arguments: [])  # which prune short rows too
    monkeypatch.setattr(phases, "other_rungs", lambda *arguments: [])
    rows = [
        {**row, "text": row["text"].replace(" sea ", " sea. "), "kind": "long"}
        for row in rows_of(8, words=200)
    ]
    rows += [{**row, "kind": "short"} for row in rows_of(8, words=10, seed=1)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(
        data,
        tmp_path,
        sharp_model_folder,
        max_drop="90pt",
        task_column="kind",
        minutes=0.4,
        **({**FEW_NEEDLES, "needle_drop": "90pt"} if needles else {}),
    )
    model = open_model(config)
    model.attention.sparse_from = 850
    result = calibrated(config, model=model)
    first = result.tested[0]
    assert "mars sparse_attention=" in first.rung.name
    if not needles:
        assert first.passes
        assert result.profile.about["guard"]["tasks"] == ["long"]
        assert "nothing was pruned of rows of the task 'short': with this profile they run dense" in lines(
            result
        )
        return
    assert (first.verdict, result.profile) == ("inconclusive", None)
    told = r"needles-single dropped by .*: inconclusive; nothing was pruned: .*; give longer --needle-lengths"
    with pytest.raises(GateFailed, match=told):
        raise_unless_held(result)


def test_without_time_nothing_is_found_which_ends_with_5(flags, tmp_path, capfd):
    assert calibrate(*flags, "--minutes", "0.0001", "--max-drop", "90pt", "--quiet") == 5
    printed = capfd.readouterr()
    *notes, error = printed.err.splitlines()
    assert notes, "what changes the meaning of a result is told, also with --quiet"
    assert all(each.startswith("marsinfer: note: ") for each in notes)
    assert error.startswith(
        "marsinfer: error: nothing holds, so no profile is written: nothing is expected to "
    )
    assert printed.out.startswith("searched on ")  # and no title without a table
    assert not (tmp_path / "p.toml").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            "--max-drop 2pt",
            "agreement: to show a drop within 2pt takes at least 183 documents held out, and more if any of "
            "them loses; there are 6, which can show one within 46.0pt at best; give 199 documents in all, "
            "of which some are searched on, or a larger --max-drop",
        ),
        (
            "--max-drop 0pt",
            "agreement: no number of documents shows a drop within 0pt; give a larger --max-drop",
        ),
        (
            "--max-drop 50pt --suite needles --needle-kinds single --needle-lengths 700 --needle-count 10",
            "needles-single: to show a drop within 2pt takes at least 183 documents held out, and more if "
            "any of them loses; there are 6, which can show one within 46.0pt at best; give --needle-count "
            "199, or a larger --needle-drop",
        ),
    ],
)
def test_too_few_documents_end_with_6_before_the_weights_are_loaded(
    flags, words, complaint, capfd, tmp_path, monkeypatch, data
):
    sentences = [{**row, "text": row["text"].replace(" sea ", " sea. ")} for row in rows_of(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in sentences))
    monkeypatch.setattr(UnloadedModel, "load", lambda self: pytest.fail("the weights are loaded"))
    assert calibrate(*flags, *words.split(), "--quiet") == 6
    assert capfd.readouterr().err.splitlines()[-1] == f"marsinfer: error: {complaint}"
    assert not (tmp_path / "p.toml").exists()


def test_too_little_time_for_as_many_documents_ends_with_6(flags, tmp_path, capfd):
    assert calibrate(*flags, "--max-drop", "46pt", "--minutes", "0.06", "--quiet") == 6
    assert re.fullmatch(
        r"marsinfer: error: --minutes 0.06 leaves time for (\d) rows held out, too few for any profile: "
        r"agreement: to show a drop within 46pt takes at least 6 documents held out, .*; there are \1, .*; "
        "give more --minutes",
        capfd.readouterr().err.splitlines()[-1],
    )
    assert not (tmp_path / "p.toml").exists()


@pytest.mark.slow
def test_a_plot(flags, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ladder.png"
    assert calibrate(*flags, "--max-drop", "90pt", "--minutes", "0.1", "--plot", picture, "--quiet") in (
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
        (["--mass", "0.9"], "--mass 0.9 is gone: calibrate probes the masses that its profiles use"),
        (["--accept-inconclusive"], "--accept-inconclusive is gone: a profile holds only what was shown"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(flags, words, complaint, capfd):
    assert calibrate(*flags, *words) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"marsinfer: error: {complaint}")


def test_a_place_that_cannot_be_written_is_told_at_once(flags, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    assert calibrate(*flags) == 8
    told = f"--out {tmp_path / 'p.toml'} cannot be written: {tmp_path} is not open for writing"
    assert told in capfd.readouterr().err


def test_a_single_document_cannot_be_tested_on(flags, data, capfd):
    data.write_text(json.dumps(rows_of(1)[0]) + "\n")
    assert calibrate(*flags, "--quiet") == 6
    assert "calibrate needs rows of at least two documents" in capfd.readouterr().err
