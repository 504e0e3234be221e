"""The script for every night, examples/nightly.sh, with commands in place of marsinfer, or a tiny model."""

from __future__ import annotations

import json
import os
from contextlib import chdir
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from example_runs import EXAMPLES, script
from served import shell

from marsinfer_cli.app import run

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
        ([127], 127, "pretend cannot be run: ", ["batch"]),
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
