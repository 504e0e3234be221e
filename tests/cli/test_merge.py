"""`marsinfer merge`: outputs of shards as one, which goes on as if one run had made it."""

from __future__ import annotations

import json
import shutil
from itertools import product

import pyarrow.parquet as pq
import pytest
from journal_runs import EXTENSIONS, read

from marsinfer_cli.app import run

ASKED = ["--question", "what?", "--max-new-tokens", "2", "--quiet"]
TIMES = {"queue_ms", "tokenize_ms", "prefill_ms", "ttft_ms", "decode_ms", "pack_documents", "pack_tokens"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    texts = [f"fish {n} " * 9 for n in range(7)]
    texts[4] = ""
    lines = [{"id": f"r{n}", "text": text, "year": n} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def shards(call, source, tmp_path):
    def shards(suffix=".parquet", count=3, *flags):
        made = [tmp_path / f"{n}of{count}{suffix}" for n in range(1, count + 1)]
        for number, path in enumerate(made, start=1):
            assert call(source, path, *ASKED, "--shard", f"{number}/{count}", *flags) == 0
        return made

    return shards


@pytest.fixture
def refused(tmp_path, capfd):
    def refused(*words, code=2):
        capfd.readouterr()
        before = sorted(path.name for path in tmp_path.iterdir())
        assert run(["merge", *map(str, words)]) == code
        (line,) = capfd.readouterr().err.splitlines()
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return line.removeprefix("marsinfer: error: ")

    return refused


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize(("suffix", "of"), list(product(EXTENSIONS, [".parquet", ".jsonl"])))
def test_shards_become_what_one_run_writes_and_go_on_as_such(
    call, shards, source, tmp_path, capfd, suffix, of
):
    first, second, third = shards(of, 3, "--keep-columns", "year:int")
    out, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    capfd.readouterr()
    assert run(["merge", str(out), str(third), str(first), str(second)]) == 0
    assert capfd.readouterr().err == f"marsinfer: {out}: 7 rows of 3 outputs\n"
    asked = [*ASKED, "--keep-columns", "year:int"]
    assert call(source, whole, *asked) == 0
    assert without_times(read(out)) == without_times(read(whole))
    before = out.read_bytes()
    assert call(source, out, *asked, "--resume") == 0
    assert "nothing new: every row was done" in capfd.readouterr().err
    assert out.read_bytes() == before
    with source.open("a") as lines:
        lines.write(json.dumps({"id": "new", "text": "one more fish", "year": 7}) + "\n")
    assert call(source, out, *asked, "--resume", "--json") == 0
    assert json.loads(capfd.readouterr().out)["documents"] == 1
    assert [row["id"] for row in read(out)] == [*(f"r{n}" for n in range(7)), "new"]


def test_the_metadata_is_that_of_a_run_without_a_shard(shards, tmp_path):
    made = shards()
    out = tmp_path / "out.parquet"
    assert run(["merge", str(out), *map(str, made)]) == 0
    about = json.loads(pq.read_schema(out).metadata[b"marsinfer"])
    assert about["config"]["shard"] is None
    assert about["config"]["output"] == str(out)
    assert about["merged"] == [str(path) for path in made]
    assert about["files"] == [{"name": "in.jsonl", "rows": 7}]


def test_runs_about_different_rows_need_be_no_shards(call, source, tmp_path):
    first, rest = tmp_path / "first.parquet", tmp_path / "rest.parquet"
    assert call(source, first, *ASKED, "--shard", "1/2") == 0
    assert call(source, rest, *ASKED, "--shard", "2/2") == 0
    both, again = tmp_path / "both.parquet", tmp_path / "again.arrow"
    assert run(["merge", str(both), str(first), str(rest)]) == 0
    assert run(["merge", str(again), str(both)]) == 0
    assert [row["row"] for row in read(again)] == list(range(7))


def test_shards_that_are_missing_or_do_not_belong_together(shards, refused, tmp_path):
    first, second, third, fourth = shards(".parquet", 4)
    out = tmp_path / "out.parquet"
    assert refused(out, first, second, fourth) == "1 shard is missing: 3/4"
    assert refused(out, fourth) == "3 shards are missing: 1/4, 2/4, 3/4"
    copy = shutil.copy(first, tmp_path / "copy.parquet")
    assert refused(out, first, copy, second, third, fourth) == f"{first} and {copy} are both shard 1/4"
    half = shards(".parquet", 2)[1]
    assert refused(out, half, second, third, fourth) == f"{half} is one of 2 shards, and {fourth} one of 4"


def test_shards_of_other_rows(call, shards, refused, source, tmp_path, capfd):
    first, second, out = *shards(".parquet", 2), tmp_path / "out.jsonl"
    limited = ["--shard", "2/2", "--overwrite", "--limit", 2]
    assert call(source, second, *ASKED, *limited) == 0
    assert refused(out, first, second).startswith(
        f"{first} was made without --limit, and {second} with --limit 2"
    )
    assert call(source, second, *ASKED, "--shard", "2/2", "--resume", "--limit", 9) == 0
    assert call(source, second, *ASKED, "--shard", "2/2", "--resume") == 0  # which has nothing new to answer
    assert "nothing new" in capfd.readouterr().err
    assert run(["merge", str(out), str(first), str(second)]) == 0
    with source.open("a") as lines:
        lines.write("".join(json.dumps({"id": id, "text": "one more fish", "year": 7}) + "\n" for id in "ab"))
    assert call(source, second, *ASKED, "--shard", "2/2", "--resume") == 0
    assert refused(out, first, second, "--overwrite") == (
        f"{first} and {second} are shards of different inputs: in.jsonl had 7 rows for the one, and had 9 "
        "rows for the other; run both on the same files, with --resume"
    )
    assert call(source, first, *ASKED, "--shard", "1/2", "--resume") == 0
    assert run(["merge", "--overwrite", str(out), str(first), str(second)]) == 0
    assert [row["row"] for row in read(out)] == list(range(9))


def test_rows_that_overlap(call, refused, source, tmp_path):
    one, two, out = (tmp_path / f"{name}.parquet" for name in ("one", "two", "out"))
    assert call(source, one, *ASKED, "--limit", 2) == 0
    assert call(source, two, *ASKED, "--limit", 3) == 0
    assert refused(out, one, two) == f"the id 'r0' stands both in {one} and in {two}"
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "x", "text": "a fish", "year": 1}) + "\n")
    assert call(other, two, *ASKED, "--overwrite") == 0
    assert refused(out, one, two) == (
        f"row 0 stands both in {one} and in {two}: their rows overlap, or their inputs differ"
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--seed", "1"], "{two} was made with other settings: sampling.seed is, in {one}, 0 and here 1"),
        (["--columns", "answer"], "{two} lacks question, reasoning, finish_reason, error_message, "),
        (["--keep-columns", "year"], "{two} has year, and {one} has not (--keep-columns)"),
        (["--keep-columns", ""], "{two} lacks extra of {one} (--keep-columns)"),
    ],
)
def test_other_settings_or_columns(call, refused, source, tmp_path, flags, told):
    one, two, out = (tmp_path / f"{name}.parquet" for name in ("one", "two", "out"))
    assert call(source, one, *ASKED, "--shard", "1/2") == 0
    assert call(source, two, *ASKED, "--shard", "2/2", *flags) == 0
    assert refused(out, one, two).startswith(told.format(one=one, two=two))


