"""Every setting is declared in one place, and all that takes settings has it from there."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import typer
from commands import commands, options

from marsinfer_cli.app import run
from marsinfer_cli.signature import takes
from pipeline.settings.answer_settings import SamplingSettings
from pipeline.settings.bench_settings import AccuracyConfig, ThroughputConfig
from pipeline.settings.calibrate_settings import CalibrateConfig
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.console_settings import BatchSwitches, CheckSwitches
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.method_settings import MethodSettings
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.option import MODEL, PANELS, Settings, option, settings_of
from pipeline.settings.prompt_settings import PromptSettings
from pipeline.settings.run_settings import BatchConfig, OverwriteSettings
from pipeline.settings.sources import CONFIGURED, merge, read_config, read_environment, taken

CONFIGS = (BatchConfig, CheckConfig, CalibrateConfig, AccuracyConfig, ThroughputConfig)
# what a command's configuration says of a default that another has otherwise
OVERRIDDEN = {
    BatchConfig: {"max_new_tokens": None, "on_overlong": None},
    CheckConfig: {"on_overlong": "truncate-middle"},
    CalibrateConfig: {
        "on_overlong": "truncate-middle",
        "max_new_tokens": 32,
        "limit": 1000,
        "max_drop": "2pt",
        "out": "profile.toml",
        "needle_count": 200,
    },
    AccuracyConfig: {
        "on_overlong": "truncate-middle",
        "max_new_tokens": 64,
        "methods": "mars,marsinfer,sliminfer,uniprefill,fastkv,gemfilter",
    },
    ThroughputConfig: {"max_new_tokens": 32},
}


def below(cls):
    for each in cls.__subclasses__():
        yield each
        yield from below(each)


def test_no_two_groups_declare_the_same_setting():
    declared = {}
    several = {"row"}  # of the input of `bench ttft` by its number, of an output of `report` by its id
    for cls in dict.fromkeys(below(Settings)):
        inherited = {each.name for base in cls.__bases__ for each in fields(base)}
        for name in cls.__annotations__.keys() - inherited - several - {"renamed"}:
            assert name not in declared, f"{name} of {cls.__name__} and {declared[name].__name__}"
            declared[name] = cls
    assert len(declared) > 90


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_command_has_other_defaults_only_where_its_class_says_so(cls):
    groups = [each for each in below(Settings) if issubclass(cls, each) and "Config" not in each.__name__]
    usual = {}
    for group in groups:
        own = {each.name for base in group.__bases__ for each in fields(base)}
        usual |= {each.name: each for each in settings_of(group) if each.name not in own}
    found = {each.name: each for each in settings_of(cls)}
    differing = {name: found[name].default for name in usual if found[name].default != usual[name].default}
    assert differing == OVERRIDDEN[cls]
    assert all(found[name].about is usual[name].about for name in usual)  # and nothing but defaults


@pytest.mark.parametrize("words", ["batch", "check", "calibrate", "bench accuracy", "bench batch"])
def test_a_command_has_the_flags_of_its_settings(words):
    groups = [DataSettings, PromptSettings, ModelSettings]
    groups += [SamplingSettings] if words in ("batch", "check", "bench batch") else []
    groups += [MethodSettings] if words in ("batch", "check") else []
    flags = {flag for each in options(commands()[words]) for flag in each.opts}
    wanted = {each.flag for group in groups for each in settings_of(group) if each.about.panel}
    assert wanted - flags == set()


def test_every_setting_has_a_panel_a_help_and_a_default_in_words():
    for cls in (*CONFIGS, BatchSwitches, CheckSwitches):
        for each in settings_of(cls):
            assert each.about.panel in (None, *PANELS), each.name
            assert each.about.help.endswith("."), each.name
            assert each.about.panel is None or each.kind.flag_type is bool or each.shown_default, each.name


def test_all_that_a_command_reads_from_files_is_known_there():
    known = {each.name for cls in CONFIGURED for each in settings_of(cls) if each.about.in_file}
    for cls in CONFIGS:
        assert {each.name for each in settings_of(cls) if each.about.in_file} <= known


class Widened(ModelSettings):
    """A group with one more setting: this line is all that it takes."""

    shards: int = option(4, help="Shards.", least=1, panel=MODEL)


def test_a_new_setting_is_one_line(monkeypatch, tmp_path, capsys):
    app = typer.Typer()

    @app.command()
    @takes(Widened)
    def show(settings: Widened) -> None:
        """Print the settings."""
        typer.echo(json.dumps(settings.resolved()))

    def call(*words):
        app(words, standalone_mode=False)
        return json.loads(capsys.readouterr().out)["shards"]

    monkeypatch.setattr("pipeline.settings.sources.CONFIGURED", (*CONFIGURED, Widened))
    assert call() == 4
    assert call("--shards", "5") == 5
    monkeypatch.setenv("MARSINFER_SHARDS", "6")
    assert call() == 6
    path = tmp_path / "run.toml"
    path.write_text("shards = 7")
    assert taken(Widened, read_config(str(path)), print) == {"shards": 7}
    with pytest.raises(Exception, match=r"^--shards 0: must be a whole number of at least 1$"):
        call("--shards", "0")
    app(["--help"], standalone_mode=False)
    assert "Shards. [default: 4]" in " ".join(capsys.readouterr().out.split())


def test_the_environment_acts_on_every_command(monkeypatch, tmp_path, capfd):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "fish"}\n')
    out = tmp_path / "out.parquet"
    monkeypatch.setenv("MARSINFER_METHOD", "nope")
    for words in (["batch", path, out, "--question", "q"], ["check", path, "--question", "q"]):
        assert run(list(map(str, words))) == 2
        assert capfd.readouterr().err.startswith("marsinfer: error: unknown method 'nope'")
    monkeypatch.delenv("MARSINFER_METHOD")
    monkeypatch.setenv("MARSINFER_DTYPE", "float8")
    profile = tmp_path / "profile.toml"
    calls = [
        ["batch", path, out, "--question", "q"],
        ["check", path, "--question", "q"],
        ["calibrate", path, "--question", "q", "--out", profile],
        ["bench", "accuracy", path, "--question", "q"],
        ["bench", "batch", path],
        ["bench", "ttft"],
        ["bench", "attention"],
    ]
    for words in calls:
        assert run(list(map(str, words))) == 2, words
        assert capfd.readouterr().err.startswith("marsinfer: error: --dtype 'float8': choose from ")


def test_one_file_serves_several_commands(tmp_path):
    path = tmp_path / "night.toml"
    path.write_text(
        'input = "in.jsonl"\noutput = "out.parquet"\nquestion = "q"\nrope-scaling = "yarn:2"\nseed = 7\n'
        'order = "completion"\nmax-drop = "2pt"\nneedle-kinds = "single,tracking"\n'
        'needle-lengths = ["8k", 512]\nmethod = "marsinfer"\n'
        "[settings]\neta = 0.9\n"
    )
    values = read_config(str(path))
    batch = BatchConfig(**taken(BatchConfig, values, print))
    check = CheckConfig(**merge(taken(CheckConfig, values, print), {}))
    needles = {"suite": ("needles",), "out": str(tmp_path / "p.toml")}
    calibration = CalibrateConfig(**taken(CalibrateConfig, values, print), **needles)
    for config in (batch, check, calibration):
        assert (config.input, config.question) == (("in.jsonl",), "q")
        assert (config.rope_scaling, config.seed) == ("yarn:2", 7)
    assert batch.settings == check.settings == {"eta": 0.9}
    assert check.max_drop == calibration.max_drop == "2pt"
    assert calibration.needle_kinds == ("single", "tracking")
    assert calibration.needle_lengths == (8192, 512)
    assert "order" not in taken(CheckConfig, values, print)


def test_a_nightly_file_does_not_stand_in_the_way_of_a_check(tmp_path):
    night = {"input": ("in.jsonl",), "question_column": "q", "id_column": "id", "seed": 1, "resume": True}
    night |= {"overwrite": True, "sample": 9}
    assert "resume" not in taken(CheckConfig, night, print)
    assert "overwrite" not in taken(CalibrateConfig, night, print)
    assert taken(BatchConfig, night, print) == night
    suite = f"leval:{tmp_path}"
    rows = taken(CheckConfig, night, print)
    # a suite takes the place of the file's rows, needles are hidden in their documents
    assert merge(rows, {"suite": (suite,)}) == {"seed": 1, "suite": (suite,)}
    hidden = {"input": ("in.jsonl",), "seed": 1, "sample": 9, "suite": ("needles",)}
    assert merge(rows, {"suite": ("needles",)}) == hidden
    assert merge({"needle_count": 9, **hidden}, {"suite": (suite,)}) == {"seed": 1, "suite": (suite,)}
    # a bound of INPUT's rows that is meant for a command with some, wherever a suite is named
    assert merge({"suite": (suite,), "sample": 9}, {"shard": "1/2"}, {}) == {"suite": (suite,)}
    assert merge({"suite": (suite,)}, {"sample": 9}) == {"suite": (suite,), "sample": 9}
    asked = {"suite": (suite,), "reference_column": "answer"}
    assert merge(rows, asked) == {**rows, **asked}
    for given in ({"suite": (suite,)}, {"suite": ("needles",)}, asked, {}):
        assert CheckConfig(**merge(rows, given)).seed == 1


def test_the_environment_holds_lists_and_sizes():
    given = {"MARSINFER_NEEDLE_LENGTHS": "1k,512", "MARSINFER_TASKS": "a, b", "MARSINFER_PACK_TOKENS": "2k"}
    values = read_environment(given)
    assert values == {"needle_lengths": (1024, 512), "tasks": ("a", "b"), "pack_tokens": 2048}
    assert taken(OverwriteSettings, values, print) == {}
