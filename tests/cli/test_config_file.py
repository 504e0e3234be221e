"""Where settings come from: flags, environment, a TOML file, defaults; and a configuration back as TOML."""

from __future__ import annotations

import inspect
import json
import os
import threading
from dataclasses import fields

import pytest

from marsinfer_cli.batch import batch
from pipeline.settings.parse import parse_max_errors
from pipeline.settings.run_settings import BatchConfig
from pipeline.settings.sources import read_config, to_toml


@pytest.fixture
def seen(monkeypatch):
    """Settings that reach `run_batch`, which does not run."""
    calls = []

    def record(inputs, output, *, progress, note, check, phase, began, **options):
        calls.append(BatchConfig(input=inputs, output=output, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.run.run_batch", record)
    return calls


@pytest.fixture
def resolved(call, seen):
    def resolved(*arguments):
        assert call(*arguments) == 130
        return seen.pop()

    return resolved


@pytest.fixture
def file(tmp_path):
    def file(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return file


def test_flag_over_environment_over_file_over_default(resolved, file, monkeypatch):
    path = file('question = "why?"\nmax-new-tokens = 1\nseed = 1\ntop_p = 0.5\n')
    monkeypatch.setenv("MARSINFER_MAX_NEW_TOKENS", "2")
    monkeypatch.setenv("MARSINFER_SEED", "2")
    config = resolved("in.jsonl", "out.jsonl", "--config", path, "--seed", "0")
    assert (config.seed, config.max_new_tokens, config.top_p, config.order) == (0, 2, 0.5, "input")
    assert (config.input, config.output, config.question) == (("in.jsonl",), "out.jsonl", "why?")


def test_a_flag_that_repeats_the_default_is_a_flag(resolved, file):
    path = file('question = "why?"\nmax_new_tokens = 9\n')
    assert resolved("in.jsonl", "o.jsonl", "--config", path, "--max-new-tokens", "128").max_new_tokens == 128


def test_every_kind_of_value(resolved, file, monkeypatch):
    path = file(
        'input = "in/*.jsonl"\noutput = "out.jsonl"\nquestion = "q"\nstop = ["\\n", "END"]\n'
        'pack-tokens = "2k"\nmax-errors = 5\nresume = true\ntemperature = 1\n'
        'method = "marsinfer"\n[settings]\neta = 0.9\nshare = [0.5, 1]\n'
    )
    monkeypatch.delenv("MARSINFER_METHOD")
    config = resolved("--config", path, "--set", "eta=0.5", "--set", "window=8")
    assert config.input == ("in/*.jsonl",)
    assert (config.stop, config.pack_tokens, config.max_errors) == (("\n", "END"), 2048, "5")
    assert (config.resume, config.temperature) == (True, 1.0)
    assert config.settings == {"eta": "0.5", "share": (0.5, 1), "window": "8"}


def test_environment_of_every_kind(resolved, monkeypatch):
    values = {"OVERWRITE": "TRUE", "PACK_TOKENS": "1k", "TOP_P": "0.5", "STOP": "a, b", "LIMIT": "3"}
    for name, value in values.items():
        monkeypatch.setenv(f"MARSINFER_{name}", value)
    monkeypatch.setenv("MARSINFER_PORT_80_TCP", "tcp://10.0.0.1:80")  # of a service, not ours
    config = resolved("in.jsonl", "out.jsonl", "--question", "q")
    assert (config.overwrite, config.pack_tokens, config.top_p) == (True, 1024, 0.5)
    assert (config.stop, config.limit) == (("a, b",), 3)


def test_a_stronger_place_takes_back_what_excludes_its_own(resolved, file):
    path = file('question_column = "q"\noverwrite = true\n[settings]\neta = 0.9\n')
    config = resolved("a", "b", "--config", path, "--question", "why?", "--resume", "--method", "dense")
    assert (config.question, config.question_column) == ("why?", None)
    assert (config.resume, config.overwrite) == (True, False)
    assert (config.method, config.settings) == ("dense", {})


def test_one_word_alone_is_what_the_file_lacks(resolved, file):
    path = file('question = "q"\ninput = ["a.jsonl", "b.jsonl"]\n')
    assert resolved("out.jsonl", "--config", path).output == "out.jsonl"
    path = file('question = "q"\noutput = "out.jsonl"\n')
    assert resolved("in.jsonl", "--config", path).input == ("in.jsonl",)


def test_an_output_that_is_named_twice_is_refused(refusal, file):
    path = file('question = "q"\noutput = "out.jsonl"\n')
    assert refusal("d1.jsonl", "d2.jsonl", "d3.jsonl", "--config", path, "--overwrite") == (
        f"the output is named twice: 'out.jsonl' in {path}, and 'd3.jsonl', the last of 3 words; leave one "
        "of them out"
    )


def test_one_word_is_no_guess_where_the_file_names_both(refusal, file):
    path = file('question = "q"\ninput = "in.jsonl"\noutput = "out.jsonl"\n')
    assert refusal("x.jsonl", "--config", path) == (
        f"--config {path} names input and output, and 'x.jsonl' could replace either: give both or neither"
    )


def test_a_missing_argument_says_where_it_can_stand(refusal, file):
    assert refusal("--question", "q") == "Missing argument 'INPUT...': give it, or --config FILE"
    assert refusal("in.jsonl") == "Missing argument 'OUTPUT': give it, or --config FILE"
    path = file('input = "in.jsonl"\n')
    expected = f"Missing argument 'OUTPUT': give it, or a line 'output = ...' in {path}"
    assert refusal("--config", path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_new_token = 1", "unknown key 'max_new_token' (did you mean 'max_new_tokens'?)"),
        ("log-format = 'json'", "log-format: --log-format can be given on the command line alone"),
        ("zzz = 1", "unknown key 'zzz'; known are text_column, question, "),
        ("seed = 1\nmax-new-tokens = '1'", "max-new-tokens = '1': must be a whole number"),
        ("max_new_tokens = true", "max_new_tokens = True: must be a whole number"),
        ("overwrite = 1", "overwrite = 1: must be true or false"),
        ("stop = [1]", "stop = [1]: must be a text or a list of texts"),
        ("settings = 1", "settings = 1: must be a table, [settings]"),
        (
            "[settings]\neta = 2020-01-01",
            "settings.eta = datetime.date(2020, 1, 1): must be a number, a text, or a list of one a layer",
        ),
        ("top-p = 1\ntop_p = 1", "top_p is set twice, with dashes and with underscores"),
        ("pack_tokens = 'lots'", "pack_tokens 'lots': give a whole number such as 8192, 32k or 1m"),
    ],
)
def test_a_key_or_value_that_cannot_be(refusal, file, text, message):
    path = file(text)
    assert refusal("a", "b", "--config", path).startswith(f"--config {path}: {message}")


def test_a_file_that_cannot_be_read(refusal, file, tmp_path):
    path = file("a = 1\nb = \n")
    expected = f"--config {path} is no TOML: Invalid value (at line 2, column 5)"
    assert refusal("a", "b", "--config", path) == expected
    gone = tmp_path / "gone.toml"
    assert refusal("a", "b", "--config", gone) == f"--config {gone} cannot be read: No such file or directory"
    path.write_bytes(b"a = '\xff'")
    assert refusal("a", "b", "--config", path) == f"--config {path} is not UTF-8 at byte 5"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEED", "one", "MARSINFER_SEED=one: must be a whole number"),
        ("QUIET", "1", "MARSINFER_QUIET: --quiet can be given on the command line alone"),
        ("RESUME", "yes", "MARSINFER_RESUME=yes: must be 1, 0, true or false"),
        ("TOP_P", "half", "MARSINFER_TOP_P=half: must be a number"),
        (
            "MAX_NEW_TOKEN",
            "1",
            "MARSINFER_MAX_NEW_TOKEN is no setting; did you mean MARSINFER_MAX_NEW_TOKENS?",
        ),
        (
            "OUTPUT",
            "x",
            "MARSINFER_OUTPUT: output cannot be set by the environment; give it as an argument",
        ),
    ],
)
def test_an_environment_that_cannot_be(refusal, monkeypatch, name, value, message):
    monkeypatch.setenv(f"MARSINFER_{name}", value)
    assert refusal("a", "b", "--question", "q") == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "0/4"], "--shard '0/4': the part must be between 1 and 4"),
        (["--shard", "1"], "--shard '1': write it as I/N, for example 1/4 for the first of four parts"),
        (["--limit", "0"], "--limit 0: must be a whole number of at least 1"),
        (["--sample", "-1"], "--sample -1: must be a whole number of at least 1"),
        (
            ["--max-errors", "few"],
            "--max-errors 'few': give a number of rows such as 20, or a share such as 5%",
        ),
        (["--max-errors", "101%"], "--max-errors '101%': a share is at most 100%"),
        (
            ["--retry-errors"],
            "--retry-errors needs --resume: it runs the failed rows of an earlier run again",
        ),
        (
            ["--resume", "--overwrite"],
            "--resume and --overwrite exclude each other: one continues what the other drops",
        ),
        (["--log-format", "xml"], "--log-format 'xml': choose from text, json"),
        (
            ["--dry-run", "--show-prompt", "1"],
            "--dry-run and --show-prompt exclude each other: each prints on stdout",
        ),
    ],
)
def test_a_flag_that_cannot_work(refusal, flags, message):
    assert refusal("a.jsonl", "b.jsonl", "--question", "q", *flags) == message


