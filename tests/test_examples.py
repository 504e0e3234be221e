"""What is in examples/, run as far as can be without GPU and GitHub, on cut texts, with a tiny model."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from subprocess import CompletedProcess
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import OF_TYPER, commands, options
from served import Served, shell
from shown_commands import blocks

from marsinfer_cli.app import run

CHECKOUT = Path(__file__).parents[1]
EXAMPLES = CHECKOUT / "examples"
TEXT_CHARACTERS = 500  # a token each, of the tiny model
Shell = Callable[..., CompletedProcess[str]]
CALL = f"""#!/bin/sh
exec env PYTHONPATH='{CHECKOUT}' '{sys.executable}' -m marsinfer_cli "$@"
"""
PRETEND = """#!/bin/sh
echo "$@" >> "$0.calls"
if [ "$1" = doctor ]; then exit 1; fi
echo '{"event": "error"}' >&2
code=$(head -n 1 "$0.codes"); sed -i 1d "$0.codes"
exit "$code"
"""

WAITS = """#!/bin/sh
echo >> "$0.calls"
trap "exit 1" TERM
kill -TERM "$PPID"
while true; do sleep 0.1; done
"""

WAITING = "for n in $(seq 100); do sleep 0.1; done\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The examples with short texts, and the folder above them as the current one."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("results", "logs"))
    rows = [
        json.loads(line) for line in (EXAMPLES / "licenses.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    lines = [json.dumps({**row, "text": row["text"][:TEXT_CHARACTERS]}) + "\n" for row in rows]
    (tmp_path / "examples" / "licenses.jsonl").write_text("".join(lines), encoding="utf-8")
    for contract in (tmp_path / "examples" / "contracts").glob("*.txt"):
        text = contract.read_text(encoding="utf-8")
        contract.write_text(text[:TEXT_CHARACTERS], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def marsinfer(tmp_path, monkeypatch, sharp_model_folder):
    """The command on PATH, and the tiny model in place of whatever a settings file names."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MARSINFER_MODEL", str(sharp_model_folder))
    return script(tmp_path / "bin" / "marsinfer", CALL)


@pytest.fixture
def served(tmp_path, monkeypatch, sharp_model_folder):
    """The same within this process."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MARSINFER_MODEL", str(sharp_model_folder))
    with Served(tmp_path / "bin" / "marsinfer") as served:
        yield served


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


# --- examples/nightly.sh


@pytest.fixture
def pretend(tmp_path, checkout):
    """nightly.sh with a command in place of marsinfer that ends with one code after the other."""
    stand_in = script(tmp_path / "pretend", PRETEND)

    def nightly(*codes: int) -> tuple[int, str, list[str]]:
        Path(f"{stand_in}.codes").write_text("".join(f"{code}\n" for code in codes))
        Path(f"{stand_in}.calls").unlink(missing_ok=True)
        night = {"NIGHTLY_MARSINFER": str(stand_in), "NIGHTLY_PAUSE_S": "0"}
        done = shell("examples/nightly.sh", "examples/nightly.toml", **night)
        assert done.stderr == ""
        calls = Path(f"{stand_in}.calls").read_text().splitlines()
        return done.returncode, done.stdout, [call.split()[0] for call in calls]

    return nightly


@pytest.mark.parametrize(
    ("codes", "ends_with", "says", "calls"),
    [
        ([0], 0, None, ["batch"]),
        ([7], 0, None, ["batch"]),
        ([143], 143, None, ["batch"]),
        ([2], 2, "nothing was run", ["batch"]),
        ([3], 3, "rows failed", ["batch"]),
        ([4], 4, "too many rows failed", ["batch"]),
        ([8], 8, "storage failed", ["batch"]),
        ([9], 9, "stopped at its deadline", ["batch"]),
        ([137, 1, 0], 0, None, ["batch"] * 3),
        ([139, 7], 0, None, ["batch"] * 2),
        (
            [1, 1, 137, 0],
            137,
            "crashed 3 times, the last time with exit code 137",
            ["batch"] * 3 + ["doctor"],
        ),
    ],
)
def test_a_night_ends_as_its_run_does(pretend, codes, ends_with, says, calls):
    returned, printed, called = pretend(*codes)
    assert (returned, called) == (ends_with, calls)
    if says is None:
        assert printed == ""
    else:
        first, second, *log = printed.splitlines()
        assert first.startswith("marsinfer, ")
        assert says in first
        assert second.startswith("the end of ")
        assert '{"event": "error"}' in log


def test_old_logs_go_and_others_stay(pretend, checkout):
    logs = checkout / "examples" / "logs"
    logs.mkdir()
    for name, age_days in (("nightly-2020-01-01.log", 40), ("nightly-2020-02-01.log", 20), ("other.log", 40)):
        (logs / name).touch()
        seconds = (logs / name).stat().st_mtime - age_days * 86400
        os.utime(logs / name, (seconds, seconds))
    pretend(0)
    left = {path.name for path in logs.iterdir()}
    assert {"nightly-2020-02-01.log", "other.log"} < left
    assert "nightly-2020-01-01.log" not in left


def test_a_signal_reaches_the_run_which_is_not_started_again(tmp_path, checkout):
    stand_in = script(tmp_path / "waits", WAITS)
    done = shell("examples/nightly.sh", "examples/nightly.toml", NIGHTLY_MARSINFER=str(stand_in))
    assert done.returncode == 1  # which alone would be taken for a crash
    assert Path(f"{stand_in}.calls").read_text() == "\n"


@pytest.mark.slow
def test_the_second_night_answers_what_is_new(checkout, served):
    """The first night is a run alone; the script begins one in the test of the README."""
    os.makedirs("demo")
    rows = Path("examples/licenses.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)

    def night(count, answer):
        Path("examples/licenses.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
        answer()
        assert pq.read_table("demo/nightly.parquet")["status"].to_pylist() == ["ok"] * count

    def first():
        with chdir("examples"):
            assert run(["batch", "--config", "nightly.toml", "--resume", "--quiet"]) == 0

    def second():
        done = served.shell("examples/nightly.sh", "examples/nightly.toml")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert [words[0] for words in served.calls] == ["batch"]

    night(2, first)
    night(3, second)
    (log,) = Path("examples/logs").iterdir()
    told = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    notes = [event["message"] for event in told if event.get("event") == "note"]
    assert any(note.startswith("resuming: 2 rows are done") for note in notes)


def test_it_says_how_it_is_called():
    done = shell(EXAMPLES / "nightly.sh")
    assert (done.returncode, done.stderr) == (2, "usage: nightly.sh SETTINGS.toml\n")


# --- examples/ci-check.yml

WORKFLOW = yaml.safe_load((EXAMPLES / "ci-check.yml").read_text(encoding="utf-8"))
STEPS = {step.get("name", step.get("uses")): step for step in WORKFLOW["jobs"]["check"]["steps"]}


@pytest.fixture
def check_step(tmp_path, checkout):
    """The workflow's check, run as GitHub runs it, and its summary."""

    def check(shell: Shell = shell, **environment: str) -> tuple[int, str, str]:
        summary = tmp_path / "summary.md"
        step = script(tmp_path / "step.sh", STEPS["Check"]["run"])
        given = {**WORKFLOW["env"], "GITHUB_STEP_SUMMARY": str(summary), **environment}
        done = shell("bash", "--noprofile", "--norc", "-eo", "pipefail", step, **given)
        return done.returncode, done.stdout, summary.read_text() if summary.exists() else ""

    return check


