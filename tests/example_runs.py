"""The examples as tests run them: a copy with short texts, and a command on PATH for the installed one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from served import Served

CHECKOUT = Path(__file__).parents[1]
EXAMPLES = CHECKOUT / "examples"
TEXT_CHARACTERS = 500  # a token each, of the tiny model
CALL = f"""#!/bin/sh
exec env PYTHONPATH='{CHECKOUT}' '{sys.executable}' -m marsinfer_cli "$@"
"""


def copy_examples(folder: Path) -> None:
    """All but results and logs, below a folder, with the beginnings of their texts."""
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("results", "logs"))
    rows = [
        json.loads(line) for line in (EXAMPLES / "licenses.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    lines = [json.dumps({**row, "text": row["text"][:TEXT_CHARACTERS]}) + "\n" for row in rows]
    (folder / "examples" / "licenses.jsonl").write_text("".join(lines), encoding="utf-8")
    for contract in (folder / "examples" / "contracts").glob("*.txt"):
        text = contract.read_text(encoding="utf-8")
        contract.write_text(text[:TEXT_CHARACTERS], encoding="utf-8")


def script(path: Path, text: str) -> Path:
    """A program of this text."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def place_of_command(folder: Path, patched: pytest.MonkeyPatch, model: Path) -> Path:
    """Where PATH finds `marsinfer` first, whose model is this one whatever a settings file names."""
    (folder / "bin").mkdir()
    patched.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    patched.setenv("MARSINFER_MODEL", str(model))
    return folder / "bin" / "marsinfer"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The examples with short texts, and the folder above them as the current one."""
    copy_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def marsinfer(tmp_path, monkeypatch, sharp_model_folder):
    """The command on PATH, and the tiny model in place of whatever a settings file names."""
    return script(place_of_command(tmp_path, monkeypatch, sharp_model_folder), CALL)


@pytest.fixture
def served(tmp_path, monkeypatch, sharp_model_folder):
    """The command on PATH, which runs within this process, with the tiny model."""
    with Served(place_of_command(tmp_path, monkeypatch, sharp_model_folder)) as served:
        yield served
