"""`marsinfer check` as a user runs it: exit codes, tables and files, and messages word for word."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest
from check_runs import ASK, REFERENCES, ROWS, check_with, refusal_of, write_rows

BROKEN = [
    "--method",
    "marsinfer",
    "--set",
    "eta=0.3",
    "--set",
    "start_layer=0",
    "--set",
    "prefix=0",
    "--set",
    "window=1",
]


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "fish.jsonl")


@pytest.fixture
def check(sharp_model_folder, monkeypatch):
    monkeypatch.setenv("MARSINFER_METHOD", "dense")
    return check_with(sharp_model_folder)


@pytest.fixture
def refusal(check, capfd):
    return refusal_of(check, capfd)


ALONE = ["--scope", "rows"]


@pytest.mark.slow
def test_a_profile_brings_method_and_settings(check, data, tmp_path, sharp_model_folder, capfd, monkeypatch):
    monkeypatch.delenv("MARSINFER_METHOD")
    from pipeline.model.loading import open_model
    from pipeline.settings.model_settings import ModelSettings
    from pipeline.setup.profile import Profile, write_profile

    model = open_model(ModelSettings(model=str(sharp_model_folder), device="cpu"))
    about = {"format": 1, "model": model.name, "device": "NVIDIA H200", "dtype": "float32"}
    batch = {"method": "marsinfer", "settings": {"eta": 0.3, "start_layer": 0, "prefix": 0, "window": 1}}
    path, result = tmp_path / "p.toml", tmp_path / "result.json"
    write_profile(path, Profile(about={**about, "fingerprint": model.fingerprint}, batch=batch))
    asked = [data, *ASK, *ALONE, "--out", result]
    assert check(*asked, "--profile", path) == check(*asked, *BROKEN) == 5
    assert capfd.readouterr().err.count("note: the profile was calibrated on NVIDIA H200, and this is ") == 1
    assert json.loads(result.read_text())["gates"][0]["drop"] > 1
    assert check(*asked, "--profile", path, "--set", "eta=1") == 6
    told = capfd.readouterr().err
    assert "note: other settings stand above the profile's: it is not the profile that is checked\n" in told
    write_profile(path, Profile(about={**about, "fingerprint": "files:other"}, batch=batch))
    assert check(*asked, "--profile", path) == 2
    assert "calibrate this model, or leave the profile out" in capfd.readouterr().err


def test_dense_against_itself_is_nothing_to_compare(check, data, capfd):
    assert check(data, *REFERENCES, "--method", "dense") == 6
    assert capfd.readouterr().err.startswith("marsinfer: error: nothing to compare: dense against itself; ")


@pytest.mark.parametrize("bound", ["1pt", "1%", "0pt"])
def test_so_few_documents_end_at_once(check, data, capfd, monkeypatch, bound):
    def refuse(self):
        raise AssertionError("loaded")

    monkeypatch.setattr("pipeline.model.loading.UnloadedModel.load", refuse)
    assert check(data, *REFERENCES, *BROKEN, "--max-drop", bound) == 6
    (line,) = capfd.readouterr().err.splitlines()
    needed = "no number of documents is enough" if bound == "0pt" else "368 documents are needed"
    assert line.startswith(
        f"marsinfer: error: 8 documents cannot show a drop within --max-drop {bound}: {needed} even if none "
        "loses anything, and these can show at best that it is under "
        f"37.0{'%' if '%' in bound else ' points'}; "
    )


def test_what_a_pass_costs_is_said_before_the_run(check, data, capfd):
    assert check(data, *REFERENCES, *BROKEN, "--max-drop", "40pt") in (0, 5, 6)
    told = (
        "note: 8 documents pass --max-drop 40pt only if they lose next to nothing (8 would without any loss)"
    )
    assert told in capfd.readouterr().err


@pytest.mark.parametrize("idle", [[*BROKEN, "--set", "eta=1"], ["--method", "mars"]])
def test_a_method_that_prunes_nothing_passes_nothing(check, data, capfd, idle):
    assert check(data, *ASK, *idle, *ALONE) == 6
    assert "these rows alone, against dense), but nothing was pruned: " in capfd.readouterr().err


def test_scores_without_room_to_lose_pass_nothing(check, data, capfd):
    wrong = [{**row, "right": "\x01\x02\x03"} for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    assert check(data, *REFERENCES, *BROKEN, *ALONE, "--metric", "found") == 6
    assert "but there is no room to lose: the score that the method is held against is 0.00 points" in (
        capfd.readouterr().err
    )


def test_rows_alone_are_held_against_dense_and_then_against_their_accepted_scores(
    check, data, tmp_path, capfd
):
    baseline, result = tmp_path / "accepted.parquet", tmp_path / "result.json"
    asked = [data, *ASK, *ALONE, "--baseline", baseline, "--out", result]
    assert check(*asked, *BROKEN) == 5  # not accepted
    found = json.loads(result.read_text())
    assert (found["scope"], found["against"], found["verdict"]) == ("rows", "dense", "fail")
    assert check(*asked, *BROKEN, "--max-drop", "100pt") == 6  # dense's own scores are no more than that
    assert check(*asked, *BROKEN, "--max-drop", "99pt") == 0
    told = capfd.readouterr().err
    assert f"note: what the method scored is what later runs are held against, in {baseline}\n" in told
    assert check(*asked, *BROKEN, "--max-drop", "0pt") == 0  # as good as what was accepted
    found = json.loads(result.read_text())
    (gate,) = found["gates"]
    assert (found["against"], gate["drop"], gate["low"], gate["accepted"]) == (
        "accepted",
        0,
        None,
        gate["method"],
    )
    assert "dense" not in gate
    worse = [*BROKEN, "--set", "eta=0.05"]
    assert check(*asked, *worse, "--max-drop", "0pt") == 5
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"marsinfer: error: agreement dropped by [\d.]+ points "
        r"\(these rows alone, since they were accepted\), more than --max-drop 0pt allows",
        line,
    )
    assert check(*asked, *worse, "--max-drop", "99pt", "--overwrite-baseline") == 0
    assert check(*asked, *worse, "--max-drop", "0pt") == 0


def test_a_broken_setting_fails_the_gate(check, data, tmp_path, capfd):
    files = {name: tmp_path / f"result.{name}" for name in ("out", "junit", "markdown")}
    reports = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    files["markdown"].write_text("# Summary\n\n")
    assert check(data, *ASK, *BROKEN, *ALONE, "--max-drop", "20pt", *reports) == 5
    printed = capfd.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("marsinfer: error: agreement dropped by ")
    assert line.endswith(" points (these rows alone, against dense), more than --max-drop 20pt allows")
    assert "TTFT p50 " in printed.out
    assert "kept of dense: FFN " in printed.out

    found = json.loads(files["out"].read_text())
    assert (found["verdict"], found["metric"], found["max_drop"]) == ("fail", "agreement", "20pt")
    assert line == f"marsinfer: error: {found['message']}"
    assert found["gates"][0]["drop"] > 20
    assert found["about"]["method"]["settings"]["eta"] == 0.3
    assert len(found["about"]["data_sha256"]) == len(found["about"]["template_sha256"]) == 64
    assert [row["id"] for row in found["rows"]] == [row["doc"] for row in ROWS]
    agreed = sum(row["agreed"] / row["tokens"] for row in found["rows"]) / len(ROWS)
    assert found["gates"][0]["method"] == pytest.approx(agreed)
    for row in found["rows"]:
        assert (row["parted_at"] is None) == (row["agreed"] == row["tokens"])

    suites = ElementTree.parse(files["junit"]).getroot()
    assert (suites.get("tests"), suites.get("failures")) == ("1", "1")
    (failure,) = suites.iter("failure")
    assert (failure.get("type"), failure.get("message")) == ("fail", found["message"])

    summary = files["markdown"].read_text()
    assert summary.startswith("# Summary\n\n### marsinfer against dense: fail\n")
    assert "| task | rows | documents | dense | marsinfer | drop | interval | verdict |\n| --- |" in summary
    assert "| fish | 8 | 8 | 1.0000 |" in summary


def test_a_check_without_a_result_leaves_no_report_of_an_earlier_one(check, data, tmp_path):
    files = {name: tmp_path / f"result.{name}" for name in ("out", "junit")}
    reports = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert check(data, *ASK, *BROKEN, *ALONE, "--max-drop", "99pt", *reports) == 0
    assert all(path.exists() for path in files.values())
    assert check(data, *ASK, *BROKEN, "--max-drop", "1pt", *reports) == 6
    assert not any(path.exists() for path in files.values())


def test_an_interval_over_documents_decides_or_says_how_many_would(check, data, tmp_path, capfd):
    junit = tmp_path / "gates.xml"
    flags = [*ASK, *BROKEN, "--baseline", tmp_path / "dense.parquet"]
    assert check(data, *flags, "--max-drop", "40pt", "--out", "-") in (5, 6)
    (gate,) = json.loads(capfd.readouterr().out)["gates"]
    assert gate["low"] < gate["drop"] < gate["high"]
    bound = f"{(gate['drop'] + gate['high']) / 2:.2f}pt"
    assert check(data, *flags, "--max-drop", bound, "--junit", junit) == 6
    line = capfd.readouterr().err.splitlines()[-1]
    told = (
        r"agreement dropped by [\d.]+ points \([\d.-]+ to [\d.]+ at 95%\): 8 rows of 8 documents cannot tell "
    )
    told += rf"whether that is within --max-drop {bound}; about [\d,]+ documents like these would"
    assert re.fullmatch(f"marsinfer: error: {told}", line)
    (failure,) = ElementTree.parse(junit).getroot().iter("failure")
    assert failure.get("type") == "inconclusive"


def test_each_task_can_be_a_gate(check, data, tmp_path, capfd):
    junit = tmp_path / "gates.xml"
    flags = ["--task-column", "kind", "--per-task", *ALONE, "--junit", junit, "--out", "-"]
    assert check(data, *REFERENCES, *BROKEN, "--metric", "nll", "--max-drop", "99%", *flags) == 0
    gates = json.loads(capfd.readouterr().out)["gates"]
    assert [(gate["task"], gate["rows"], gate["decides"]) for gate in gates] == [
        ("even", 4, True),
        ("odd", 4, True),
        ("all", 8, False),
    ]
    cases = ElementTree.parse(junit).getroot().iter("testcase")
    assert [case.get("name") for case in cases] == [f"{task}: nll within 99%" for task in ("even", "odd")]


@pytest.mark.parametrize("flags", [["--per-task"], ["--tasks", "odd"]])
def test_a_task_of_which_no_row_is_left_passes_no_gate(refusal, tmp_path, flags):
    path = tmp_path / "fish.jsonl"
    lost = [{**row, "right": None} if row["kind"] == "odd" else row for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in lost))
    complaint = refusal(path, *REFERENCES, *BROKEN, *ALONE, "--task-column", "kind", *flags)
    assert complaint.startswith(
        ("no row of the task 'odd' can be", "4 of 4 rows cannot be", "--tasks names 'odd'")
    )


def test_a_task_of_which_nothing_was_pruned_passes_no_gate(check, tmp_path, capfd):
    path = tmp_path / "fish.jsonl"
    rows = [{**row, "body": row["body"] if row["kind"] == "odd" else "fish"} for row in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pruned = [*BROKEN, "--set", "window=120", "--max-drop", "99pt"]  # all of the short prompts
    assert check(path, *ASK, *pruned, *ALONE, "--task-column", "kind", "--per-task", "--out", "-") == 6
    gates = {gate["task"]: gate for gate in json.loads(capfd.readouterr().out)["gates"]}
    assert (gates["odd"]["verdict"], gates["even"]["verdict"]) == ("pass", "inconclusive")
    assert gates["even"]["reason"].startswith("nothing was pruned")


def test_answers_are_generated_and_scored(check, data, capfd):
    flags = ["--generate", "--metric", "token-f1", *BROKEN, *ALONE, "--out", "-", "--limit", "3"]
    assert check(data, *REFERENCES, *flags) in (0, 5, 6)
    found = json.loads(capfd.readouterr().out)
    assert all({"dense", "method"} == set(row["answer"]) for row in found["rows"])
    assert set(found["gates"][0]["measures"]) >= {"score", "exact-match", "token-f1", "choice", "nll"}


def test_nll_is_held_against_a_share_of_denses(check, data, capfd):
    flags = ["--metric", "nll", *BROKEN, "--out", "-", "--limit", "3"]
    assert check(data, *REFERENCES, *flags) in (0, 5, 6)
    found = json.loads(capfd.readouterr().out)
    (gate,) = found["gates"]
    assert (found["max_drop"], gate["unit"]) == ("2%", "percent of dense")
    rises = [(row["nll"]["method"] - row["nll"]["dense"]) / row["tokens"] for row in found["rows"]]
    before = [row["nll"]["dense"] / row["tokens"] for row in found["rows"]]
    assert gate["drop"] == pytest.approx(100 * sum(rises) / sum(before))


def test_needles_are_hidden_in_the_data(check, data, capfd):
    rows = [{"id": "a", **json.loads(line)} for line in data.read_text().splitlines()]  # ids nobody asks for
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--suite", "needles", "--needle-kinds", "single,tracking", "--needle-count", "2"]
    assert check(data, *flags, *ALONE, "--needle-lengths", "900", *BROKEN, "--out", "-") in (0, 5, 6)
    found = json.loads(capfd.readouterr().out)
    assert found["metric"] == "found"
    assert [gate["task"] for gate in found["gates"]] == ["needles-single", "needles-tracking", "all"]
    assert found["counts"]["rows"] == 4


def test_suites_of_files_need_no_data(check, tmp_path, capfd):
    rows = [
        {
            "input": "The sky is blue. " * 9,
            "instructions": ["Colour?"],
            "outputs": ["blue"],
            "evaluation": "f1",
        },
        {"input": "long words " * 200, "instructions": ["Why?"], "outputs": ["none"], "evaluation": "f1"},
    ]
    (tmp_path / "made_up.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check("--suite", f"leval:{tmp_path}", *BROKEN, *ALONE, "--out", "-") in (0, 5, 6)
    found = json.loads(capfd.readouterr().out)
    assert [gate["task"] for gate in found["gates"]] == ["made_up"]
    assert found["counts"]["truncated_rows"] == 1
    assert found["counts"]["truncated_tokens"] == sum(row["truncated_tokens"] for row in found["rows"]) > 1000


def test_a_baseline_takes_the_place_of_dense(check, data, tmp_path, capfd):
    baseline = tmp_path / "dense.parquet"
    flags = [*REFERENCES, *BROKEN, *ALONE, "--metric", "nll", "--max-drop", "99%", "--out", "-"]
    flags += ["--baseline", baseline]
    assert check(data, *flags) == 0
    first = json.loads(capfd.readouterr().out)
    written = baseline.stat().st_mtime_ns
    assert check(data, *flags) == 0
    printed = capfd.readouterr()
    assert f"note: dense is taken from {baseline}, of 20" in printed.err
    (again,) = json.loads(printed.out)["gates"]
    assert (again["measures"], again["method"]) == (
        first["gates"][0]["measures"],
        first["gates"][0]["method"],
    )
    assert baseline.stat().st_mtime_ns == written
    assert check(data, *flags, "--limit", "3") == 0  # fewer rows than it has


@pytest.mark.slow
def test_a_baseline_of_something_else_is_refused(check, refusal, data, tmp_path, capfd):
    baseline = tmp_path / "dense.parquet"
    loose = [*BROKEN, *ALONE]
    flags = [*REFERENCES, *loose, "--metric", "nll", "--max-drop", "99%", "--baseline", baseline]
    assert check(data, *flags) == 0
    capfd.readouterr()
    assert refusal(data, *flags, "--system", "Be brief.").startswith(
        f"{baseline} was begun with other settings: template_sha256 was "
    )
    assert refusal(data, *ASK, *loose, "--baseline", baseline) == (
        f'{baseline} was begun with other settings: forced was "references" and is now "dense answers"; '
        "--overwrite-baseline makes it anew"
    )
    changed = [{**row, "right": "none"} if row["doc"] == "row-5" else row for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert refusal(data, *flags) == (
        f"--baseline {baseline} is of other rows: 'row-5' has another text, question or reference there; "
        "--overwrite-baseline makes it anew"
    )
    assert check(data, *flags, "--overwrite-baseline") == 0
    assert check(data, *flags) == 0
    capfd.readouterr()
    baseline.write_text("no Parquet")
    assert refusal(data, *flags) == (
        f"--baseline {baseline} is no baseline of marsinfer check; name another file, which will be made"
    )


def test_rows_that_cannot_be_checked_are_told(check, refusal, tmp_path, capfd):
    path = tmp_path / "some.jsonl"
    lines = [json.dumps(row) for row in ROWS[:3]]
    lines += ["{broken", json.dumps({**ROWS[3], "right": None})]
    path.write_text("\n".join(lines) + "\n")
    assert check(path, *REFERENCES, *BROKEN, *ALONE, "--out", "-") in (0, 5, 6)
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert (found["counts"]["rows"], found["counts"]["left_out"]) == (3, 2)
    assert found["left_out"][1] == f"{path.name} line 5: no reference in column 'right'"
    assert f"note: left out: {path.name} line 5: no reference in column 'right'" in printed.err
    # rows are of one part of the documents, those left out too, and needles make up for none of them
    parts = {
        part: check(path, *REFERENCES, *BROKEN, *ALONE, "--document-shard", part) for part in ("1/2", "2/2")
    }
    assert 2 not in parts.values()
    capfd.readouterr()
    path.write_text("\n".join(lines[2:]) + "\n")
    needles = ["--suite", "needles", "--needle-kinds", "single", "--needle-lengths", "600"]
    assert refusal(path, *REFERENCES, *needles).startswith(
        f"2 of 3 rows cannot be checked: {path.name} line 2"
    )
    assert refusal(path, *REFERENCES).startswith(f"2 of 3 rows cannot be checked: {path.name} line 2")


@pytest.mark.parametrize("differ", ["in white space", "where they are cut"])
def test_texts_of_which_the_model_sees_one_count_as_one_document(check, tmp_path, capfd, differ):
    half = "red fish swim past the reef. " * 40
    texts = [
        f"{half}{n}{half}" if differ == "where they are cut" else f"fish{' ' * n}swim" for n in range(1, 9)
    ]
    rows = [{"doc": f"row-{n}", "body": text, "ask": "how many?"} for n, text in enumerate(texts)]
    data = tmp_path / "fish.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(data, *ASK, *BROKEN, "--max-drop", "40pt") == 6
    told = capfd.readouterr().err
    assert "note: 8 texts count as 1 document: " in told
    assert "error: 1 document cannot show a drop within --max-drop 40pt: 8 documents are needed" in told
