"""The README against the program: flags, columns, exit codes, and what `marsinfer methods` prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from commands import OF_TYPER, commands, in_readme, options, reference

from pipeline import errors
from pipeline.records import Answer

FLAG = r"--[a-z][a-z-]+"
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["batch", "check", "calibrate", "report", "doctor"])
def test_every_flag_is_explained(command):
    flags = [flag for option in options(commands()[command]) for flag in option.opts]
    prose = README.replace(in_readme(), "")
    words = set(re.findall(FLAG, prose))
    assert sorted(flag for flag in flags if flag not in words) == []


def test_all_flags_of_all_commands_are_listed_with_their_defaults():
    assert in_readme() == reference(), "python tests/commands.py lists them anew"


def test_every_flag_that_is_mentioned_exists():
    flags = {flag for each in commands().values() for option in options(each) for flag in option.opts}
    foreign = {"--no-deps"}  # pip's
    foreign |= {"--head", "--port", "--address", "--disable-usage-stats", "--object-store-memory"}  # Ray's
    mentioned = set(re.findall(FLAG, README)) - foreign
    assert sorted(mentioned - flags - {"--version", *OF_TYPER}) == []


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
