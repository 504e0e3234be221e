"""`--dry-run` and `--show-prompt`: what a run would do, without weights and without an output."""

from __future__ import annotations

import json
from functools import partial

import pytest
from conftest import FISH

from pipeline.model.files import ModelFiles
from pipeline.packing import windows

ASK = ["--text-column", "body", "--question-column", "ask", "--max-new-tokens", "6"]


@pytest.fixture
def no_weights(model_folder, monkeypatch):
    """The tiny model, whose weights nobody can load."""

    def weights(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr(ModelFiles, "weights", weights)
    return model_folder


@pytest.fixture
def bad_rows(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(row) for row in FISH]
    lines += ["{broken"] * 5 + [json.dumps({"body": "x" * 2000, "ask": "?"})]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_report_of_a_dry_run(call, no_weights, fish, tmp_path, capfd):
    out = tmp_path / "out.parquet"
    flags = ["--model", no_weights, "--pack-tokens", "400", "--device", "cpu", "--dry-run"]
    assert call(fish, out, *ASK, *flags) == 0
    printed = capfd.readouterr()
    assert printed.out == (
        f"output: {out}\n"
        "columns passed through:\n"
        "  doc: string\n"
        "  year: int64\n"
        "rows: 3, of which 3 can be answered\n"
        "over 1,018 prompt tokens: 0 rows (--on-overlong error)\n"
        "prompts: 686 tokens, the longest 393\n"
        "                32 to 63          1 ########################################\n"
        "               64 to 127          0\n"
        "              128 to 255          1 ########################################\n"
        "              256 to 511          1 ########################################\n"
        "packs: 2 of up to 400 tokens on cpu, the largest 393\n"
        "keys and values of the largest pack: 0.000409 GB (dense)\n"
        "work of a dense prefill: 0.000217 TFLOP\n"
    )
    assert printed.err == ""
    assert not out.exists()


def test_a_dry_run_counts_errors_and_shows_the_first_of_each_kind(call, bad_rows, tmp_path, capfd):
    assert call(bad_rows, tmp_path / "out.parquet", *ASK, "--dry-run") == 0
    printed = capfd.readouterr().out
    assert "rows: 9, of which 3 can be answered\n  bad_json: 5\n" in printed
    assert printed.count("is not JSON: ") == 3
    assert "over 1,018 prompt tokens: 1 rows (--on-overlong error)\n" in printed


def test_a_dry_run_as_json(call, bad_rows, tmp_path, capfd):
    flags = ["--dry-run", "--json", "--on-overlong", "truncate-middle", "--pack-tokens", "1"]
    assert call(bad_rows, tmp_path / "out.parquet", *ASK, *flags) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["rows"], report["ok"], report["errors"]) == (9, 4, 5)
    assert list(report["error_types"]) == ["bad_json"]
    assert len(report["error_types"]["bad_json"]["first"]) == 3
    assert report["schema"] == {"extra": "large_string"}
    over_long = report["over_long"]
    assert (over_long["rows"], over_long["limit_tokens"]) == (1, 1018)
    assert over_long["truncated_tokens"] > 900
    packing = report["packing"]
    assert (packing["packs"], packing["largest_pack_tokens"]) == (4, 1018)
    assert packing["kv_bytes"] == 4 * (1018 + 6) * 2 * 2 * 16 * 4
    assert sum(bucket["rows"] for bucket in report["prompts"]["histogram"]) == 4
    assert report["dense_prefill_tflop"] > 0


