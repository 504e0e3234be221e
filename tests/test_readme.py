"""The README against the program: flags, columns, exit codes, and what `marsinfer methods` prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from marsinfer_cli.app import run
from pipeline import errors
from pipeline.records import Answer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "fewest"), [("batch", 20), ("check", 20), ("calibrate", 20), ("report", 3)]
)
def test_every_flag_is_explained(command, fewest, capfd):
    assert run([command, "--help"]) == 0
    flags = set(re.findall(r"--[a-z][a-z-]+", capfd.readouterr().out)) - {"--help"}
    assert len(flags) >= fewest
    assert sorted(flag for flag in flags if flag not in README) == []


def test_every_flag_that_is_mentioned_exists(capfd):
    printed = ""
    names = ("ttft", "batch", "attention", "offload", "agreement", "decode")
    benches = (["bench", name] for name in names)
    for command in (["batch"], ["check"], ["calibrate"], ["report"], *benches, ["methods"]):
        assert run([*command, "--help"]) == 0
        printed += capfd.readouterr().out
    foreign = {"--no-deps"}  # pip's
    mentioned = set(re.findall(r"--[a-z][a-z-]+", README))
    assert sorted(flag for flag in mentioned - foreign if flag not in printed) == []


def test_every_column_is_explained():
    columns = [field.name for field in fields(Answer) if field.name != "passthrough"]
    assert [name for name in columns if f"`{name}`" not in README] == []


def test_every_exit_code_of_an_error_is_in_the_table():
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    cells = re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE)
    table = {int(code) for cell in cells for code in cell.split(",")}
    assert {0, 3, 130, 143} | codes == table


def test_the_methods_are_as_printed():
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "marsinfer_cli", "methods"]
    printed = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", check=True
    ).stdout
    shown = README.partition("$ marsinfer methods\n")[2].partition("\n\n")[0]
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in printed.splitlines()]


@pytest.mark.parametrize("path", re.findall(r"`(examples/[\w./]+)`", README))
def test_files_that_are_named_exist(path):
    assert (Path(__file__).parents[1] / path).exists()
