"""Profiles: written, read back, refused for another model, and below every other place of a setting."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from pipeline import run_batch
from pipeline.errors import ConfigError
from pipeline.families.exit_maps import MapsHeader, write_exit_maps
from pipeline.model.loading import open_model
from pipeline.pruning.registry import make_method
from pipeline.settings.model_settings import ModelSettings
from pipeline.setup.profile import Profile, check_profile, length_note, load_profile, write_profile

GATE = {"bound": "2%", "verdict": "pass", "low": float("-inf"), "high": 1.5}
SETTINGS = {"eta": (0.9, 1.0, 0.5, 1.0), "start_layer": 0, "low": None, "sparse_attention": 0.9}


@pytest.fixture
def profile(model_folder):
    model = open_model(ModelSettings(model=str(model_folder), device="cpu"))
    about = {
        "format": 2,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "device": model.device_name(),
        "dtype": "float32",
        "lengths": {"min": 10, "p50": 20, "max": 100},
        "measured": {"speed_up": 1.5, "gates": {"token-accuracy": GATE}},
        "ladder": [
            {"rung": "dense linears:fp8", "verdict": "pass", "gates": {"token-accuracy": GATE}},
            {"rung": "marsinfer", "verdict": "given up", "gates": {}},
            {"rung": "fastkv", "verdict": "not tested"},
        ],
    }
    batch = {
        "method": "marsinfer",
        "linear_dtype": "auto",
        "settings": SETTINGS,
    }
    return Profile(about=about, batch=batch)


@pytest.fixture
def path(tmp_path, profile):
    path = tmp_path / "profile.toml"
    write_profile(path, profile)
    return path


def test_a_profile_comes_back(path, profile):
    read = load_profile(str(path))
    ladder = read.about["ladder"]
    assert ladder == [profile.about["ladder"][0], {"rung": "marsinfer", "verdict": "given up"}, *ladder[2:]]
    assert {**read.about, "ladder": None} == {**profile.about, "ladder": None}
    assert read.is_proven
    assert read.batch == {**profile.batch, "settings": {**SETTINGS, "low": "none"}}
    method = make_method(read.batch["method"], read.batch["settings"])
    assert method == make_method("marsinfer", SETTINGS)


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("verdict", ["inconclusive", "fail", None])
def test_a_profile_with_a_gate_that_did_not_pass_is_refused_by_name(tmp_path, profile, format, verdict):
    path = tmp_path / "p.toml"
    gates = {"token-accuracy": GATE, "needles-single": {"bound": "2pt", "verdict": verdict}}
    measured = {"speed_up": 1.5, "gates": gates}
    write_profile(path, replace(profile, about={**profile.about, "format": format, "measured": measured}))
    with pytest.raises(ConfigError) as refused:
        load_profile(str(path))
    shown = verdict or "none"
    assert str(refused.value) == (
        f"--profile {path} did not pass its gate needles-single (bound 2pt: {shown}): calibrate again"
    )


def test_a_profile_of_before_is_read_and_said_to_have_passed_a_weaker_gate(tmp_path, profile, model_folder):
    path = tmp_path / "p.toml"
    write_profile(path, replace(profile, about={**profile.about, "format": 1}))
    read = load_profile(str(path))
    assert not read.is_proven
    model = open_model(ModelSettings(model=str(model_folder), device="cpu"))
    assert check_profile("p", read, model) == [
        "the profile is of format 1, which was held to a weaker gate than profiles are today: calibrate again"
    ]


@pytest.mark.parametrize("measured", [3, {"gates": 3}, {"gates": {"token-accuracy": 3}}, {}])
def test_what_tells_no_gates_is_read_and_is_not_proven(tmp_path, profile, measured):
    path = tmp_path / "p.toml"
    write_profile(path, replace(profile, about={**profile.about, "measured": measured}))
    assert not load_profile(str(path)).is_proven


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("measured", {"speed_up": "fast"}, "measured.speed_up must be a number above 0, not 'fast'"),
        ("measured", {"gates": {"g": {**GATE, "high": 60.0}}}, "gate g, whose drop is up to 60.0"),
        ("lengths", {"max": "long"}, "lengths.max must be a whole number from 1, not 'long'"),
        ("guard", {"tasks": "abc"}, "guard.tasks must be a list of texts, not 'abc'"),
        ("guard", {"shares": {"kept_ratio": {"x": 1}}}, "guard.shares.kept_ratio must be a table of shares"),
    ],
)
def test_tables_that_cannot_be_are_refused_by_name(tmp_path, profile, name, value, complaint):
    write_profile(tmp_path / "p.toml", replace(profile, about={**profile.about, name: value}))
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        load_profile(str(tmp_path / "p.toml"))


def test_other_exit_maps_than_were_tested_are_refused(tmp_path, model_folder, profile):
    model = open_model(ModelSettings(model=str(model_folder), device="cpu"))
    maps = tmp_path / "maps.safetensors"
    about = MapsHeader(fingerprint=model.fingerprint, last_full=2, tokens=9)
    write_exit_maps(maps, about, {4: (torch.zeros(2, 2), torch.zeros(2))})
    batch = {"method": "mars", "settings": {"last_full": 2, "exit_maps": str(maps)}}
    told = {**profile.about, "exit_maps": MapsHeader.of(str(maps)).digest}
    write_profile(tmp_path / "p.toml", Profile(about=told, batch=batch))
    path = str(tmp_path / "p.toml")
    assert check_profile(path, load_profile(path), model) == []
    beside = tmp_path / "p.exit-maps.safetensors"
    write_exit_maps(beside, about, {4: (torch.ones(2, 2), torch.zeros(2))})
    with pytest.raises(ConfigError, match="was calibrated with other exit maps than"):
        check_profile(path, load_profile(path), model)


def test_another_model_is_refused_and_another_device_noted(path, profile, model_folder, sharp_model_folder):
    model = open_model(ModelSettings(model=str(model_folder), device="cpu"))
    assert check_profile("p", profile, model) == []
    elsewhere = replace(profile, about={**profile.about, "device": "NVIDIA H200", "dtype": "bfloat16"})
    device, dtype = check_profile("p", elsewhere, model)
    assert device.startswith(f"the profile was calibrated on NVIDIA H200, and this is {model.device_name()}")
    assert dtype == "the profile was calibrated in bfloat16, and this run is in float32"
    other = replace(profile, about={**profile.about, "fingerprint": "files:0123456789"})
    with pytest.raises(ConfigError) as refused:
        check_profile("p.toml", other, model)
    assert str(refused.value) == (
        f"--profile p.toml was calibrated for {model.name} (files:012345), not for {model.name} "
        f"({model.fingerprint[:12]}): calibrate this model, or leave the profile out"
    )


def test_lengths_far_beyond_are_noted(profile):
    assert length_note(profile, 150) is None
    assert "a prompt of 151 tokens is far beyond the 100" in str(length_note(profile, 151))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[profile", "is no TOML"),
        ("[batch]\n", "has no tables [profile] and [batch]"),
        (
            "[profile]\nformat = 9\n[batch]\n",
            "is of format 9, and this version reads 1 and 2: calibrate again",
        ),
        ("[profile]\nformat = 2\n[batch]\n", "does not say model, fingerprint, device, dtype"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, text, complaint):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_profile(str(path))
    assert str(refused.value).startswith(f"--profile {path} ")
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("max-new-tokens = 3", "unknown key 'max-new-tokens' in [batch]"),
        ("settings = 3", "settings in [batch] must be a table"),
    ],
)
def test_a_profile_holds_no_other_settings(path, line, complaint):
    text = path.read_text().replace("[batch.settings]", "[other]").replace("[batch]", f"[batch]\n{line}")
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"profile\.toml") as refused:
        load_profile(str(path))
    assert complaint in str(refused.value)


def run(call, fish, tmp_path, *flags):
    out = tmp_path / "out.jsonl"
    columns = ["--text-column", "body", "--question-column", "ask", "--id-column", "doc"]
    rc = call(fish, out, *columns, "--max-new-tokens", "3", "--overwrite", "--quiet", *flags)
    return rc, json.loads((tmp_path / "out.jsonl.run.json").read_text())["marsinfer"] if rc == 0 else None


def method_of(metadata):
    return metadata["settings_that_decide"]["method"]


def test_batch_takes_a_profile_and_names_it(call, fish, tmp_path, path, capfd, monkeypatch):
    monkeypatch.delenv("MARSINFER_METHOD")
    rc, metadata = run(call, fish, tmp_path, "--profile", path, "--guard", "off")
    assert rc == 0
    assert metadata["config"]["profile"] == str(path)
    assert method_of(metadata)["name"] == "marsinfer"
    assert method_of(metadata)["settings"]["eta"] == [0.9, 1.0, 0.5, 1.0]
    # the longest of the rows has more than 1.5 times 100 tokens
    notes = [line for line in capfd.readouterr().err.splitlines() if "note: " in line]
    assert len(notes) == 1
    assert "is far beyond the 100 that the profile was calibrated on" in notes[0]


def test_every_other_place_stands_above_a_profile(call, fish, tmp_path, path, monkeypatch):
    monkeypatch.delenv("MARSINFER_METHOD")
    config = tmp_path / "run.toml"
    config.write_text(f'profile = "{path}"\n[settings]\nstart_layer = 2\n')
    _, metadata = run(call, fish, tmp_path, "--config", config)
    settings = method_of(metadata)["settings"]
    assert (settings["start_layer"], settings["eta"]) == (2, [0.9, 1.0, 0.5, 1.0])
    _, metadata = run(call, fish, tmp_path, "--profile", path, "--set", "eta=0.7")
    assert method_of(metadata)["settings"]["eta"] == 0.7
    _, metadata = run(call, fish, tmp_path, "--profile", path, "--sparse-attention", "0.5")
    assert method_of(metadata)["settings"]["sparse_attention"] == 0.5
    monkeypatch.setenv("MARSINFER_METHOD", "dense")
    _, metadata = run(call, fish, tmp_path, "--profile", path)
    assert method_of(metadata) == {"name": "dense", "settings": {"sparse_attention": None}}


def test_batch_refuses_a_profile_of_another_model(refusal, fish, tmp_path, path, sharp_model_folder):
    message = refusal(
        fish, tmp_path / "o.jsonl", "--question", "q", "--text-column", "body",
        "--profile", path, "--model", sharp_model_folder,
    )  # fmt: skip
    assert message.startswith(f"--profile {path} was calibrated for ")


def test_run_batch_takes_a_profile(fish, tmp_path, path, model_folder):
    columns = {"text_column": "body", "question_column": "ask", "id_column": "doc"}
    options = {**columns, "model": str(model_folder), "max_new_tokens": 2, "profile": str(path)}
    run_batch(str(fish), str(tmp_path / "a.jsonl"), **options)
    metadata = json.loads((tmp_path / "a.jsonl.run.json").read_text())["marsinfer"]
    assert method_of(metadata)["settings"]["eta"] == [0.9, 1.0, 0.5, 1.0]
    run_batch(str(fish), str(tmp_path / "b.jsonl"), method="dense", **options)
    metadata = json.loads((tmp_path / "b.jsonl.run.json").read_text())["marsinfer"]
    assert method_of(metadata)["name"] == "dense"