def test_copied_columns_of_other_types(call, refused, source, tmp_path):
    one, two, out = (tmp_path / f"{name}.parquet" for name in ("one", "two", "out"))
    assert call(source, one, *ASKED, "--shard", "1/2", "--keep-columns", "year:int") == 0
    assert call(source, two, *ASKED, "--shard", "2/2", "--keep-columns", "year:string") == 0
    assert refused(out, one, two) == (f"'year' is int64 in {one} and large_string in {two} (--keep-columns)")


def test_a_shard_that_is_not_finished(shards, refused, tmp_path, monkeypatch):
    first, second = shards(".parquet", 2)
    folder = tmp_path / ".2of2.parquet.journal"
    folder.mkdir()
    (folder / "part-0001").write_bytes(b"x")
    told = f"{second} is not finished: a run left {folder.name}, and --resume goes on with it"
    assert refused(tmp_path / "out.parquet", first, second) == told
    second.unlink()
    assert refused(tmp_path / "out.parquet", first, second) == told


def test_what_is_no_output(shards, refused, source, tmp_path):
    first, second = shards(".jsonl", 2)
    out = tmp_path / "out.jsonl"
    gone = tmp_path / "gone.parquet"
    assert refused(out, first, gone) == f"{gone} does not exist"
    assert refused(out, first, source) == (
        f"{source} has no in.jsonl.run.json beside it, which says how it was made"
    )
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(shards()[0]).select(["id", "row"]), other)
    assert refused(out, first, other) == f"{other} is no output of marsinfer batch"
    other.write_bytes(b"PAR1")
    assert refused(out, first, other).startswith(f"{other} cannot be read: ")
    assert "has an extension that is not known" in refused(tmp_path / "out.csv", first, second)
    assert "is not on this machine" in refused("s3://bucket/out.parquet", first, second)
    assert refused(first, first, second) == f"{first} is also an input ({first}); name another output"
    assert refused() == "Missing argument 'OUT'"
    assert refused(out) == "Missing argument 'SHARD...'"


