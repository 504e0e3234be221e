"""The method of a run that names none."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.auto import choose, device_class, keep_profile, profile_folder, proven
from pipeline.setup.profile import Profile, write_profile
from pipeline.texts.toml import toml_of


@dataclass
class Model:
    """As much of a model as is asked."""

    name: str = "m.gguf"
    fingerprint: str = "content:123456789abcdef"
    dtype: torch.dtype = torch.bfloat16
    rope_scaling: str | None = None
    device_named: str = "NVIDIA H100 PCIe"
    device: Any = field(default_factory=lambda: torch.device("cuda"))

    def device_name(self) -> str:
        return self.device_named


def profile_of(*verdicts: str, speed_up: float = 2.0, mass: float = 0.9, **about: Any) -> Profile:
    gates = {f"gate-{n}": {"verdict": verdict} for n, verdict in enumerate(verdicts)}
    told = {
        "format": 2,
        "model": "m.gguf",
        "fingerprint": "content:123456789abcdef",
        "device": "NVIDIA H100 80GB HBM3",
        "dtype": "bfloat16",
        "lengths": {"max": 32000},
        "measured": {"speed_up": speed_up, "gates": gates},
        **about,
    }
    batch = {"method": "mars", "linear_dtype": "mixed", "settings": {"sparse_attention": mass}}
    return Profile(about=told, batch=batch)


CONFIG = BatchConfig(input=("in.parquet",), output="out.parquet", question="?")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_a_proven_profile_of_this_model_and_device_is_taken():
    path = keep_profile(profile_of("pass", "pass"))
    chosen = choose(CONFIG, Model(), None)
    assert chosen.method == Mars(sparse_attention=0.9)
    config = chosen.config
    assert (config.method, config.linear_dtype, config.profile) == ("mars", "mixed", str(path))
    assert config.group == "any"  # dense may answer what it answers faster: nobody asked for mars
    assert chosen.guard.longest == 32000
    assert chosen.notes[0].startswith("--method auto: mars with --linear-dtype mixed, 2.00 times as fast")
    assert choose(replace(CONFIG, guard="off"), Model(), None).guard is None


def test_the_fastest_of_several_is_taken():
    for number, speed_up in enumerate((1.2, 1.9, 1.5)):
        profile_folder().mkdir(parents=True, exist_ok=True)
        write_profile(
            profile_folder() / f"{number}.toml", profile_of("pass", speed_up=speed_up, mass=speed_up / 2)
        )
    assert choose(CONFIG, Model(), None).method == Mars(sparse_attention=0.95)


@pytest.mark.parametrize(
    ("profile", "model"),
    [
        (profile_of("pass", "inconclusive"), Model()),
        (profile_of("pass", "fail"), Model()),
        (profile_of(), Model()),  # never held against dense
        (profile_of("pass", format=1), Model()),  # held to a weaker gate
        (profile_of("pass"), Model(fingerprint="content:else")),
        (profile_of("pass"), Model(device_named="NVIDIA A100-SXM4-80GB")),
        (profile_of("pass"), Model(dtype=torch.float16)),
        (profile_of("pass"), Model(rope_scaling="yarn:4")),
    ],
)
def test_what_is_not_proven_for_this_run_is_not_taken(profile, model):
    profile_folder().mkdir(parents=True)
    write_profile(profile_folder() / "p.toml", profile)
    (profile_folder() / "odd.toml").write_text("no profile = [")
    chosen = choose(CONFIG, model, None)
    assert (chosen.method, chosen.config.method, chosen.guard) == (Dense(), "dense", None)
    assert "dense, as no profile" in chosen.notes[0]
    assert "`marsinfer calibrate in.parquet" in chosen.notes[0]
    with pytest.raises(ConfigError, match="no method is named, and there is no proven profile of"):
        proven(CheckConfig(input=("in.parquet",), question="?"), model)


@pytest.mark.parametrize(
    ("about", "settings"),
    [
        ({"measured": {"speed_up": "fast", "gates": {"g": {"verdict": "pass"}}}}, {}),
        ({"guard": {"tasks": 3}}, {}),
        ({"measured": {"speed_up": 0.5, "gates": {"g": {"verdict": "pass"}}}}, {}),  # slower than dense
        ({}, {"gone": 1}),  # of another version
        ({}, {"exit_maps": "missing.safetensors"}),
    ],
)
def test_a_profile_that_cannot_be_used_costs_no_run_that_did_not_name_it(about, settings):
    profile_folder().mkdir(parents=True)
    profile = profile_of("pass", **about)
    batch = {**profile.batch, "linear-dtype": profile.batch["linear_dtype"], "settings": settings}
    del batch["linear_dtype"]
    content = toml_of({"profile": dict(profile.about), "batch": batch})
    (profile_folder() / "p.toml").write_text(content)
    assert choose(CONFIG, Model(), None).config.method == "dense"


def test_precisions_that_are_asked_for_stand_above_a_profile():
    keep_profile(profile_of("pass"))
    chosen = choose(replace(CONFIG, linear_dtype="fp8"), Model(), None)
    assert (chosen.method, chosen.config.linear_dtype) == (Dense(), "fp8")
    with pytest.raises(ConfigError, match="name it with --method"):
        replace(CONFIG, settings={"eta": 0.9})


def test_keys_and_values_in_fp8_are_no_part_of_what_was_proven():
    keep_profile(profile_of("pass"))
    chosen = choose(replace(CONFIG, kv_dtype="fp8"), Model(), None)
    assert (chosen.method, chosen.config.kv_dtype) == (Dense(), "fp8")
    assert chosen.notes == ("--method auto: dense, as settings are given that no profile was proven with",)


def test_a_run_that_goes_on_keeps_its_method_whatever_was_proven_since():
    keep_profile(profile_of("pass"))
    first = choose(CONFIG, Model(), None)
    begun = {
        "method": {"name": "mars", "settings": {"sparse_attention": [0.8, 0.9], "window": 64}},
        "model": {"linear_dtype": "mixed"},
        "guard": first.guard.as_dict(),
        "group": "method",
    }
    again = choose(CONFIG, Model(fingerprint="content:else"), begun)
    assert again.method == Mars(sparse_attention=(0.8, 0.9), window=64)
    assert (again.config.linear_dtype, again.guard, again.config.group) == ("mixed", first.guard, "auto")
    begun |= {"method": {"name": "dense", "settings": {"sparse_attention": None}}, "guard": None}
    begun["model"] = {"linear_dtype": "auto"}
    again = choose(CONFIG, Model(), begun)
    assert (again.method, again.config.linear_dtype, again.guard) == (Dense(), "auto", None)
    with pytest.raises(ConfigError, match="was begun with the method 'key-norm': name it"):
        choose(CONFIG, Model(), begun | {"method": {"name": "key-norm", "settings": {}}})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100"),
        ("NVIDIA H100 NVL", "NVIDIA H100"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("CPU", "CPU"),
    ],
)
def test_devices_of_one_kind_have_one_name(name, expected):
    assert device_class(name) == expected
