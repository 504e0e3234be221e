"""The guard of a profile at work: which rows run dense, why, and that nothing else of them changes."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from marsinfer_cli.app import run
from pipeline.model.loading import UnloadedModel, open_model
from pipeline.settings.model_settings import ModelSettings
from pipeline.setup.profile import Profile, write_profile

pytestmark = pytest.mark.slow

SETTINGS = {"eta": 0.5, "start_layer": 1, "prefix": 0, "window": 4}
ROWS = [
    {"doc": "a", "text": "one fish two fish " * 6, "ask": "how many?", "kind": "count"},
    {"doc": "b", "text": "red fish " * 20, "ask": "what colour?", "kind": "colour"},
    {"doc": "c", "text": "blue fish, old fish " * 30, "ask": "how many?", "kind": "count"},
]


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


def test_rows_of_other_tasks_and_flat_ones_run_dense(batch, profile, capfd):
    dense = batch("dense", "--method", "dense")
    off = batch("off", "--profile", profile(tasks=["count"]), "--guard", "off")
    assert {row["method"] for row in off.values()} == {"marsinfer"}
    assert all(row["guard"] is None for row in off.values())
    assert all(row["ffn_ratio"] < 1 for row in off.values())
    most = {str(row["prompt_tokens"]): 1.0 for row in off.values()}
    most[str(off["c"]["prompt_tokens"])] = 0.01
    capfd.readouterr()
    kept = batch("kept", "--profile", profile(tasks=["count"], shares={"ffn_ratio": most}), "--json")
    summary = json.loads(capfd.readouterr().out)
    assert kept["b"]["guard"] == "task: the profile was not verified on 'colour'"
    assert kept["c"]["guard"].startswith("flat attention: ffn_ratio is 0.")
    assert (kept["a"]["method"], kept["a"]["guard"]) == ("marsinfer", None)
    assert kept["a"]["answer"] == off["a"]["answer"]
    for name in "bc":
        assert (kept[name]["method"], kept[name]["ffn_ratio"]) == ("dense", 1)
        assert kept[name]["answer"] == dense[name]["answer"]
    assert (summary["guarded_by_task"], summary["guarded_by_length"]) == (1, 0)
    assert summary["guarded_by_attention"] == 1
    assert 0 < summary["second_prefill_s"] < summary["prefill_s"]


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


def test_a_profile_says_nothing_of_keys_and_values_in_fp8(batch, profile, capfd, monkeypatch):
    monkeypatch.setattr(UnloadedModel, "check_fp8", lambda self: None)  # which a CPU can, slowly
    rows = batch("kv", "--profile", profile(tasks=["count"]), "--kv-dtype", "fp8")
    assert (rows["a"]["method"], rows["b"]["method"]) == ("marsinfer", "dense")  # the guard is there
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert "the profile was verified with keys and values in --dtype, not in fp8" in capfd.readouterr().err