def test_an_output_that_is_there(shards, refused, tmp_path):
    made, out = shards(), tmp_path / "out.parquet"
    words = ["merge", str(out), *map(str, made)]
    assert run(words) == 0
    assert refused(out, *made) == f"{out} exists; --overwrite replaces it"
    assert run([*words, "--overwrite"]) == 0
    assert pq.read_table(out).num_rows == 7
    out.write_text("mine")
    assert refused(out, *made, "--overwrite") == (
        f"{out} exists, and marsinfer did not write it: name another output"
    )


def test_an_unfinished_run_under_the_outputs_name_is_not_forgotten(shards, refused, tmp_path):
    made, out = shards(), tmp_path / "out.parquet"
    folder = tmp_path / ".out.parquet.journal"
    folder.mkdir()
    (folder / "part-0001").write_bytes(b"x")
    assert refused(out, *made) == (
        "an unfinished run left .out.parquet.journal; --resume continues it, --overwrite starts over"
    )
    assert run(["merge", str(out), *map(str, made), "--overwrite"]) == 0
    assert not folder.exists()


@pytest.mark.parametrize("named", [(), ("--id-column", "id")])
def test_ids_that_came_twice_in_other_shards_are_those_of_one_run(call, tmp_path, named):
    source, whole, out = tmp_path / "in.jsonl", tmp_path / "whole.parquet", tmp_path / "out.parquet"
    ids = ["a", "b", "c", "a", "a#3", "b", "c#7", "c"]
    source.write_text("".join(json.dumps({"id": id, "text": f"fish {n}"}) + "\n" for n, id in enumerate(ids)))
    made = [tmp_path / f"{n}.parquet" for n in (1, 2)]
    for number, path in enumerate(made, start=1):
        assert call(source, path, *ASKED, *named, "--shard", f"{number}/2") == 0
    assert run(["merge", str(out), *map(str, made)]) == call(source, whole, *ASKED, *named) == 0
    once, merged = (
        [
            (row["id"], row["row"], row["error_type"], row["row_hash"])
            for row in pq.read_table(path).to_pylist()
        ]
        for path in (whole, out)
    )
    assert merged == once
    twice = "duplicate_id"
    later = [("a", twice), ("a#3", None), ("b", twice), ("c#7", None), ("c", twice)]
    if not named:
        later = [(id, None) for id in ("a#3", "a#3#4", "b#5", "c#7", "c#7#7")]
    assert [(id, kind) for id, _, kind, _ in once[3:]] == later


def test_ids_that_came_twice_within_a_shard_stay_what_they_are(call, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    ids = ["a", "b", "a", "c"]
    source.write_text("".join(json.dumps({"key": id, "text": f"fish {id}"}) + "\n" for id in ids))
    made = [tmp_path / f"{n}.parquet" for n in (1, 2)]
    for number, path in enumerate(made, start=1):
        assert call(source, path, *ASKED, "--id-column", "key", "--shard", f"{number}/2") == 0
    assert run(["merge", str(out), *map(str, made)]) == 0
    rows = pq.read_table(out).to_pylist()
    assert [(row["id"], row["error_type"]) for row in rows] == [
        *(("a", None), ("b", None), ("a", "duplicate_id"), ("c", None))
    ]
    assert call(source, out, *ASKED, "--id-column", "key", "--resume") == 0
    assert pq.read_table(out).num_rows == 4
