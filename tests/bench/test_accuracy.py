"""`bench accuracy`: methods side by side, held against right answers and dense, on a small sharp model."""

from __future__ import annotations

import json
import os
import signal

import pytest

from marsinfer_cli.app import run
from pipeline.bench.accuracy import measure_accuracy, read_cases
from pipeline.model.loading import load_model
from pipeline.model.variant import Variant
from pipeline.pruning.registry import make_method
from pipeline.settings.bench_settings import AccuracyConfig
from pipeline.setup.profile import Profile, write_profile
from pipeline.suites.samples import document_key, part_of

pytestmark = pytest.mark.slow

LONG = 450  # tokens
BROKEN = "marsinfer:eta=0.3:start_layer=0:prefix=0:window=1"


@pytest.fixture
def suite(tmp_path):
    """A folder of two tasks in the form of L-Eval, six documents with two questions each."""
    folder = tmp_path / "suite"
    folder.mkdir()
    for task, words in (("fishes", ["red", "blue", "green"]), ("birds", ["old", "new", "big"])):
        rows = [
            {
                "input": f"{word} {task} swim past the {word} reef. " * (9 + number),
                "instructions": [f"how many {word} {task}?", "what do they do?"],
                "outputs": [f"about {number}", "swim"],
                "evaluation": "f1",
            }
            for number, word in enumerate(words)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def measure(suite, sharp_model_folder):
    def call(*arguments):
        flags = ["--suite", f"leval:{suite}", "--model", sharp_model_folder, "--device", "cpu"]
        flags += ["--max-new-tokens", "8"]
        return run(["bench", "accuracy", *map(str, [*flags, *arguments])])

    return call


def results(capfd):
    return json.loads(capfd.readouterr().out)


@pytest.mark.slow
def test_dense_loses_nothing_full_settings_neither_and_broken_ones_do(measure, capfd, tmp_path):
    methods = f"marsinfer:eta=1:start_layer=1,{BROKEN}"
    plot = tmp_path / "drops.png"
    assert measure("--methods", methods, "--json", "--long-tokens", "500", "--plot", plot) == 0
    found = results(capfd)
    assert (found["rows"], found["device"]) == (12, "CPU (x86_64)")
    dense, full, broken = found["results"]
    for same in (dense, full):
        (group,) = same["groups"]
        assert (group["rows"], group["documents"]) == (12, 6)
        drop = group["token_drop"]
        assert drop["drop"] == 0
        assert drop["high"] == -drop["low"] == pytest.approx(100 * (1 - 0.025 ** (1 / 6)))  # of 6 documents
    (group,) = broken["groups"]
    assert group["token_drop"]["dense"] == dense["groups"][0]["token_accuracy"]
    assert group["nll"] != dense["groups"][0]["nll"]
    assert dense["divergence"] is None
    assert full["divergence"] == pytest.approx(0, abs=1e-6)
    assert broken["divergence"] > 0.1
    assert broken["shares"]["ffn_ratio"] < 0.8 < full["shares"]["ffn_ratio"] == 1
    assert 0 < dense["long_cases"] < 12
    assert set(dense["groups"][0]["speed_up_by_length"].values()) == {1.0}
    assert plot.stat().st_size > 1000


def test_rows_that_block_sparse_attention_touches_stand_beside_all(suite, sharp_model_folder):
    config = AccuracyConfig(suite=(f"leval:{suite}",), model=str(sharp_model_folder), max_new_tokens=8)
    model = load_model(str(sharp_model_folder), device="cpu", sparse_from=LONG)
    cases, _ = read_cases(config, model)
    long = [case for case in cases if case.document.prompt_tokens >= LONG]
    assert 0 < len(long) < len(cases)
    variant = Variant("mars", make_method("mars", {"last_full": 2, "sparse_attention": 0.1}))
    _, mars = measure_accuracy(model, cases, [variant], long_tokens=500)
    rows, touched = mars.groups
    assert (rows.name, rows.rows) == ("rows", len(cases))
    assert (touched.name, touched.rows) == (f"rows from {LONG} tokens", len(long))
    assert touched.documents == len({case.sample.document_key for case in long})
    assert touched.nll != rows.nll


def test_tasks_and_shards_of_documents(measure, suite, capfd):
    texts = [json.loads(line)["input"] for line in (suite / "birds.jsonl").open()]
    parts = [part_of(document_key(text), 2) for text in texts]
    assert set(parts) == {0, 1}
    for part in (0, 1):
        flags = ["--tasks", "birds", "--document-shard", f"{part + 1}/2", "--methods", "dense"]
        assert measure(*flags, "--json") == 0
        assert results(capfd)["rows"] == 2 * parts.count(part)
    assert measure("--tasks", "bird", "--methods", "dense") == 2
    assert capfd.readouterr().err == (
        "marsinfer: error: --tasks names 'bird' (did you mean 'birds'?); there are birds, fishes\n"
    )
    assert measure("--document-shard", "3/2") == 2
    assert "--document-shard '3/2': the part must be between 1 and 2" in capfd.readouterr().err


def test_needles_hide_in_the_suites_documents(measure, capfd):
    flags = ["--suite", "needles", "--needle-kinds", "single", "--needle-lengths", "800"]
    assert measure(*flags, "--needle-count", "3", "--methods", "marsinfer:eta=1:start_layer=1") == 0
    printed = capfd.readouterr().out
    assert "rows: 12 of 6 documents\n" in printed
    assert "needles-single: 3 of 3 documents\n" in printed
    assert printed.count("| marsinfer:eta=1:start_layer=1 | ") == 2
    assert "| 0.00 (-70.76 to 70.76) |" in printed  # of 3 documents
    assert ", suites not comparable with published scores\n" in printed


def test_of_a_stopped_measurement_the_variants_that_ended_are_shown(measure, capfd, monkeypatch):
    def say(message):
        if message.startswith("dense: "):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("marsinfer_cli.bench.saying", lambda quiet: say)
    assert measure("--methods", "marsinfer:eta=1:start_layer=1,sliminfer", "--json") == 143
    printed = capfd.readouterr()
    shown = json.loads(printed.out)
    assert [each["variant"] for each in shown["results"]] == ["dense"]
    assert shown["not measured"] == "marsinfer:eta=1:start_layer=1, sliminfer"
    assert "stopped by SIGTERM; what is shown is of 1 of 3 variants" in printed.err


@pytest.mark.parametrize(
    ("returned", "code", "told"),
    [
        ("{}['here']", 1, "fails: KeyError: 'here' (FILE, line 8)"),
        ("view.keys", 2, "method mine: score must return a tensor of one number a token, here of shape ("),
    ],
)
def test_where_a_method_of_ones_own_fails_is_told(measure, tmp_path, capfd, returned, code, told):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from pipeline.pruning.base import ScoredMethod\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(ScoredMethod):\n"
        f"    name: ClassVar[str] = 'mine'\n    def score(self, layer, view): return {returned}\n"
    )
    assert measure("--methods", f"{path}:Mine:start_layer=1") == code
    *_, error = capfd.readouterr().err.splitlines()
    assert told.replace("FILE", str(path)) in error


