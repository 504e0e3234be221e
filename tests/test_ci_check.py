"""The workflow for a gate in CI, examples/ci-check.yml, run as GitHub runs its steps, with a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from xml.etree import ElementTree

import pytest
import yaml
from example_runs import EXAMPLES, script
from served import shell

from marsinfer_cli.app import run

Shell = Callable[..., CompletedProcess[str]]
WORKFLOW = yaml.safe_load((EXAMPLES / "ci-check.yml").read_text(encoding="utf-8"))
STEPS = {step.get("name", step.get("uses")): step for step in WORKFLOW["jobs"]["check"]["steps"]}


@pytest.fixture
def check_step(tmp_path, checkout):
    """The workflow's check, run as GitHub runs it, and its summary."""

    def check(shell: Shell = shell, **environment: str) -> tuple[int, str, str]:
        summary = tmp_path / "summary.md"
        step = script(tmp_path / "step.sh", STEPS["Check"]["run"])
        given = {**WORKFLOW["env"], "GITHUB_STEP_SUMMARY": str(summary), **environment}
        given["GITHUB_OUTPUT"] = str(tmp_path / "output")
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
    names = {a or b for a, b in used} - {"GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"}
    assert names <= set(WORKFLOW["env"]) | set(STEPS["Install"]["env"])
    keep = STEPS["Keep what was accepted"]
    assert keep["with"]["path"] == "${{ env.BASELINE }}"
    assert f"steps.{STEPS['Check']['id']}.outputs.code == '0' && " in keep["if"]


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
def test_the_workflow_ends_with_the_gate_s_verdict(
    check_step, marsinfer, tmp_path, code, environment, ends_with, says
):
    script(marsinfer, f'#!/bin/sh\necho "$@" > "$0.calls"\nexit {code}\n')
    returned, printed, _ = check_step(SETTINGS="start_layer=20 eta=0.9", **environment)
    assert returned == ends_with
    assert printed.startswith(says)
    assert (tmp_path / "output").read_text() == f"code={code}\n"  # a warning is no pass to be kept
    assert (
        "--set start_layer=20 --set eta=0.9 --scope rows --max-drop 2pt"
        in Path(f"{marsinfer}.calls").read_text()
    )
