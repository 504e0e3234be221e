"""`marsinfer batch --tensor-parallel`: the answers of one process, whatever becomes of the others."""

from __future__ import annotations

import psutil
import pyarrow.parquet as pq
import pytest

from pipeline import run_batch
from pipeline.errors import RankFailed

ASKED = ("--text-column", "body", "--question-column", "ask", "--max-new-tokens", "8")


def rows(path):
    """What does not depend on the time that something took."""
    return [
        {name: value for name, value in row.items() if not name.endswith(("_ms", "_logprob"))}
        for row in pq.read_table(path).to_pylist()
    ]


def test_answers_and_what_rows_say_are_those_of_one_process(call, fish, tmp_path):
    options = ("--lookup", "2", "--temperature", "0.7", "--n", "2", "--logprobs", "--method", "marsinfer")
    settings = ("--set", "start_layer=1", "--set", "eta=0.8", "--set", "window=8", "--set", "prefix=4")
    made = []
    for count in (1, 2):
        output = tmp_path / f"{count}.parquet"
        assert call(fish, output, *ASKED, *options, *settings, "--tensor-parallel", count) == 0
        made.append(rows(output))
    assert made[0] == made[1]
    assert {row["status"] for row in made[1]} == {"ok"}
    assert not other_ranks()


def other_ranks():
    children = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    return [each for each in children if "pipeline.ranks.following" in each.cmdline()]


def kill_others(summary):
    for child in other_ranks():
        child.kill()


def test_rows_run_again_where_another_process_dies_and_are_kept(model_folder, fish, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.engines.restarting.MOST_RESTARTS", 1)
    options = {"model": str(model_folder), "method": "dense", "pack_tokens": 1, "in_flight": 1}
    options |= {"text_column": "body", "question_column": "ask", "max_new_tokens": 8}
    output, notes = tmp_path / "out.parquet", []
    died = "rank 1 of 2 failed: it was killed by SIGKILL"
    with pytest.raises(RankFailed, match=f"^{died}; finished rows are kept, and --resume continues$"):
        run_batch(fish, output, tensor_parallel=2, progress=kill_others, note=notes.append, **options)
    assert any(note.startswith(f"{died}: its processes begin anew, and 1 row at work then") for note in notes)
    assert not other_ranks()
    summary = run_batch(fish, output, resume=True, **options)
    assert summary.documents == 1  # the others were kept
    run_batch(fish, tmp_path / "whole.parquet", **options)
    assert rows(output) == rows(tmp_path / "whole.parquet")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ("--method", "fastkv"),
            "and --method fastkv exclude each other: choose from dense, marsinfer, mars",
        ),
        (("--kv-memory", "1GB"), "and --kv-memory exclude each other"),
        (
            ("--tensor-parallel", "3"),
            "4 heads, 2 key/value heads and 96 columns of the FFN: choose from 1, 2, 4",
        ),
        (
            ("--model", "random:qwen3-30b-a3b"),
            "cannot divide a model with experts yet, such as this qwen3_moe",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_divided_is_refused_by_name(refusal, fish, tmp_path, given, told):
    said = refusal(fish, tmp_path / "out.parquet", *ASKED, "--tensor-parallel", "2", *given)
    assert said.startswith("--tensor-parallel ")
    assert told in said
