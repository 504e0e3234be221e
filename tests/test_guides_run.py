"""Every command that the README and the guides show: run here with a tiny model on cut texts, or marked.

A block of sh or python below `<!-- not run: REASON -->` is not run, one below `<!-- may end with: 5, 6 -->`
may end so, and one below `<!-- file: NAME -->`, of any language, is written to a file that later blocks read.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served import Served
from shown_commands import BLOCK, COMMANDS, Block, blocks

CHECKOUT = Path(__file__).parents[1]
GUIDES = sorted(CHECKOUT.glob("examples/guides/*.md"))
README, WALK = CHECKOUT / "README.md", CHECKOUT / "examples" / "README.md"
PAPERS = [README, WALK, *GUIDES]
ELSEWHERE = {WALK: "test_examples.py", CHECKOUT / "examples/guides/python.md": "test_notebooks.py"}
LANGUAGES = (*COMMANDS, "text", "json", "toml", "jinja")
MODELS = r"Qwen/Qwen2\.5-7B-Instruct|smollm2-135m|\./model"
TEXT_CHARACTERS = 160  # a token each, of the tiny model


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_commands_stand_in_blocks_whose_language_says_so(path):
    text = path.read_text(encoding="utf-8")
    assert [block.language for block in blocks(path) if block.language not in LANGUAGES] == []
    outside = BLOCK.sub("", text)
    assert re.findall(r"^(?: {4}|```).*", outside, re.MULTILINE) == []
    hidden = [block.marker for block in blocks(path) if block.marker]
    known = r"not run: \w.{5,}|may end with: \d+(, \d+)*|file: [\w./-]+|made by: .+"
    assert [marker for marker in hidden if not re.fullmatch(known, marker)] == []
    shown = (
        [] if path.name == "flags.md" else [each for each in blocks(path) if each.language not in COMMANDS]
    )
    assert [block.text for block in shown if re.match(r"(\$ )?(marsinfer|python|pip) ", block.text)] == []


@pytest.fixture
def world(tmp_path, monkeypatch, sharp_model_folder):
    """The files that the guides speak of, in the current folder, and the command, run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("MARSINFER_MODEL", str(sharp_model_folder))
    monkeypatch.setenv("MARSINFER_MAX_NEW_TOKENS", "48")
    for name in ("bin", "in", "contracts", "examples"):
        (tmp_path / name).mkdir()
    shutil.copy(CHECKOUT / "examples" / "custom_method.py", tmp_path / "examples")
    shutil.copytree(CHECKOUT / "examples" / "contracts", tmp_path / "examples" / "contracts")
    rows = []
    for path in sorted((CHECKOUT / "examples" / "contracts").glob("*.txt"))[:3]:
        text = path.read_text(encoding="utf-8")[:TEXT_CHARACTERS]
        (tmp_path / "contracts" / path.name).write_text(text, encoding="utf-8")
        asked = {"question": "Who?", "asked": "When?", "questions": ["Who?", "When?"], "answer": "Nobody."}
        rows.append({"id": path.stem, "text": text, **asked, "reference": "Nobody."})
    for name in ("contracts.parquet", "in/contracts.parquet", "rows.parquet"):
        pq.write_table(pa.Table.from_pylist(rows), name)
    lines = "".join(json.dumps(row) + "\n" for row in rows[:1])
    for name in ("rows.jsonl", "examples/licenses.jsonl"):
        Path(name).write_text(lines, encoding="utf-8")
    with gzip.open("more.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines.replace(rows[0]["id"], "more"))
    with Served(tmp_path / "bin" / "marsinfer") as served:
        yield served


RUN = [path for path in PAPERS if path not in ELSEWHERE and any(block.is_run for block in blocks(path))]


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_the_commands_of_a_paper_run_from_top_to_bottom(path, world, sharp_model_folder, capfd):
    for block in blocks(path):
        text = re.sub(MODELS, str(sharp_model_folder), block.text).replace("start_layer=20", "start_layer=2")
        if block.file is not None:
            Path(block.file).write_text(text, encoding="utf-8")
        elif block.is_run and block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, path.name, "exec"), {})
        elif block.is_run:
            done = world.shell("bash", "-euo", "pipefail", "-c", text)
            assert done.returncode in block.codes, (text, done.stdout[-2000:], done.stderr[-2000:])


def test_papers_whose_commands_run_elsewhere_do():
    for path, test in ELSEWHERE.items():
        text = (CHECKOUT / "tests" / test).read_text(encoding="utf-8")
        assert path.name in text
        assert any(block.is_run for block in blocks(path))


def test_blocks_are_found_with_what_is_said_of_them():
    text = "<!-- not run: needs a GPU -->\n```sh\na\n```\n\n```text\nb\n```\n"
    text += "<!-- may end with: 5, 6 -->\n```sh\nc\n```\n"
    made = [Block(*found) for found in BLOCK.findall(text)]
    assert [(each.is_run, each.codes, each.text) for each in made] == [
        (False, {0}, "a\n"),
        (False, {0}, "b\n"),
        (True, {0, 5, 6}, "c\n"),
    ]
