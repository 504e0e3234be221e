"""A chat template that prints today's date prints the day on which the run began, on any later day too."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta

import pyarrow.parquet as pq
import pytest

from marsinfer_cli.app import run
from pipeline.outputs.journal import journal_folder
from pipeline.setup import intake

pytestmark = pytest.mark.slow

DATED = "Today: {{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.content }}{% endfor %}"
FIRST = datetime(2026, 2, 3, 23, 59)


class Clock:
    now_is = FIRST

    def now(self):
        return self.now_is


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(intake, "datetime", clock)
    return clock


@pytest.fixture
def dated(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(DATED)
    return tmp_path / "m"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "text": f"fish {n} " * 9}) + "\n" for n in range(4)))
    return path


@pytest.fixture
def batch(dated, rows, tmp_path):
    def call(*flags, out="out.parquet"):
        common = ["--question", "what?", "--id-column", "id", "--max-new-tokens", "2", "--model", str(dated)]
        return run(["batch", str(rows), str(tmp_path / out), *common, "--pack-tokens", "1", *map(str, flags)])

    return call


def shown(batch, capfd, *flags):
    assert batch("--show-prompt", 1, *flags) == 0
    return capfd.readouterr().out.splitlines()[1]


def settings(path):
    return json.loads(pq.read_schema(path).metadata[b"marsinfer"])["settings_that_decide"]


@pytest.mark.parametrize("out", ["out.parquet", "out.jsonl", "out.arrows", "out.arrow"])
def test_a_published_output_goes_on_with_its_day(batch, clock, rows, capfd, out):
    assert batch(out=out) == 0
    with rows.open("a") as file:
        file.write(json.dumps({"id": "new", "text": "one more"}) + "\n")
    clock.now_is = FIRST + timedelta(days=40)
    assert batch("--resume", out=out) == 0
    assert "resuming: 4 rows are done" in capfd.readouterr().err
    assert batch("--resume", "--show-prompt", 1, out=out) == 0
    assert "Today: 03 Feb 2026" in capfd.readouterr().out


def test_an_unfinished_run_goes_on_with_its_day(batch, clock, rows, tmp_path, capfd):
    content = rows.read_text()
    rows.write_text(content + '{"id": "x", "text": ""}\n' * 2)
    assert batch("--max-errors", 0, "--order", "completion", "--pack-tokens", 1) != 0
    folder = journal_folder(tmp_path / "out.parquet")
    assert json.loads((folder / "settings.json").read_text())["settings"]["date"] == "2026-02-03"
    rows.write_text(content)
    clock.now_is = FIRST + timedelta(minutes=2)
    capfd.readouterr()
    assert shown(batch, capfd, "--resume") == "Today: 03 Feb 2026"
    assert batch("--resume") == 0
    assert settings(tmp_path / "out.parquet")["date"] == "2026-02-03"


def test_a_new_run_has_a_new_day(batch, clock, tmp_path, capfd):
    assert batch() == 0
    clock.now_is = FIRST + timedelta(minutes=2)
    assert batch("--overwrite") == 0
    assert settings(tmp_path / "out.parquet")["date"] == "2026-02-04"
    assert shown(batch, capfd, "--overwrite") == "Today: 04 Feb 2026"


def test_no_day_is_told_where_none_is_printed(batch, dated, tmp_path):
    (dated / "chat_template.jinja").write_text(DATED.replace("strftime_now('%d %b %Y')", "'gone'"))
    assert batch() == 0
    assert "date" not in settings(tmp_path / "out.parquet")
    assert batch("--resume") == 0


@pytest.fixture
def check(dated, rows, tmp_path):
    def call(*flags):
        words = ["check", str(rows), "--question", "what?", "--id-column", "id", "--model", str(dated)]
        words += [
            "--method",
            "marsinfer",
            *(
                word
                for each in ("start_layer=0", "eta=0.3", "prefix=0", "window=1")
                for word in ("--set", each)
            ),
            "--scope",
            "rows",
            "--max-drop",
            "99pt",
            "--max-new-tokens",
            "2",
            "--out",
            str(tmp_path / "r.json"),
            *map(str, flags),
        ]
        return run(words)

    return call


def test_a_baseline_of_another_day_still_stands(check, clock, tmp_path, capfd):
    path = tmp_path / "dense.parquet"
    assert check("--baseline", path) == 0
    clock.now_is = FIRST + timedelta(days=1)
    capfd.readouterr()
    assert check("--baseline", path) == 0
    assert "dense is taken from" in capfd.readouterr().err
    assert check("--baseline", path, "--overwrite-baseline") == 0
    assert json.loads((tmp_path / "r.json").read_text())["about"]["date"] == "2026-02-04"


def test_an_output_in_object_storage_goes_on_with_its_day(dated, rows, bucket, clock, capfd):
    common = ["--question", "what?", "--id-column", "id", "--max-new-tokens", "2", "--model", str(dated)]
    words = ["batch", str(rows), f"{bucket}/out.parquet", *common]
    assert run(words) == 0
    clock.now_is = FIRST + timedelta(days=1)
    capfd.readouterr()
    assert run([*words, "--resume", "--show-prompt", "1"]) == 0
    assert "Today: 03 Feb 2026" in capfd.readouterr().out
    assert run([*words, "--resume"]) == 0
    assert "nothing new" in capfd.readouterr().err
