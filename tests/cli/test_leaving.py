"""What a night with less, or damaged, input does to an output: rows stay, or leave and can come back."""

from __future__ import annotations

import errno
import gzip
import json
import os
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web_server import served

from marsinfer_cli.app import run

FLAGS = ["--question", "what?", "--max-new-tokens", "1", "--method", "dense", "--quiet", "--json"]


@pytest.fixture
def batch(model_folder, tmp_path, monkeypatch, capfd):
    """Run it; the exit code, the summary, and what is said."""
    monkeypatch.chdir(tmp_path)

    def call(*words, source="in"):
        capfd.readouterr()
        code = run(["batch", "--model", str(model_folder), *FLAGS, *words, source, "o.parquet"])
        printed = capfd.readouterr()
        return code, json.loads(printed.out or "{}"), printed.err

    return call


def lines(numbers):
    return "".join(json.dumps({"id": f"doc-{n}", "text": f"fish {n}"}) + "\n" for n in numbers)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines(range(4)))
    (folder / "b.jsonl").write_text(lines(range(4, 8)))
    return folder


def answers():
    return {row["id"]: row["answer"] for row in pq.read_table("o.parquet").to_pylist()}


def test_rows_that_are_not_selected_stay(batch, folder):
    assert batch()[0] == 0
    before = answers()
    assert len(before) == 8
    for flags in (["--limit", "2"], ["--shard", "2/2"], ["--sample", "3"]):
        code, summary, _ = batch("--resume", *flags)
        assert (code, summary["documents"], summary["left_rows"], answers()) == (0, 0, 0, before)
        assert summary["in_output"]["ok"] == 8
    (folder / "a.jsonl").write_text(lines(range(9, 13)))
    assert batch("--resume", "--limit", "2")[1]["documents"] == 2
    assert len(answers()) == 10


@pytest.mark.parametrize("how", ["missing", "empty", "blank"])
def test_a_file_less_changes_nothing_unasked_and_then_nothing_that_cannot_come_back(batch, folder, how):
    batch()
    before, file = answers(), folder / "b.jsonl"
    content = file.read_text()
    file.unlink() if how == "missing" else file.write_text("\n\n" if how == "blank" else "")
    for flags in ([], ["--dry-run"]):
        code, _, told = batch("--resume", *flags)
        assert (code, answers()) == (2, before)
        named = "b.jsonl" if how == "missing" else "b.jsonl (empty)"
        assert f"1 file is missing or empty: {named}; the output stays as it is" in told
    report = batch("--resume", "--drop-missing", "--dry-run")[1]
    assert (report["left_rows"], report["done_rows"]) == (4, 4)
    code, summary, told = batch("--resume", "--drop-missing")
    assert (code, summary["left_rows"], len(answers())) == (0, 4, 4)
    assert (
        "4 rows are no longer in the input and left the output; they come back from .o.parquet.dropped"
        in told
    )
    assert batch("--resume")[0] == 0  # what is gone is missed once
    file.write_text(content)
    code, summary, told = batch("--resume")
    assert (code, summary["documents"], summary["returned_rows"]) == (0, 0, 4)
    assert answers() == before
    assert not Path(".o.parquet.dropped.parquet").exists()


def test_an_input_that_has_none_of_the_rows_is_refused(batch, folder):
    batch()
    before = answers()
    (folder / "a.jsonl").write_text(lines(range(20, 22)))
    (folder / "b.jsonl").write_text(lines(range(22, 24)))
    for _ in range(2):  # what the first of them answered is kept, and does not count
        code, _, told = batch("--resume")
        assert (code, answers()) == (2, before)
        assert "the input has none of the 8 rows of earlier runs" in told
    assert batch("--resume", "--dry-run")[0] == 2
    code, summary, _ = batch("--resume", "--drop-missing")
    assert (code, summary["documents"], summary["left_rows"], len(answers())) == (0, 0, 8, 4)