def test_a_profile_is_a_variant(measure, tmp_path, capfd):
    about = dict.fromkeys(("model", "fingerprint", "device", "dtype"), "x")
    settings = {"eta": 0.5, "start_layer": 1}
    path = tmp_path / "p.toml"
    write_profile(
        path, Profile(about={"format": 1, **about}, batch={"method": "marsinfer", "settings": settings})
    )
    assert measure("--methods", f"@{path},marsinfer:eta=0.5:start_layer=1", "--json") == 0
    _, profile, flags = results(capfd)["results"]
    assert profile["variant"] == f"@{path}"
    assert profile["groups"][0]["token_drop"] == flags["groups"][0]["token_drop"]
    assert profile["shares"] == flags["shares"]
    assert profile["shares"]["ffn_ratio"] < 1


def test_without_right_answers_methods_are_held_against_denses_own(sharp_model_folder, tmp_path, capfd):
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": f"fish {n} " * 40, "ask": "how many?"}) for n in range(3)]
    path.write_text("\n".join([*lines, "not json"]))
    method = "gemfilter:layer=1:keep=5"
    flags = ["--model", str(sharp_model_folder), "--question-column", "ask", "--methods", method]
    assert run(["bench", "accuracy", str(path), *flags, "--max-new-tokens", "8", "--json"]) == 0
    printed = capfd.readouterr()
    assert "left out: in.jsonl line 4 is not JSON" in printed.err
    report = json.loads(printed.out)
    dense, pruned = (result["groups"][0] for result in report["results"])
    assert (report["rows"], report["held against"]) == (3, "dense's own answers")
    assert "suites" not in report  # nobody has published any of these rows
    assert (dense["token_accuracy"], dense["found"]) == (1, 1)
    assert pruned["token_accuracy"] < 1
    # the command of the version before, with its flag for the length
    assert run(["bench", "agreement", str(path), *flags, "--new-tokens", "8", "--json"]) == 0
    printed = capfd.readouterr()
    assert printed.err.count("note: --new-tokens is now --max-new-tokens; ") == 1
    assert "note: bench agreement is now bench accuracy; " in printed.err
    for ours, theirs in zip(report["results"], json.loads(printed.out)["results"], strict=True):
        assert ours["groups"][0]["token_drop"] == theirs["groups"][0]["token_drop"]


@pytest.mark.parametrize("column", ["right", "answer"])  # the second has the name of one of batch's output
def test_a_row_without_a_right_answer_is_left_out(model_folder, tmp_path, capfd, column):
    source = tmp_path / "docs.jsonl"
    rows = [{"content": f"fish {n} " * 40, column: right} for n, right in enumerate(["none", "all", ""])]
    source.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--question", "q", "--reference-column", column, "--methods", "dense", "--json", "--quiet"]
    assert run(["bench", "accuracy", str(source), "--model", str(model_folder), *flags]) == 0
    printed = capfd.readouterr()
    assert f"left out: docs.jsonl line 3: no reference in column {column!r}" in printed.err
    assert "the document is the column 'content'" in printed.err
    assert all(each.startswith("marsinfer: note: ") for each in printed.err.splitlines()), "no progress"
    (dense,) = json.loads(printed.out)["results"]
    assert dense["groups"][0]["rows"] == 2
    assert dense["groups"][0]["token_accuracy"] < 1
