"""Code that is not ours runs when the command line asks for it, and never for what stands in a file."""

from __future__ import annotations

import pytest

from pipeline import run_batch
from pipeline.errors import ConfigError
from pipeline.settings.option import settings_of
from pipeline.settings.run_settings import BatchConfig
from pipeline.settings.sources import read_config, read_environment, to_toml
from pipeline.setup.profile import load_profile

TAIL = " would run code, and only the command line may ask for that: give {} there, if you trust it"
PROFILE = """[profile]
format = 2
model = "m"
fingerprint = "content:1"
device = "CPU"
dtype = "float32"

[batch]
method = "{}"
"""
VALUES = {"method": ("{}:X", "--method {}:X"), "trust_remote_code": (True, "--trust-remote-code")}


@pytest.fixture
def evil(tmp_path):
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    yield path
    assert not (tmp_path / "ran").exists()


def test_all_that_would_run_code_is_tried_here():
    assert {each.name for each in settings_of(BatchConfig) if each.about.brings_code} == VALUES.keys()


@pytest.mark.parametrize("name", VALUES)
def test_a_file_and_the_environment_cannot_ask_for_code(name, evil, tmp_path):
    value, flag = (text.format(evil) if isinstance(text, str) else text for text in VALUES[name])
    key, variable = name.replace("_", "-"), f"MARSINFER_{name.upper()}"
    config = tmp_path / "c.toml"
    config.write_text(f"{key} = {value!r}".replace("True", "true"))
    with pytest.raises(ConfigError) as refused:
        read_config(str(config))
    assert str(refused.value) == f"--config {config}: {key}{TAIL.format(flag)}"
    with pytest.raises(ConfigError) as refused:
        read_environment({variable: str(value)})
    assert str(refused.value) == f"{variable}{TAIL.format(flag)}"


@pytest.mark.parametrize("method", ["{}:X", "os:X"])
def test_a_profile_names_registered_methods_only(method, evil, tmp_path):
    method, path = method.format(evil), tmp_path / "p.toml"
    path.write_text(PROFILE.format(method))
    for read in (load_profile, lambda path: run_batch("in.jsonl", "out.jsonl", question="q", profile=path)):
        with pytest.raises(ConfigError) as refused:
            read(str(path))
        assert str(refused.value) == f"--profile {path}: method{TAIL.format(f'--method {method}')}"


def test_a_printed_configuration_is_one_that_a_file_may_hold(tmp_path):
    config = BatchConfig(
        input=("a",), output="b.jsonl", method="mine.py:X", settings={"s": 1}, trust_remote_code=True
    )
    path = tmp_path / "c.toml"
    path.write_text(to_toml(config))
    read = read_config(str(path))
    assert not read.keys() & {"method", "settings", "trust_remote_code"}
    assert '# method = "mine.py:X"\n' in path.read_text()
    assert BatchConfig(**read, method="mine.py:X", settings={"s": 1}, trust_remote_code=True) == config