def test_the_plan_is_the_runs(call, fish, tmp_path, capfd):
    out = tmp_path / "out.jsonl"
    flags = [*ASK, "--pack-tokens", "400", "--method", "marsinfer", "--set", "start_layer=1"]
    assert call(fish, out, *flags, "--dry-run", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert call(fish, out, *flags, "--quiet") == 0
    rows = [json.loads(line) for line in out.open()]
    assert report["prompts"]["tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert report["packing"]["largest_pack_tokens"] == max(row["pack_tokens"] for row in rows)
    assert report["packing"]["packs"] == round(sum(1 / row["pack_documents"] for row in rows))


@pytest.mark.parametrize(("flags", "lines"), [([], 3), (["--quiet"], 0)])
def test_a_long_dry_run_shows_progress(call, fish, tmp_path, capfd, monkeypatch, flags, lines):
    monkeypatch.setattr("marsinfer_cli.progress.PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr("pipeline.dryrun.windows", partial(windows, documents=1))
    assert call(fish, tmp_path / "out.parquet", *ASK, "--dry-run", "--json", *flags) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["rows"] == 3
    told = printed.err.splitlines()
    assert len(told) == lines
    assert all(line.startswith(f"marsinfer: {n}/3 documents, ") for n, line in enumerate(told, start=1))


def test_progress_of_a_dry_run_in_events(call, fish, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("marsinfer_cli.progress.PLAIN_EVERY_S", 0.0)
    assert call(fish, tmp_path / "out.parquet", *ASK, "--dry-run", "--log-format", "json") == 0
    (event,) = (json.loads(line) for line in capfd.readouterr().err.splitlines())
    assert (event["event"], event["documents"], event["expected_rows"]) == ("progress", 3, 3)


def test_an_output_that_could_not_be_written_is_reported(call, fish, capfd):
    assert call(fish, fish, *ASK, "--dry-run") == 0
    assert capfd.readouterr().out.startswith(
        f"output: {fish} is also an input ({fish}); name another output\n"
    )


def test_a_dry_run_takes_the_rows_that_were_asked_for(call, fish, tmp_path, capfd):
    flags = ["--dry-run", "--json", "--shard", "1/2", "--sample", "2", "--limit", "1"]
    assert call(fish, tmp_path / "out.parquet", *ASK, *flags) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 1


def test_a_dry_run_of_no_rows(call, tmp_path, capfd):
    path = tmp_path / "in.jsonl"
    path.write_text("")
    assert call(path, tmp_path / "out.parquet", *ASK, "--dry-run") == 0
    assert "rows: 0, of which 0 can be answered\n" in capfd.readouterr().out


MARSINFER = ["--method", "marsinfer", "--set", "start_layer=1"]


def test_a_setting_that_does_not_fit_is_told_at_once(refusal, fish, tmp_path):
    out = tmp_path / "out.parquet"
    expected = "eta has 2 values, and the model has 4 layers: give one value, or one a layer"
    assert refusal(fish, out, *ASK, *MARSINFER, "--dry-run", "--set", "eta=1,1") == expected


def test_a_prompt_is_shown_as_the_model_sees_it(call, no_weights, bad_rows, tmp_path, capfd):
    out = tmp_path / "out.parquet"
    flags = ["--model", no_weights, "--show-prompt", "1", "--limit", "3"]
    assert call(bad_rows, out, *ASK, *flags) == 0
    body, ask = FISH[0]["body"], FISH[0]["ask"]
    prompt = f"<|im_start|>user\n{body}\n\n{ask}<|im_end|>\n<|im_start|>assistant\n"
    tokens = len(prompt) - len("<|im_start|>" * 2 + "<|im_end|>") + 3
    assert capfd.readouterr().out == (
        f"--- row 0, id bad.jsonl:0: {tokens} tokens, document {len(body)}\n{prompt}\n"
    )
    assert not out.exists()


def test_rows_without_a_prompt_are_shown_in_their_place(call, bad_rows, tmp_path, capfd):
    assert call(bad_rows, tmp_path / "o.jsonl", *ASK, "--show-prompt", "9", "--json") == 0
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["row"] for row in shown] == list(range(9))
    assert ["error" in row for row in shown] == [False] * 3 + [True] * 6
    assert "bad.jsonl line 4 is not JSON" in shown[3]["error"]


def test_a_cut_is_counted(call, bad_rows, tmp_path, capfd):
    flags = ["--show-prompt", "4", "--on-overlong", "truncate-right"]
    assert call(bad_rows, tmp_path / "o.jsonl", *ASK, *flags) == 0
    assert "--- row 8, id bad.jsonl:8: 1,018 tokens, document " in capfd.readouterr().out
