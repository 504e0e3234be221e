"""What is in examples/, run as far as can be without GPU and cluster, on cut texts, with a tiny model."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import OF_TYPER, commands, options
from example_runs import CHECKOUT, EXAMPLES, script
from served import shell
from shown_commands import blocks

from marsinfer_cli.app import run

WAITING = "for n in $(seq 100); do sleep 0.1; done\n"


# --- examples/README.md


def command_lines() -> list[str]:
    """Of all blocks that are not marked as not run."""
    runs = [block for block in blocks(EXAMPLES / "README.md") if block.is_run]
    return [line for block in runs for line in block.text.splitlines()]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_from_top_to_bottom(checkout, marsinfer, sharp_model_folder, capfd):
    """Those of marsinfer within this process, which has imported everything; a check may find a drop."""
    lines = command_lines()
    assert lines[0] == "MODEL=smollm2-135m"
    assert sum(line.startswith("marsinfer ") for line in lines) >= 6
    for line in lines[1:]:
        line = line.replace("start_layer=20", "start_layer=2")  # of four layers
        words = shlex.split(line.replace("$MODEL", str(sharp_model_folder)))
        if words[0] == "marsinfer":
            assert run(words[1:]) in ((0, 5, 6) if words[1] == "check" else (0,)), (line, capfd.readouterr())
        else:
            words[0] = sys.executable if words[0] == "python" else words[0]
            done = shell(*words, PYTHONPATH=str(CHECKOUT))
            assert done.returncode == 0, (line, done.stdout, done.stderr)
    made = {path.name for path in Path("demo").iterdir() if not path.name.startswith(".")}
    assert {"dense.parquet", "marsinfer.parquet", "key-norm.parquet", "check.json", "check.xml"} <= made
    for row in pq.read_table("demo/contracts.parquet").to_pylist():
        for name in ("parties", "law", "term", "payment", "summary"):
            told = {each: row[name][each] for each in ("status", "valid", "error_type")}
            is_cut = told == {"status": "error", "valid": None, "error_type": "incomplete"}
            is_valid = None if name == "summary" else True
            assert is_cut or told == {"status": "ok", "valid": is_valid, "error_type": None}
    assert pq.read_schema("demo/table.parquet").field("months").type == pa.int64()
    for name in ("dense", "marsinfer", "key-norm", "nightly"):
        assert pq.read_table(f"demo/{name}.parquet")["status"].to_pylist() == ["ok"] * 8


def test_the_readme_names_every_example():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = [
        path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "logs", "__pycache__")
    ]
    assert [name for name in names if name not in text] == []


# --- examples/demo.py


@pytest.mark.slow
def test_the_demo_gives_row_by_row_what_its_two_commands_give(
    checkout, marsinfer, sharp_model_folder, monkeypatch, capfd
):
    monkeypatch.syspath_prepend(checkout / "examples")
    demo = checkout / "examples" / "demo.py"
    demo.write_text(demo.read_text().replace('"start_layer": 20', '"start_layer": 2'))  # of four layers
    monkeypatch.setattr(sys, "argv", ["examples/demo.py", str(sharp_model_folder)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("examples/demo.py", run_name="__main__")
    del sys.modules["score"]
    printed = capfd.readouterr()
    assert (ended.value.code, printed.err) == (0, "")
    told = re.findall(
        r"^(\d)/8  \S+: \d+ tokens, TTFT dense \d+\.\d s, marsinfer \d+\.\d s$", printed.out, re.M
    )
    assert told == list("12345678")
    assert "Scores" in printed.out
    lines = re.findall(r"^    marsinfer (batch .*)$", printed.out, re.M)
    for method, line in zip(("dense", "marsinfer"), lines, strict=True):
        assert run(shlex.split(line)) == 0
        rows = [pq.read_table(f"demo/{method}/{row}.parquet").to_pylist()[0] for row in range(8)]
        expected = pq.read_table(f"demo/{method}.parquet").to_pylist()
        same = ("row", "id", "method", "answer", "pack_documents", "ffn_tokens")
        assert [[row[name] for name in same] for row in rows] == [
            [row[name] for name in same] for row in expected
        ]


# --- flags


@pytest.mark.parametrize(
    ("file", "command"),
    [("nightly.sh", "batch"), ("ci-check.yml", "check"), ("deploy/marsinfer.sbatch", "batch")],
)
def test_the_flags_that_are_used_exist(file, command):
    text = (EXAMPLES / file).read_text(encoding="utf-8")
    calls = re.findall(rf'marsinfer}}?"? {command} ((?:.*\\\n)*.*)', text)
    used = set(re.findall(r"--[a-z][a-z-]+", " ".join(calls)))
    flags = {flag for option in options(commands()[command]) for flag in option.opts} | set(OF_TYPER)
    assert len(used) > 3
    assert used <= flags


# --- examples/deploy


def test_a_job_of_slurm_takes_its_shard_ends_by_its_signal_and_is_queued_again(tmp_path):
    """With commands in place of marsinfer and of Slurm's own."""
    run = script(
        tmp_path / "run",
        '#!/bin/sh\necho "$@" > "$0.calls"\ntrap "exit 143" TERM\nkill -TERM "$PPID"\n' + WAITING,
    )
    script(tmp_path / "scontrol", '#!/bin/sh\necho "$@" > "$0.calls"\n')
    job = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    sbatch = EXAMPLES / "deploy" / "marsinfer.sbatch"
    done = shell("bash", sbatch, "in.parquet", MARSINFER=str(run), PATH=path, **job)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")
    assert (tmp_path / "scontrol.calls").read_text() == "requeue 7\n"
    called = (tmp_path / "run.calls").read_text()
    assert called.startswith("batch in.parquet answers-2-of-4.parquet --shard 2/4 ")


def test_what_is_deployed_names_files_and_extras_that_exist():
    deploy = EXAMPLES / "deploy"
    docker = (deploy / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", docker, re.M) for word in line.split()]
    assert len(copied) == 5
    assert [name for name in copied if not (CHECKOUT / name).exists()] == []
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = re.findall(r"'\.\[(.+)\]'", docker)[0].split(",")
    assert set(wanted) <= set(project["optional-dependencies"])
    service = (deploy / "marsinfer.service").read_text(encoding="utf-8")
    assert "/nightly.sh /" in service
    told = {word.split("=")[0] for word in re.findall(r"NIGHTLY_\w+=", service)}
    assert {
        f"{name}" for name in told if name not in (EXAMPLES / "nightly.sh").read_text(encoding="utf-8")
    } == set()