def test_the_workflow_has_what_github_asks_for():
    assert WORKFLOW["name"]
    assert set(WORKFLOW[True]) == {
        "pull_request",
        "push",
        "workflow_dispatch",
    }  # `on` is a boolean of YAML 1.1
    for step in STEPS.values():
        assert ("uses" in step) != ("run" in step)
    text = (EXAMPLES / "ci-check.yml").read_text(encoding="utf-8")
    used = set(re.findall(r"env\.([A-Z_]+)|\$\{?([A-Z_]+)", text))
    names = {a or b for a, b in used} - {"GITHUB_STEP_SUMMARY"}
    assert names <= set(WORKFLOW["env"]) | set(STEPS["Install"]["env"])
    assert STEPS["Keep what was accepted"]["with"]["path"] == "${{ env.BASELINE }}"


@pytest.mark.slow
def test_the_workflow_is_green_twice_and_fails_on_a_broken_setting(
    check_step, served, tmp_path, sharp_model_folder
):
    """The references are what the model itself says, so that there is something to lose."""
    rows = [{"id": str(n), "text": "fish swim. " * (9 + n), "question": f"why {n}?"} for n in range(6)]
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(sharp_model_folder), "--max-new-tokens", "8", "--method", "dense"]
    assert run(["batch", str(asked), str(answered), "--question-column", "question", *flags]) == 0
    answers = [json.loads(line)["answer"] for line in answered.read_text().splitlines()]
    rows = [{**row, "reference": answer} for row, answer in zip(rows, answers, strict=True)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"MODEL": str(sharp_model_folder), "ROWS": str(asked)}
    mild = {**given, "SETTINGS": "start_layer=2 eta=0.99 prefix=4 window=8"}

    for against in ("dense", "accepted"):
        returned, printed, summary = check_step(served.shell, **mild)
        assert (returned, printed.count("::")) == (0, 0), printed + summary
        result = json.loads(Path("check.json").read_text())
        assert (result["verdict"], result["against"]) == ("pass", against)
        assert f"| {against} | marsinfer |" in summary
        assert ElementTree.parse("check.xml").getroot().get("failures") == "0"
    assert Path(".marsinfer/accepted.parquet").exists()

    broken = {**given, "SETTINGS": "start_layer=0 eta=0.05 prefix=0 window=1"}
    returned, printed, _ = check_step(served.shell, **broken)
    assert returned == 5
    assert "::error title=accuracy::marsinfer loses more than 2pt" in printed


@pytest.mark.parametrize(
    ("code", "environment", "ends_with", "says"),
    [
        (5, {}, 5, "::error title=accuracy::marsinfer loses more than 2pt\n"),
        (6, {}, 6, "::warning title=accuracy::these rows cannot tell"),
        (6, {"INCONCLUSIVE": "warn"}, 0, "::warning title=accuracy::these rows cannot tell"),
        (2, {}, 2, "::error title=accuracy::the check itself failed, with exit code 2\n"),
    ],
)
def test_the_workflow_ends_with_the_gate_s_verdict(check_step, marsinfer, code, environment, ends_with, says):
    script(marsinfer, f'#!/bin/sh\necho "$@" > "$0.calls"\nexit {code}\n')
    returned, printed, _ = check_step(SETTINGS="start_layer=20 eta=0.9", **environment)
    assert returned == ends_with
    assert printed.startswith(says)
    assert (
        "--set start_layer=20 --set eta=0.9 --scope rows --max-drop 2pt"
        in Path(f"{marsinfer}.calls").read_text()
    )


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
