"""The guard of a profile: which rows run dense, why, and that nothing else of them changes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from conftest import document

from marsinfer_cli.app import run
from pipeline.guard import SHARES, Guard, spoken_for
from pipeline.model.loading import open_model
from pipeline.profile import Profile, write_profile
from pipeline.records import Answer
from pipeline.settings.model import ModelSettings

pytestmark = pytest.mark.slow

SETTINGS = {"eta": 0.5, "start_layer": 1, "prefix": 0, "window": 4}
ROWS = [
    {"doc": "a", "text": "one fish two fish " * 6, "ask": "how many?", "kind": "count"},
    {"doc": "b", "text": "red fish " * 20, "ask": "what colour?", "kind": "colour"},
    {"doc": "c", "text": "blue fish, old fish " * 30, "ask": "how many?", "kind": "count"},
]


def scored(prompt_tokens, **shares):
    return SimpleNamespace(prompt_tokens=prompt_tokens, **dict.fromkeys(SHARES, 0.5) | shares)


def guard_of(about):
    return Guard.of(Profile(about=about, batch={}))


def answer(prompt_tokens, method="marsinfer", **shares):
    values = dict.fromkeys(SHARES, 0.5) | shares
    return Answer(id="x", row=0, method=method, prompt_tokens=prompt_tokens, **values)


def test_what_is_kept_is_held_against_the_nearest_length():
    scores = [scored(1000, ffn_ratio=0.6), scored(1020, ffn_ratio=0.8), scored(40_000, ffn_ratio=0.3)]
    guard = guard_of({"guard": spoken_for(["qa", "qa"], scores)})
    assert guard.tasks == {"qa"}
    assert guard.most["ffn_ratio"] == {512: 0.8, 32768: 0.3}
    assert guard.after(answer(900, ffn_ratio=0.81)) is None
    assert guard.after(answer(900, ffn_ratio=0.83)) == (
        "flat attention: ffn_ratio is 0.83, and at most 0.80 was calibrated on"
    )
    assert str(guard.after(answer(33_000, ffn_ratio=0.5))).startswith("flat attention: ffn_ratio is 0.50")
    assert guard.after(answer(33_000, method="dense", ffn_ratio=1.0)) is None
    assert guard.after(Answer(id="x", row=0, status="error")) is None


def test_a_share_that_was_whole_is_never_exceeded():
    guard = guard_of({"guard": spoken_for([], [scored(100, kept_ratio=1.0)])})
    assert guard.after(answer(100, kept_ratio=1.0)) is None
    assert guard.tasks == frozenset()


def test_a_profile_without_a_guard_speaks_for_all():
    guard = guard_of({})
    assert guard.before(document(300)) is None
    assert guard.after(answer(300, ffn_ratio=1.0)) is None


def test_tasks_and_lengths_are_told_beforehand():
    guard = guard_of({"guard": {"tasks": ["qa"]}, "lengths": {"max": 200}})
    plain = document(300)
    assert guard.before(plain) is None  # the row says no task
    asked = replace(plain, source=replace(plain.source, task="summary"))
    assert guard.before(asked) == "task: the profile was not calibrated on 'summary'"
    assert str(guard.before(document(301))).startswith("length: 301 tokens are far beyond the 200 ")


@pytest.fixture
def batch(tmp_path, sharp_model_folder):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def call(name, *flags):
        out = tmp_path / f"{name}.parquet"
        words = ["batch", source, out, "--id-column", "doc", "--question-column", "ask", "--quiet"]
        words += ["--model", sharp_model_folder, "--max-new-tokens", "4", "--task-column", "kind", *flags]
        code = run([str(word) for word in words])
        return {row["id"]: row for row in pq.read_table(out).to_pylist()} if code == 0 else code

    return call


@pytest.fixture
def profile(tmp_path, sharp_model_folder):
    def write(name="p", **guard):
        model = open_model(ModelSettings(model=str(sharp_model_folder), device="cpu"))
        about = {
            "format": 1,
            "model": model.name,
            "fingerprint": model.fingerprint,
            "device": model.device_name(),
            "dtype": "float32",
            "lengths": {"max": 10_000},
            "guard": guard,
        }
        path = tmp_path / f"{name}.toml"
        write_profile(path, Profile(about=about, batch={"method": "marsinfer", "settings": SETTINGS}))
        return path

    return write


def test_rows_of_other_tasks_and_flat_ones_run_dense(batch, profile):
    dense = batch("dense", "--method", "dense")
    off = batch("off", "--profile", profile(tasks=["count"]), "--guard", "off")
    assert {row["method"] for row in off.values()} == {"marsinfer"}
    assert all(row["guard"] is None for row in off.values())
    assert all(row["ffn_ratio"] < 1 for row in off.values())
    octave = {row["prompt_tokens"].bit_length() - 1 for row in off.values()}
    most = {str(1 << n): 1.0 for n in octave}
    flat = 1 << (off["c"]["prompt_tokens"].bit_length() - 1)
    most[str(flat)] = 0.01
    kept = batch("kept", "--profile", profile(tasks=["count"], ffn_ratio=most))
    assert kept["b"]["guard"] == "task: the profile was not calibrated on 'colour'"
    assert kept["c"]["guard"].startswith("flat attention: ffn_ratio is 0.")
    assert (kept["a"]["method"], kept["a"]["guard"]) == ("marsinfer", None)
    assert kept["a"]["answer"] == off["a"]["answer"]
    for name in "bc":
        assert (kept[name]["method"], kept[name]["ffn_ratio"]) == ("dense", 1)
        assert kept[name]["answer"] == dense[name]["answer"]


def test_settings_above_the_profile_have_no_guard(batch, profile, capfd):
    rows = batch("above", "--profile", profile(tasks=["count"]), "--set", "eta=0.4")
    assert {row["method"] for row in rows.values()} == {"marsinfer"}
    assert "other settings stand above the profile's, which was not verified with them: no guard" in (
        capfd.readouterr().err
    )


def test_a_run_is_not_resumed_under_another_guard(batch, profile, capfd):
    assert batch("out", "--profile", profile(tasks=["count"]))
    assert batch("out", "--profile", profile(tasks=["count"]), "--guard", "off", "--resume") == 2
    assert "guard" in capfd.readouterr().err
