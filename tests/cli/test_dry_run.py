"""`--dry-run` and `--show-prompt`: what a run would do, without weights and without an output."""

from __future__ import annotations

import json
import re
from functools import partial
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from conftest import FISH

from pipeline import run_batch
from pipeline.checkpoints.files import ModelFiles
from pipeline.engines.packing import windows
from pipeline.estimate import Pace, Rates, estimate_by_pace, measure_rates
from pipeline.outputs.lock import lock_output
from pipeline.outputs.mirror import open_journal
from pipeline.pruning.operations import dense_flops
from pipeline.pruning.shape import ModelShape
from pipeline.records import Answer
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.intake import open_rows
from pipeline.setup.new_rows import new_rows
from pipeline.setup.preparation import prepare

SHAPE = ModelShape(layers=4, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=320, context=1024)
ASK = ["--text-column", "body", "--question-column", "ask", "--max-new-tokens", "6"]

DAMAGED_RUN = {"text_column": "body", "question_column": "ask", "max_new_tokens": 6, "method": "dense"}


@pytest.fixture
def no_weights(model_folder, monkeypatch):
    """The tiny model, whose weights nobody can load."""

    def weights(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr(ModelFiles, "weights", weights)
    return model_folder


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Of a device of which all is known."""
    monkeypatch.setattr("pipeline.dryrun.measure_rates", lambda *_: Rates(matrix=1e6, memory=2e6))


@pytest.fixture
def bad_rows(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(row) for row in FISH]
    lines += ["{broken"] * 5 + [json.dumps({"body": "x" * 2000, "ask": "?"})]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_for_which_there_is_no_memory_cannot_be_answered(
    call, no_weights, fish, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("pipeline.engines.memory.free_bytes", lambda device: 1 << 10)
    assert call(fish, tmp_path / "out.parquet", *ASK, "--model", no_weights, "--dry-run") == 3
    printed = capfd.readouterr()
    count = len(FISH)
    assert f"rows: {count}, of which 0 can be answered\n" in printed.out
    assert f"too large for the memory: {count} rows, the first:\n" in printed.out
    assert "shorten the document, or use --dtype bfloat16 or a smaller model\n" in printed.out
    assert f"none of {count} rows can be answered; " in printed.err
    bound = ["--max-errors", str(count - 1)]
    assert call(fish, tmp_path / "out.parquet", *ASK, "--model", no_weights, "--dry-run", *bound) == 4
    assert f"{count} of {count} rows failed (out_of_memory {count})" in capfd.readouterr().err


def test_the_report_of_a_dry_run(call, no_weights, fish, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("pipeline.model.loading.free_memory", lambda device: 8_000_000_000)
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
        "weights take 0.00066 GB of 8 GB free on CPU\n"
        "packs: 2 of up to 400 tokens on cpu, the largest 393\n"
        "keys and values of the largest pack: 0.000409 GB (dense)\n"
        "memory of the largest prefill: 0.00225 GB beside the weights\n"
        "work of a dense prefill: 0.000217 TFLOP\n"
        "time, roughly: 4 min to 9 min of prefill, at 85% to 40% of the 1e-06 TFLOP/s that a matrix product "
        "reaches on this device; up to 5 s of decoding, if every answer has 6 tokens, at 0.002 GB/s; "
        "loading comes on top\n"
    )
    assert printed.err == ""
    assert not out.exists()


def test_a_dry_run_counts_errors_and_shows_the_first_of_each_kind(call, bad_rows, tmp_path, capfd):
    assert call(bad_rows, tmp_path / "out.parquet", *ASK, "--dry-run") == 0
    printed = capfd.readouterr().out
    assert "rows: 9, of which 3 can be answered\n  bad_json: 5\n" in printed
    assert printed.count("is not JSON: ") == 3
    assert "over 1,018 prompt tokens: 1 row (--on-overlong error)\n" in printed


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
    monkeypatch.setattr("pipeline.run.windows", partial(windows, documents=1))
    assert call(fish, tmp_path / "out.parquet", *ASK, "--dry-run", "--json", *flags) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["rows"] == 3
    told = printed.err.splitlines()
    assert len(told) == lines
    for n, line in enumerate(told, start=1):
        assert re.fullmatch(rf"marsinfer: {n}/3 rows read and tokenized, \d+ tokens", line)


def test_progress_of_a_dry_run_in_events(call, fish, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("marsinfer_cli.progress.PLAIN_EVERY_S", 0.0)
    assert call(fish, tmp_path / "out.parquet", *ASK, "--dry-run", "--log-format", "json") == 0
    (event,) = (json.loads(line) for line in capfd.readouterr().err.splitlines())
    assert (event["event"], event["documents"], event["expected_rows"]) == ("progress", 3, 3)


def test_an_output_that_could_not_be_written_is_reported(call, fish, capfd):
    assert call(fish, fish, *ASK, "--dry-run") == 2
    printed, why = capfd.readouterr(), f"{fish} is also an input ({fish}); name another output\n"
    assert printed.out.startswith(f"output: refused: {why}")
    assert printed.err == f"marsinfer: error: {why}"


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


def test_a_dry_run_of_a_resumed_run_counts_what_is_new(call, fish, tmp_path, capfd):
    out, flags = tmp_path / "out.parquet", [*ASK, "--id-column", "doc", "--method", "dense"]
    assert call(fish, out, *flags, "--limit", "2", "--quiet") == 0
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    assert call(fish, out, *flags, "--resume", "--dry-run") == 0
    printed = capfd.readouterr().out
    assert printed.startswith(f"output: {out}, resumed: 2 rows done, 1 new\n")
    assert "\nnew rows: 1, of which 1 can be answered\n" in printed
    assert re.search(r"\ntime, roughly: .* TFLOP/s of 2 rows done before; .* ms a step; loading", printed)
    assert sorted(tmp_path.rglob("*")) == before
    assert call(fish, out, *flags, "--resume", "--dry-run", "--seed", "5") == 2
    refused = (
        f"{out} was begun with other settings: sampling.seed was 0 and is now 5; --overwrite starts over\n"
    )
    printed = capfd.readouterr()
    assert printed.out.startswith(f"output: refused: {refused}")
    assert printed.err == f"marsinfer: error: {refused}"
    assert call(fish, out, *flags, "--overwrite", "--dry-run") == 0
    assert capfd.readouterr().out.startswith(f"output: {out}, which is there and is overwritten\n")
    assert call(fish, out, *flags, "--dry-run") == 2
    assert capfd.readouterr().err == f"marsinfer: error: {out} exists; --overwrite replaces it\n"


def test_a_dry_run_knows_of_an_unfinished_run(call, fish, tmp_path, capfd, model_folder):
    def stop(summary):
        raise KeyboardInterrupt

    out = tmp_path / "out.parquet"
    options = {"text_column": "body", "question_column": "ask", "max_new_tokens": 6, "pack_tokens": 1}
    with pytest.raises(KeyboardInterrupt):
        run_batch(fish, out, model=str(model_folder), progress=stop, **options)
    assert call(fish, out, *ASK, "--dry-run") == 2
    assert "an unfinished run left .out.parquet.journal; " in capfd.readouterr().out
    assert call(fish, out, *ASK, "--dry-run", "--resume", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["done_rows"], report["rows"], report["output_problem"]) == (1, 2, None)


@pytest.mark.parametrize(
    ("flags", "code", "error"),
    [
        (
            ["--fail-on-error"],
            3,
            "6 of 9 rows failed, which --fail-on-error does not allow; bad_json (5 rows): bad.jsonl line ",
        ),
        (
            ["--max-errors", "3"],
            4,
            "the run would stop: 6 of 9 rows failed (bad_json 5, over_long 1), more than ",
        ),
        (["--text-column", "doc", "--question-column", "year"], 3, "none of 9 rows can be answered; bad_"),
    ],
)
def test_a_dry_run_ends_as_the_run_would(call, bad_rows, tmp_path, capfd, flags, code, error):
    assert call(bad_rows, tmp_path / "out.parquet", *ASK, "--dry-run", *flags) == code
    printed = capfd.readouterr()
    assert "can be answered\n" in printed.out
    assert printed.err.startswith(f"marsinfer: error: {error}")
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--retry-errors"], []])
def test_errors_of_earlier_runs_stop_a_dry_run_where_they_stop_the_run(
    call, bad_rows, tmp_path, capfd, flags
):
    """Of rows that are to be run again none counts before, and of others each, though it may leave."""
    assert call(bad_rows, tmp_path / "out.parquet", *ASK) == 0
    good = [line for line in bad_rows.read_text().splitlines() if line.startswith('{"')]
    bad_rows.write_text("\n".join(good[:1]))
    words = [*ASK, "--resume", "--drop-missing", "--max-errors", "3", *flags]
    code = 0 if flags else 4
    assert [call(bad_rows, tmp_path / "out.parquet", *words, *dry) for dry in (["--dry-run"], [])] == [
        code
    ] * 2
    assert ("6 of 9 rows failed in earlier runs" in capfd.readouterr().err) == bool(code)


def test_the_estimate_of_time(call, fish, tmp_path, capfd):
    flags = [*ASK, "--dry-run", "--json", "--method", "dense", "--in-flight", "2"]
    assert call(fish, tmp_path / "out.parquet", *flags) == 0
    report = json.loads(capfd.readouterr().out)
    told, seconds = report["estimate"], report["dense_prefill_tflop"] * 1e12 / 1e6
    assert told["prefill_s_low"] == pytest.approx(seconds / 0.85)
    assert told["prefill_s_high"] == pytest.approx(seconds / 0.4)
    attention, ffn, logits = 2 * 64 * 16 * (4 + 2), 3 * 64 * 96, 64 * 320
    weights = 4 * (attention + ffn) + logits
    # two rows at once are computed slower than their weights are read
    a_step = 2 * weights * 2 / 1e6
    assert told["decode_s_at_most"] == pytest.approx(2 * 6 * a_step)
    assert call(fish, tmp_path / "out.parquet", *flags, "--n", 4, "--temperature", 1) == 0
    several = json.loads(capfd.readouterr().out)
    assert several["estimate"]["prefill_s_low"] == told["prefill_s_low"]
    # answers of one row at once, though two rows of one answer would be
    assert several["estimate"]["decode_s_at_most"] == pytest.approx(3 * 6 * 2 * a_step)


def test_the_pace_of_rows_that_are_done():
    ok = {"status": "ok", "group_rows": None, "prompt_tokens": 100, "flops_ratio": 0.5, "new_tokens": 5}
    ok |= {"prefill_ms": 600.0, "decode_ms": 80.0, "pack_documents": 2}
    rows = [ok, ok | {"prompt_tokens": 50}, ok | {"status": "error"}, ok | {"group_rows": 2}]
    pace = Pace(shape=SHAPE)
    pace.add(pa.Table.from_pylist(rows))
    assert (pace.rows, pace.steps) == (2, 8)
    rate = (dense_flops(SHAPE, 100) + dense_flops(SHAPE, 50)) * 0.5 / 0.6
    packer = SimpleNamespace(in_flight=4, new_tokens=10)
    found = estimate_by_pace(packer, pace, flops=int(3 * rate), answers=9)
    assert found.prefill_s == pytest.approx((3.0, 3.0))
    assert found.decode_s == pytest.approx(3 * 10 * 0.02)
    several = Pace(shape=SHAPE, n=3)  # whose answers take their steps together
    several.add(pa.Table.from_pylist([ok | {"new_tokens": 15}]))
    assert several.steps == 4


def test_the_rates_of_a_device_are_measured():
    found = measure_rates(torch.device("cpu"), torch.float32, SHAPE)
    assert found.matrix > 0
    assert found.memory > 0


def test_a_dry_run_says_that_the_journal_is_damaged_and_leaves_it(call, no_weights, fish, tmp_path, capfd):
    from pipeline.outputs.parts import journal_folder

    out = tmp_path / "out.parquet"
    words = [fish, out, *ASK, "--model", no_weights, "--resume", "--dry-run", "--method", "dense"]
    config = BatchConfig(input=(str(fish),), output=str(out), model=str(no_weights), **DAMAGED_RUN)
    run = prepare(open_rows(config), config.model)
    with open_journal(str(out), run.schema(), run.decides(), resume=True) as journal:
        for record in new_rows(run.rows(), journal):
            journal.append([Answer.begin(record.source, "dense")])
    (part,) = journal_folder(out).glob("part-*")
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    assert call(*words) == 0
    told = "note: the journal is damaged: 1 finished row cannot be read and would be answered again\n"
    assert told in capfd.readouterr().out
    assert part.read_bytes() == content


def test_a_dry_run_foretells_that_another_run_holds_the_output(call, no_weights, fish, tmp_path, capfd):
    out = tmp_path / "out.parquet"
    words = [fish, out, *ASK, "--model", no_weights, "--dry-run", "--resume"]
    with lock_output(out):
        assert call(*words) == 7
        assert "is being written by process" in capfd.readouterr().err
        assert [path.name for path in tmp_path.glob(".*")] == [".out.parquet.lock"]
    assert call(*words) == 0
    assert list(tmp_path.glob(".*")) == []


def test_a_lock_that_a_dead_run_left_is_no_obstacle_to_a_dry_run(call, no_weights, fish, tmp_path):
    (tmp_path / ".out.parquet.lock").write_text('{"pid": 1, "host": "gone", "started": "then"}')
    assert call(fish, tmp_path / "out.parquet", *ASK, "--model", no_weights, "--dry-run") == 0
