"""Flags of the version before: hidden, still taken, and told to be others now."""

from __future__ import annotations

import json

import pytest
from commands import commands, options

from marsinfer_cli.app import run
from pipeline import run_batch
from pipeline.errors import ConfigError
from pipeline.settings.bench_settings import AgreementConfig, TtftConfig
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.option import renamed_of
from pipeline.settings.run_settings import BatchConfig
from pipeline.settings.sources import read_config, read_environment, taken

SPARSE = "--sparse-attention is now --set sparse_attention=MASS; the next version does not know it any more"
TINY = ["--model", "random:tiny", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"fish {n} " * 9}) + "\n" for n in range(3)))
    return str(path)


@pytest.mark.parametrize("words", commands())
def test_old_names_are_in_no_help(words, capfd):
    old = {each.flag for cls in (BatchConfig, CheckConfig, CalibrateConfig) for each in renamed_of(cls)}
    shown = {flag for each in options(commands()[words]) for flag in each.opts}
    assert shown & (old | {"--random-weights"}) <= {"--json"}  # of the other commands, which print it
    assert run([*words.split(), "--help"]) == 0
    assert not {word for word in capfd.readouterr().out.split() if word in old - {"--json"}}


def test_sparse_attention_is_a_parameter_of_the_method(rows, tmp_path, capfd):
    out = tmp_path / "out.jsonl"
    flags = ["--question", "q", *TINY, "--max-new-tokens", "2", "--quiet", "--method", "dense"]
    assert run(["batch", rows, str(out), *flags, "--sparse-attention", "0.9"]) == 0
    assert f"marsinfer: note: {SPARSE}\n" in capfd.readouterr().err
    # what decides is the same under the new name
    assert run(["batch", rows, str(out), *flags, "--set", "sparse_attention=0.9", "--resume"]) == 0
    assert "marsinfer: note: nothing new: every row was done; " in capfd.readouterr().err


def test_a_note_is_an_event_where_events_are_asked_for(rows, tmp_path, capfd):
    flags = [
        "--question",
        "q",
        *TINY,
        "--method",
        "dense",
        "--dry-run",
        "--sparse-attention",
        "0.9",
        "--log-format",
        "json",
    ]
    assert run(["batch", rows, str(tmp_path / "out.jsonl"), *flags]) == 0
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [each["message"] for each in events if each["event"] == "note"][:1] == [SPARSE]


def test_old_names_in_files_the_environment_and_python(rows, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("sparse_attention = 0.5\n[settings]\neta = 0.9\n")
    notes = []
    expected = {"settings": {"eta": 0.9, "sparse_attention": 0.5}}
    assert taken(BatchConfig, read_config(str(path)), notes.append) == expected
    environment = read_environment({"MARSINFER_SPARSE_ATTENTION": "0.5"})
    assert taken(CheckConfig, environment, notes.append) == {"settings": {"sparse_attention": 0.5}}
    assert taken(CalibrateConfig, environment, notes.append) == {}  # which has no method
    assert notes == [SPARSE, SPARSE]
    options = {"question": "q", "model": "random:tiny", "device": "cpu", "dtype": "float32"}
    options |= {"method": "dense", "max_new_tokens": 2, "sparse_attention": 0.5}
    run_batch(rows, str(tmp_path / "out.jsonl"), **options, note=notes.append)
    assert notes[2] == SPARSE
    with pytest.raises(ConfigError, match=r"^--sparse-attention 2: must be between 0 and 1$"):
        run_batch(rows, str(tmp_path / "out.jsonl"), **{**options, "sparse_attention": 2})


def test_a_check_says_where_its_result_goes_by_out(rows, tmp_path, capfd):
    result = tmp_path / "result.json"
    flags = ["--question", "q", *TINY, "--max-new-tokens", "2", "--quiet", "--scope", "rows"]
    flags += ["--method", "marsinfer", "--set", "start_layer=0"]
    assert run(["check", rows, *flags, "--json", str(result)]) in (0, 5, 6)
    assert capfd.readouterr().err.startswith("marsinfer: note: --json is now --out FILE; ")
    assert json.loads(result.read_text())["counts"]["rows"] == 3
    assert run(["check", rows, *flags, "--json", "-"]) in (0, 5, 6)
    assert json.loads(capfd.readouterr().out)["counts"]["rows"] == 3
    assert run(["check", rows, *flags, "--json", str(result), "--out", str(result)]) == 2
    assert capfd.readouterr().err == (
        "marsinfer: error: --json and --out FILE exclude each other: they are one setting\n"
    )


def test_needles_are_a_suite_and_random_weights_a_model():
    assert taken(CalibrateConfig, {"needles": True, "suite": ("a",)}, print) == {"suite": ("a", "needles")}
    assert taken(CalibrateConfig, {"needles": False}, print) == {}
    assert taken(CalibrateConfig, {"objective": "ttft"}, print) == {}
    assert taken(TtftConfig, {"random_weights": "tiny"}, print) == {"model": "random:tiny"}
    with pytest.raises(ConfigError, match="--random-weights and --model random:SHAPE exclude each other"):
        taken(TtftConfig, {"random_weights": "tiny", "model": "x"}, print)
    assert taken(AgreementConfig, {"new_tokens": 3}, print) == {"max_new_tokens": 3}
