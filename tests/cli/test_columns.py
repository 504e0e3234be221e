"""`--columns`: which of an answer's own columns an output has, and what reads outputs without some."""

from __future__ import annotations

import json
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from journal_runs import EXTENSIONS, read

from marsinfer_cli.app import run
from pipeline.outputs.answers import TYPES, lacking_told, own_columns, stored_in
from pipeline.outputs.own_columns import CHOSEN_FROM, INDEXED, OWN_NAMES, STATISTICS, left_out, own_prefix

ASKED = ["--question", "what?", "--max-new-tokens", "2", "--quiet"]
KEYS = ["id", "row", "question_index", "status", "error_type", "row_hash"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["one fish", "two fish", "", "blue fish"]
    lines = [{"id": f"r{n}", "text": text, "answer": n, "stats": "mine"} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def names_in(path):
    return list(read(path)[0])


def report(*words):
    return run(["report", *map(str, words)])


def test_every_name_is_a_column_of_answers():
    assert set(STATISTICS) < set(CHOSEN_FROM) < set(OWN_NAMES) == set(TYPES)
    assert sorted(INDEXED) == sorted(KEYS)
    assert left_out(None, several=True) == {"stats"}
    assert left_out(CHOSEN_FROM, several=True) == set()
    assert left_out(CHOSEN_FROM) == left_out(None) - {"stats"} == {"answers"}


def test_own_columns_are_told_from_copied_ones_of_their_names():
    assert own_prefix(["id", "status", "row_hash", "answer", "stats"]) == ["id", "status", "row_hash"]
    assert own_prefix(["id", "answer", "stats", "row_hash", "row"]) == ["id", "answer", "stats", "row_hash"]


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_the_output_has_what_is_chosen_and_what_resuming_reads(call, rows, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    chosen = [*ASKED, "--columns", "finish_reason,answer"]
    assert call(rows, out, *chosen, "--limit", 2) == 0
    own = [*KEYS[:4], "answer", "finish_reason", *KEYS[4:]]
    assert names_in(out)[: len(own)] == own
    assert call(rows, out, *chosen, "--resume") == 0
    answers = read(out)
    assert [row["id"] for row in answers] == ["r0", "r1", "r2", "r3"]
    assert [row["error_type"] for row in answers] == [None, None, "empty_document", None]
    assert all(row["answer"] is not None for row in answers if row["status"] == "ok")
    before = out.read_bytes()
    assert call(rows, out, *chosen, "--resume") == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(("suffix", "is_resumed"), list(product(EXTENSIONS, (False, True))))
def test_stats_is_one_struct_of_all_statistics(call, rows, tmp_path, suffix, is_resumed):
    out, whole = tmp_path / f"out{suffix}", tmp_path / "whole.parquet"
    if is_resumed:
        assert call(rows, out, *ASKED, "--columns", "stats,answer,ttft_ms", "--limit", 1) == 0
    assert call(rows, out, *ASKED, "--columns", "stats,answer,ttft_ms", "--resume") == 0
    assert call(rows, whole, *ASKED) == 0
    own = [*KEYS[:4], "answer", "error_type", "ttft_ms", "stats", "row_hash"]
    assert names_in(out)[: len(own)] == own
    for one, other in zip(read(out), read(whole), strict=True):
        assert list(one["stats"]) == list(STATISTICS)
        assert one["stats"]["ttft_ms"] == one["ttft_ms"]
        same = ("prompt_tokens", "new_tokens", "kept_tokens", "kv_bytes")
        assert [one["stats"][name] for name in same] == [other[name] for name in same]


def test_an_input_column_of_the_name_of_one_that_is_left_out_gets_the_same_name_as_ever(call, rows, tmp_path):
    names = {}
    for number, columns in enumerate([(), ("--columns", "error_message"), ("--columns", "stats")]):
        out = tmp_path / f"{number}.parquet"
        assert call(rows, out, *ASKED, "--keep-columns", "answer:int,stats", *columns) == 0
        schema = pq.read_schema(out)
        names[number] = schema.names[schema.names.index("row_hash") + 1 :]
    assert names == {
        0: ["answer_input", "stats"],
        1: ["answer_input", "stats"],
        2: ["answer_input", "stats_input"],
    }


def test_names_that_are_none(refusal, rows, tmp_path):
    def refused(columns):
        return refusal(rows, tmp_path / "out.parquet", *ASKED, "--columns", columns)

    assert refused("answer,finish_reson").startswith(
        "--columns 'finish_reson' is no column of answers (did you mean 'finish_reason'?); they are question,"
    )
    assert refused("selection") == "--columns 'selection': --save-selection adds it"
    assert refused("answer,,stats") == "--columns 'answer,,stats': write values with commas between them"
    assert not (tmp_path / "out.parquet").exists()


def test_other_columns_than_it_was_begun_with(call, refusal, rows, tmp_path):
    out = tmp_path / "out.parquet"
    assert call(rows, out, *ASKED, "--columns", "answer,stats") == 0
    remedy = "--columns as it was then goes on, --overwrite starts over"
    for columns, told in (("answer", "'stats' is gone"), ("answer,stats,guard", "'guard' is new")):
        assert (
            refusal(rows, out, *ASKED, "--columns", columns, "--resume")
            == f"{out} was begun with other columns: {told}; {remedy}"
        )
    assert call(rows, out, *ASKED, "--columns", "answer", "--overwrite") == 0
    assert "stats" not in pq.read_schema(out).names[: len(KEYS) + 1]


def test_reasoning_stands_apart_though_nobody_wants_to_see_it(call, rows, tmp_path):
    out = tmp_path / "out.parquet"
    assert call(rows, out, *ASKED, "--columns", "answer") == 0
    settings = json.loads(pq.read_schema(out).metadata[b"marsinfer"])["settings_that_decide"]
    assert "reasoning" in settings["later_columns"]


def test_report_says_what_is_not_there_and_reads_the_struct(call, rows, tmp_path, capfd):
    bare, packed = tmp_path / "bare.parquet", tmp_path / "packed.jsonl"
    assert call(rows, bare, *ASKED, "--columns", "answer") == 0
    assert call(rows, packed, *ASKED, "--columns", "answer,method,stats") == 0
    capfd.readouterr()
    assert report(bare) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("bare holds answers to 3 of 4 rows. ")
    note = next(line for line in lines if line.startswith("bare: "))
    assert note.startswith("bare: the output has no finish_reason, error_message, document_tokens, ")
    assert note.endswith(" (--columns), and nothing is told of it")
    assert report(packed) == 0
    told = capfd.readouterr().out
    assert "\npacked: the output has no finish_reason, error_message, parts, guard (--columns), and " in told
    tokens = sum(row["stats"]["prompt_tokens"] or 0 for row in read(packed))
    assert f" {tokens:,} " in next(line for line in told.splitlines() if "prompt tokens" in line)


def test_answers_that_are_not_there_are_not_said_to_be_the_same(call, rows, tmp_path, capfd):
    whole, bare = tmp_path / "whole.parquet", tmp_path / "bare.parquet"
    assert call(rows, whole, *ASKED) == 0
    assert call(rows, bare, *ASKED, "--columns", "error_message") == 0
    capfd.readouterr()
    assert report(whole, bare) == 0
    told = capfd.readouterr().out
    assert "rows in both" in told
    assert "same answers" not in told
    assert "failed in one" not in told


def test_the_pruning_map_needs_its_columns(call, rows, tmp_path, capfd):
    out = tmp_path / "out.parquet"
    pruned = ["--method", "marsinfer", "--set", "start_layer=1", "--save-selection"]
    assert call(rows, out, *ASKED, *pruned, "--columns", "answer") == 0
    capfd.readouterr()
    assert report(out, "--row", "r0") == 2
    assert capfd.readouterr().err == (
        f"marsinfer: error: {out}: the output has no error_message, method, document_tokens, prompt_tokens, "
        "ttft_ms and 3 more (--columns), which --row shows\n"
    )
    chosen = "answer,error_message,method,stats"
    assert call(rows, out, *ASKED, *pruned, "--columns", chosen, "--overwrite") == 0
    assert report(out, "--row", "r0") == 0


@pytest.mark.parametrize(
    ("columns", "is_known"), [("answer,stats", True), ("answer", False), ("stats,ttft_ms", True)]
)
def test_a_dry_run_goes_by_rows_that_are_done_where_their_times_are_there(
    call, rows, tmp_path, capfd, columns, is_known
):
    out = tmp_path / "out.parquet"
    assert call(rows, out, *ASKED, "--columns", columns, "--limit", 2) == 0
    capfd.readouterr()
    assert call(rows, out, *ASKED, "--columns", columns, "--resume", "--dry-run") == 0
    told = capfd.readouterr().out
    assert ("of 2 rows done before" in told) == is_known
    assert ("how long rows took that are done is not known" in told) == (not is_known)


def test_without_messages_the_kind_of_the_commonest_error_is_told(call, tmp_path, capfd):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text('{"text": ""}\n')
    for _ in range(2):
        assert call(source, out, *ASKED, "--columns", "answer", "--resume") == 3
    assert capfd.readouterr().err.splitlines()[-1] == (
        "marsinfer: error: none of 1 row was answered; empty_document"
    )


def test_columns_of_a_table_be_they_in_the_struct():
    stats = pa.array([dict.fromkeys(STATISTICS) | {"ttft_ms": 1.5}], TYPES["stats"])
    table = pa.table({"id": ["a"], "stats": stats, "row_hash": ["b"], "ttft_ms": ["copied"]})
    assert stored_in(table.schema, ("id", "ttft_ms")) == ["id", "stats"]
    assert stored_in(table.schema, ("id", "answer")) == ["id"]
    held = table.select(stored_in(table.schema, ("id", "ttft_ms", "answer")))
    assert own_columns(held, ("ttft_ms", "answer")).to_pylist() == [{"ttft_ms": 1.5, "answer": None}]
    assert lacking_told(table.column_names, ("id", "ttft_ms")) is None
    assert lacking_told(table.column_names, ("answer",)) == "the output has no answer (--columns)"
