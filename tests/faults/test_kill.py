"""Runs that are killed at random moments and resumed: every row once, and the answers of a run left alone.

MARSINFER_KILLS=100 MARSINFER_KILL_ROWS=500 python -m pytest tests/faults/test_kill.py
"""

from __future__ import annotations

import io
import json
import os
import random
import time
from contextlib import redirect_stdout

import pyarrow.parquet as pq
import pytest
from forked import Forked

from marsinfer_cli.app import run

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("MARSINFER_KILLS", "3"))
ROWS = int(os.environ.get("MARSINFER_KILL_ROWS", "60"))


@pytest.fixture(scope="module")
def command(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("kill")
    words = random.Random(0)
    with (folder / "in.jsonl").open("w") as lines:
        for row in range(ROWS):
            text = " ".join(words.choices(["red", "fish", "blue", "sea"], k=words.randint(20, 120)))
            lines.write(json.dumps({"id": f"doc-{row}", "text": text}) + "\n")
    flags = ["--id-column", "id", "--question", "what?", "--max-new-tokens", "4", "--quiet", "--resume"]
    flags += [
        "--model",
        str(model_folder),
        "--method",
        "marsinfer",
        "--set",
        "start_layer=1",
        "--set",
        "window=8",
        "--set",
        "prefix=8",
    ]

    def build(name, *more):
        words = ["batch", str(folder / "in.jsonl"), str(folder / name), *flags, *more]
        return words, folder / name

    return build


def undisturbed(command, name, *flags):
    """Its rows, the seconds of the whole run, and those of its packs alone."""
    words, path = command(name, *flags)
    began = time.monotonic()
    with redirect_stdout(io.StringIO()) as told:
        assert run([*words, "--json"]) == 0
    seconds = time.monotonic() - began
    return pq.read_table(path).to_pylist(), seconds, json.loads(told.getvalue())["answering_s"]


def killed(command, name, seconds, answering_s, *flags):
    """The same run, killed `KILLS` times, then left to finish, within this process.

    Every fourth time at any moment, loading included; else soon after rows were finished, so that the kills
    spread over the time of its packs.
    """
    words, path = command(name, *flags)
    moments = random.Random(1)
    for number in range(KILLS):
        process = Forked(words, path.with_suffix(".printed"))
        if number % 4 == 0:
            code = process.wait(moments.uniform(0, seconds))
        else:
            before = journal_bytes(path)
            while process.wait(0.002) is None and journal_bytes(path) == before:
                pass
            code = process.wait(moments.uniform(0, answering_s / KILLS))
        assert code in (None, 0), process.printed()
        process.kill()
    assert run(words) == 0
    return pq.read_table(path).to_pylist()


def journal_bytes(path):
    folder = path.with_name(f".{path.name}.journal")
    try:
        return sum(part.stat().st_size for part in folder.glob("part-*"))
    except FileNotFoundError:  # removed while we looked: the run has ended
        return 0


@pytest.mark.parametrize(
    ("flags", "least"), [(["--pack-tokens", "1"], 1.0), (["--pack-tokens", "4k"], 0.999)]
)
def test_every_row_is_there_once_with_the_answer_of_a_run_left_alone(command, flags, least):
    expected, *times = undisturbed(command, f"whole{least}.parquet", *flags)
    rows = killed(command, f"killed{least}.parquet", *times, *flags)
    assert [row["id"] for row in rows] == [f"doc-{row}" for row in range(ROWS)]
    assert [row["row"] for row in rows] == list(range(ROWS))
    same = sum(a["answer"] == b["answer"] for a, b in zip(rows, expected, strict=True))
    assert same >= least * ROWS
    leftovers = [path.name for path in command("x")[1].parent.iterdir() if path.name.startswith(".")]
    assert leftovers == []