@pytest.mark.parametrize("text", ["with ids", "without"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_answers_behind_damage_stay_as_they_are(batch, tmp_path, name, text):
    rows = [{"text": f"fish {n} " + str(n * 7919 % 1009) * 9} for n in range(24)]
    rows = [{"id": f"doc-{n}", **row} for n, row in enumerate(rows)] if text == "with ids" else rows
    path = tmp_path / name
    if name == "d.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8, compression="zstd")
        start = pq.read_metadata(path).row_group(1).column(len(rows[0]) - 1).data_page_offset
        whole = path.read_bytes()
        damaged = (
            whole[:start] + bytes(byte ^ 0xA5 for byte in whole[start : start + 40]) + whole[start + 40 :]
        )
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        whole = gzip.compress(content) if name.endswith("gz") else content
        path.write_bytes(whole)
        damaged = whole[: len(whole) // 3]
    assert batch(source=name)[0] == 0
    before = answers()
    path.write_bytes(damaged)
    for again in range(2):
        code, summary, told = batch("--resume", "--fail-on-error", source=name)
        assert (code, summary["documents"]) == (3, 1 - again)
        why = "all of them in earlier runs: --resume --retry-errors runs them again" if again else ""
        line = f"marsinfer: error: 1 of 25 rows failed, which --fail-on-error does not allow; {why}"
        assert told.splitlines()[-1].startswith(line)
        assert summary["in_output"] == {"ok": 24, "error": 1, "skipped": 0}
        assert {id: answer for id, answer in answers().items() if answer is not None} == before
    path.write_bytes(whole)
    code, summary, _ = batch("--resume", source=name)
    assert (code, summary["documents"], summary["left_rows"], answers()) == (0, 0, 0, before)


def test_a_file_out_of_reach_ends_the_run_after_all_others(batch, folder, monkeypatch):
    real = Path.open

    def out_of_reach(self, *mode, **named):
        if self.name == "a.jsonl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(self, *mode, **named)

    for rows in (4, 0):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", out_of_reach)
            code, _, told = batch("--resume")
        assert (code, Path("o.parquet").exists()) == (8, False)
        assert told.splitlines()[-1] == (
            "marsinfer: error: in/a.jsonl cannot be read: Permission denied; all other rows were answered; "
            "finished rows are kept, and --resume continues once it can be read"
        )
        assert ("4 rows are done" in told) == (rows == 0)
    code, summary, _ = batch("--resume")
    assert (code, summary["documents"], len(answers())) == (0, 4, 8)
    assert list(answers()) == [f"doc-{n}" for n in range(8)]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", out_of_reach)
        assert batch("--resume")[0] == batch("--resume", "--dry-run")[0] == 8
    assert len(answers()) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_server_that_fails_midway_is_out_of_reach(batch, folder, monkeypatch, name):
    """As it is for a server that fails from the beginning: exit code 8, nothing published, nothing lost."""
    monkeypatch.setattr("pipeline.storage.remote_files.BLOCK_BYTES", 200)
    rows = [{"id": f"web-{n}", "text": f"fish {n} " * 20} for n in range(8)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name == "a.parquet":
        sink = BytesIO()
        pq.write_table(
            pa.Table.from_pylist(rows), sink, row_group_size=2, compression="none", use_dictionary=False
        )
        content = sink.getvalue()
    with served({f"/{name}": content}) as (url, broken):
        for until in (len(content) // 4, 0):
            broken.append(until)
            code, _, told = batch("--resume", f"{url}/{name}")
            assert (code, Path("o.parquet").exists()) == (8, False)
            assert f"{url}/{name} cannot be read: " in told.splitlines()[-1]
            assert "all other rows were answered" in told
        broken.clear()
        code, summary, _ = batch("--resume", f"{url}/{name}")
        assert (code, len(answers())) == (0, 16)
        assert 0 < summary["documents"] <= 8


@pytest.mark.parametrize(("bound", "code"), [("2", 4), ("10%", 4), ("3", 0), ("50%", 0)])
def test_the_same_command_twice_ends_alike(batch, tmp_path, bound, code):
    (tmp_path / "in.jsonl").write_text("{\n" * 3 + lines(range(19)))
    command = ["--resume", "--fail-on-error", "--max-errors", bound]
    codes = [batch(*command, source="in.jsonl") for _ in range(2)]
    assert [code for code, *_ in codes] == [code or 3] * 2
    if code:
        assert "--retry-errors runs these again, and a higher --max-errors goes on" in codes[1][2]
        assert batch(*command, "--dry-run", source="in.jsonl")[0] == 4
        assert batch(*command[:-1], "90%", source="in.jsonl")[0] == 3
        (tmp_path / "in.jsonl").write_text(lines(range(22)))
        assert batch(*command, "--retry-errors", source="in.jsonl")[0] == 0
        assert batch(*command, source="in.jsonl")[0] == 0


@pytest.mark.parametrize("left_out", [["--limit", "2"], ["--shard", "1/8"], ["--sample", "1"]])
def test_errors_that_are_not_tried_again_count_before_the_output_is_written(batch, tmp_path, left_out):
    (tmp_path / "in.jsonl").write_text("{\n" * 4 + lines(range(4)))
    assert batch(source="in.jsonl")[0] == 0
    before = Path("o.parquet").read_bytes()
    again = ["--resume", "--retry-errors", *left_out, "--max-errors"]
    for dry in (["--dry-run"], []):
        code, _, told = batch(*again, "2", *dry, source="in.jsonl")
        assert (code, Path("o.parquet").read_bytes()) == (4, before)
        assert "earlier runs " in told.splitlines()[-1]
        assert ", of rows that were not read again), more than --max-errors 2 allows" in told.splitlines()[-1]
        remedy = "--resume --retry-errors without --limit, --sample or --shard, or with a higher --max-errors"
        assert dry or told.endswith(f"{remedy}\n")
    code, summary, _ = batch(*again, "4", source="in.jsonl")
    assert (code, summary["in_output"]) == (0, {"ok": 4, "error": 4, "skipped": 0})
    (tmp_path / "in.jsonl").write_text(lines(range(9, 13)) + lines(range(4)))
    assert batch("--resume", "--retry-errors", "--max-errors", "2", source="in.jsonl")[0] == 0


def test_rows_with_the_id_of_another_stop_no_run_that_tries_nothing_again(batch, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"body": "a b", "id": {n % 4}}}\n' for n in range(8)))
    assert batch("--id-column", "id", source="in.jsonl")[1]["in_output"]["error"] == 4
    again = ["--id-column", "id", "--resume", "--limit", "4", "--max-errors", "3"]
    assert batch(*again, "--dry-run", source="in.jsonl")[0] == 0
    assert batch(*again, source="in.jsonl")[0] == 0


def test_drop_missing_is_about_an_earlier_run(batch, folder):
    assert batch("--drop-missing")[2].endswith(
        "--drop-missing needs --resume: it is about rows of an earlier run\n"
    )


def test_a_file_that_is_gone_is_no_loss_where_its_rows_stand_in_another(batch, folder):
    assert batch()[0] == 0
    before = answers()
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    with (folder / "c.jsonl").open("a") as file:
        file.write(lines([8]))
    code, summary, _ = batch("--resume")
    assert (code, summary["documents"]) == (0, 1)
    assert answers().items() > before.items()