def test_a_bound_on_errors_is_a_count_or_a_share():
    assert parse_max_errors("20") == (20.0, False)
    assert parse_max_errors("0") == (0.0, False)
    assert parse_max_errors("2.5 %") == (2.5, True)


def test_the_defaults_in_the_help_are_the_configurations():
    flags = inspect.signature(batch).parameters
    for field in fields(BatchConfig):
        if field.name not in ("input", "output", "settings", "stop", "template_arg"):
            assert flags[field.name].default == field.default, field.name


def test_toml_comes_back_as_it_was(file):
    config = BatchConfig(
        input=("in dir/*.jsonl", "b"),
        output='o"u\\t.jsonl',
        question="a\n'b'\t\"c\" é \x7f \x01 🐟",
        stop=("\n",),
        template_arg=("enable_thinking=false", 'form={"a": [1, null]}'),
        temperature=1e-05,
        pack_tokens=1,
        max_errors="5%",
        overwrite=True,
        method="marsinfer",
        settings={"eta": "0.9", "share": (0.5, 1), "odd key": True, "window": 8},
    )
    assert BatchConfig(**read_config(str(file(to_toml(config))))) == config


def test_verbose_prints_what_config_reads(call, seen, file, capfd, monkeypatch):
    flags = ["--question", "why?", "--set", "eta=0.9", "--limit", "2", "--pack-tokens", "2k"]
    assert call("in.jsonl", "out.jsonl", *flags, "--verbose", "--quiet") == 130
    printed = capfd.readouterr().err.replace(
        "marsinfer: error: interrupted; no row of this run was answered\n", ""
    )
    monkeypatch.delenv("MARSINFER_MODEL")
    monkeypatch.delenv("MARSINFER_METHOD")
    assert call("--config", file(printed)) == 130
    first, second = seen
    assert first == second
    assert first.limit == 2


def test_a_config_may_be_a_pipe(resolved, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = 'input = "a.jsonl"\noutput = "b.jsonl"\nquestion = "why?"\n'
    threading.Thread(target=lambda: pipe.write_text(text), daemon=True).start()
    assert resolved("--config", pipe).question == "why?"


def test_a_run_from_a_file_alone(call, fish, file, tmp_path, capfd):
    out = tmp_path / "out.jsonl"
    path = file(
        f'input = "{fish}"\noutput = "{out}"\ntext-column = "body"\nquestion-column = "ask"\n'
        "max-new-tokens = 3\nmethod = 'marsinfer'\n[settings]\nstart_layer = 1\nwindow = 8\n"
    )
    assert call("--config", path, "--quiet") == 0
    assert [json.loads(line)["status"] for line in out.open()] == ["ok"] * 3
    assert capfd.readouterr().err == ""
