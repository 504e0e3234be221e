"""`--on-overlong split`: documents longer than the context, from the command line to the output."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from marsinfer_cli.app import run
from pipeline import run_batch
from pipeline.errors import Interrupted

pytestmark = pytest.mark.slow

CONTEXT, NEW_TOKENS = 512, 40
FAULTY = f"{Path(__file__).parents[1] / 'faults' / 'faulty_method.py'}:Faulty"
ASK = "what colour?"
SENTENCES = "".join(
    f"Fish {n} is {'red' if n % 3 else 'blue'}.{'  ' if n % 7 else chr(10) * 2}" for n in range(300)
)


@pytest.fixture(scope="session")
def short_model(sharp_model_folder, tmp_path_factory):
    """The tiny model with a context of 512 tokens, each a byte."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(sharp_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return folder


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "combine.jinja"
    path.write_text("{{ document }}\n{{ question }}")
    return path


@pytest.fixture
def batch(short_model, template, tmp_path):
    def call(source, *flags, out="out.parquet", policy="split"):
        words = ["--model", short_model, "--question", ASK, "--id-column", "id", "--quiet"]
        words += ["--on-overlong", policy, "--max-new-tokens", NEW_TOKENS]
        if policy == "split":
            words += ["--combine-template", template, "--split-overlap", 30]
        return run(["batch", *map(str, [*words, *flags, source, tmp_path / out])])

    return call


def write(path, texts):
    lines = [json.dumps({"id": f"doc-{n}", "text": text}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_of(tmp_path, name="out.parquet"):
    return pq.read_table(tmp_path / name).to_pylist()


@pytest.fixture
def documents(tmp_path):
    """4,000 tokens and more, one that fits, one paragraph without a space, and one with a gap."""
    gap = "a red fish. " * 30 + "\r\n" * 700 + "a blue fish. " * 30
    return write(tmp_path / "in.jsonl", [SENTENCES[:5000], "one fish", "é" * 1000, gap])


def test_long_documents_are_answered_part_by_part(batch, documents, tmp_path, template):
    assert batch(documents) == 0
    long, short, paragraph, gap = rows_of(tmp_path)
    assert [row["status"] for row in (long, short, paragraph, gap)] == ["ok"] * 4
    assert short["parts"] is None
    texts = [json.loads(line)["text"] for line in documents.open(encoding="utf-8")]
    assert long["document_tokens"] == 5000
    assert max(part["depth"] for part in long["parts"]) >= 2
    assert long["parts"][-1]["answer"] == long["answer"]
    assert [part["depth"] for part in long["parts"]] == sorted(part["depth"] for part in long["parts"])
    for row, text in ((long, texts[0]), (paragraph, texts[2]), (gap, texts[3])):
        parts = [part for part in row["parts"] if part["depth"] == 0]
        assert (parts[0]["start"], parts[-1]["end"]) == (0, len(text))
        sent = [part for part in row["parts"] if part["status"] == "ok"]
        assert all(part["prompt_tokens"] <= CONTEXT - NEW_TOKENS for part in sent)
        assert row["prompt_tokens"] == sum(part["prompt_tokens"] for part in sent)
        assert row["new_tokens"] == sum(part["new_tokens"] for part in sent)
        assert 0 < row["prefill_ms"] <= sum(part["prefill_ms"] for part in sent)
        assert row["ttft_ms"] >= row["parts"][-1]["ttft_ms"]
        assert 0 < row["flops_ratio"] <= 1
    skipped = [part for part in gap["parts"] if part["status"] == "skipped"]
    assert skipped
    assert all(part["answer"] is None and part["prompt_tokens"] is None for part in skipped)
    # what a part answers is what its text answers as a document of its own, and so for combinations
    parts = [part for part in long["parts"] if part["depth"] == 0]
    alone = write(tmp_path / "parts.jsonl", [texts[0][part["start"] : part["end"]] for part in parts])
    assert batch(alone, out="parts.parquet", policy="error") == 0
    assert [row["answer"] for row in rows_of(tmp_path, "parts.parquet")] == [part["answer"] for part in parts]
    first = next(part for part in long["parts"] if part["depth"] == 1)
    said = [(n + 1, parts[n]["answer"].strip()) for n in range(first["start"], first["end"])]
    titled = [f"Part {n}:\n{answer}" for n, answer in said if answer]
    joined = write(tmp_path / "joined.jsonl", ["\n\n".join(titled)])
    assert batch(joined, "--prompt-template", template, out="joined.parquet", policy="error") == 0
    (whole,) = rows_of(tmp_path, "joined.parquet")
    assert (whole["answer"], whole["prompt_tokens"]) == (first["answer"], first["prompt_tokens"])


@pytest.mark.slow
def test_packing_changes_no_answer(batch, documents, tmp_path):
    answers = []
    for n, pack_tokens in enumerate(("1", "2k")):
        assert batch(documents, "--pack-tokens", pack_tokens, out=f"{n}.parquet") == 0
        rows = rows_of(tmp_path, f"{n}.parquet")
        answers.append([(row["answer"], [part["answer"] for part in row["parts"] or []]) for row in rows])
    assert answers[0] == answers[1]


def test_the_template_and_the_overlap_of_our_own(tmp_path, short_model):
    text = SENTENCES[:1000]
    source, out = write(tmp_path / "in.jsonl", [text]), tmp_path / "out.parquet"
    words = ["--model", short_model, "--question", ASK, "--quiet", "--on-overlong", "split"]
    assert run(["batch", *map(str, [*words, "--max-new-tokens", 8, source, out])]) == 0
    (row,) = rows_of(tmp_path)
    parts = [part for part in row["parts"] if part["depth"] == 0]
    assert len(parts) > 2
    assert all(before["end"] - after["start"] == 128 for before, after in pairwise(parts))
    assert row["parts"][-1]["depth"] >= 1
    assert (row["status"], row["answer"]) == ("ok", row["parts"][-1]["answer"])


@pytest.mark.slow
def test_answers_that_do_not_fit_are_an_error_row(batch, tmp_path):
    source = write(tmp_path / "in.jsonl", [SENTENCES[:2000], "one fish"])
    assert batch(source, "--max-new-tokens", 300) == 0
    long, short = rows_of(tmp_path)
    assert (long["status"], long["error_type"], long["answer"]) == ("error", "no_progress", None)
    assert "answers are left to combine, and no two fit into one prompt" in long["error_message"]
    assert all(part["answer"] for part in long["parts"])
    assert short["status"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["out_of_memory", "runtime_error"])
def test_a_part_that_fails(batch, tmp_path, monkeypatch, kind):
    source = write(tmp_path / "in.jsonl", ["a" * 400 + "\n\n" + "b" * 200, "one fish"])
    assert batch(source, "--method", FAULTY) == 0
    whole = rows_of(tmp_path)[0]
    tokens = whole["parts"][1]["prompt_tokens"]
    monkeypatch.setenv("ACCIDENT", json.dumps({"kind": kind, "tokens": tokens}))
    flags = ["--method", FAULTY, "--overwrite"]
    assert batch(source, *flags) == 0
    failed, short = rows_of(tmp_path)
    assert short["status"] == "ok"
    assert (failed["status"], failed["answer"]) == ("error", None)
    assert failed["error_message"].startswith("in.jsonl line 1, part 2 of 2: ")
    assert [part["status"] for part in failed["parts"]] == ["ok", "error"]
    assert failed["parts"][0]["answer"] == whole["parts"][0]["answer"]
    monkeypatch.delenv("ACCIDENT")
    assert batch(source, "--method", FAULTY, "--resume", "--retry-errors") == 0
    assert rows_of(tmp_path)[0]["answer"] == whole["answer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_resume(batch, documents, tmp_path, short_model, template, capfd, name):
    assert batch(documents, "--method", "marsinfer", "--set", "start_layer=1", out=f"whole-{name}") == 0
    options = {
        "model": str(short_model),
        "method": "marsinfer",
        "settings": {"start_layer": 1},
        "question": ASK,
        "id_column": "id",
        "on_overlong": "split",
        "split_overlap": 30,
        "combine_template": str(template),
        "max_new_tokens": NEW_TOKENS,
        "pack_tokens": 1,
    }

    def stop(summary):
        if summary.documents == 2:
            raise Interrupted("enough", 130)

    with pytest.raises(Interrupted):
        run_batch(str(documents), str(tmp_path / name), progress=stop, **options)
    capfd.readouterr()
    assert batch(documents, "--resume", "--split-overlap", 31, out=name) == 2
    assert "was begun with other settings: split.overlap was 30 and is now 31" in capfd.readouterr().err
    template.write_text("{{ document }}\n\n{{ question }}")
    assert batch(documents, "--resume", out=name) == 2
    assert "split.combine_sha256 was" in capfd.readouterr().err
    template.write_text("{{ document }}\n{{ question }}")
    assert batch(documents, "--resume", out=name) == 0
    assert "resuming: 2 rows are done" in capfd.readouterr().err
    resumed, whole = ((tmp_path / each) for each in (name, f"whole-{name}"))
    if name.endswith("parquet"):
        found = [pq.read_table(path).to_pylist() for path in (resumed, whole)]
    else:
        found = [[json.loads(line) for line in path.open()] for path in (resumed, whole)]
    kept = ("id", "answer", "status", "prompt_tokens")
    steps = [
        [[(p["depth"], p["start"], p["answer"]) for p in r["parts"] or []] for r in rows] for rows in found
    ]
    assert [[r[k] for k in kept] for r in found[0]] == [[r[k] for k in kept] for r in found[1]]
    assert steps[0] == steps[1]
    before = resumed.read_bytes()
    assert batch(documents, "--resume", out=name) == 0
    assert "nothing new: every row was done" in capfd.readouterr().err
    assert resumed.read_bytes() == before


@pytest.mark.slow
def test_a_dry_run_counts_the_parts(batch, documents, tmp_path, capfd):
    assert batch(documents, "--dry-run") == 0
    printed = capfd.readouterr().out
    assert batch(documents, "--dry-run", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert batch(documents) == 0
    rows = rows_of(tmp_path)
    counts = [
        sum(part["depth"] == 0 and part["status"] == "ok" for part in row["parts"] or []) for row in rows
    ]
    over_long = report["over_long"]
    assert [row["parts"] for row in over_long["split"]] == [count for count in counts if count]
    assert (over_long["rows"], over_long["split_rows"], over_long["parts"]) == (3, 3, sum(counts))
    assert (report["rows"], report["ok"], report["errors"]) == (4, 4, 0)
    assert sum(bucket["rows"] for bucket in report["prompts"]["histogram"]) == sum(counts) + 1
    assert report["prompts"]["longest"] <= CONTEXT - NEW_TOKENS
    assert (
        f"over 472 prompt tokens: 3 rows (--on-overlong split)\nsplit: 3 rows into {sum(counts)} parts"
        in printed
    )
    assert f"  row 0, id doc-0: 5,000 tokens in {counts[0]} parts\n" in printed


def test_show_prompt_shows_the_parts(batch, documents, capfd):
    assert batch(documents, "--show-prompt", 2) == 0
    shown = capfd.readouterr().out
    assert shown.startswith("--- row 0, id doc-0, part 1 of ")
    assert shown.count("--- row 0") == 2
    assert batch(documents, "--show-prompt", 100, "--json") == 0
    prompts = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [("part" in prompt) for prompt in prompts if prompt["row"] == 1] == [False]
    parts = [prompt["part"] for prompt in prompts if prompt["row"] == 0]
    assert parts == list(range(1, prompts[0]["parts"] + 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split-overlap", "-1"], "--split-overlap -1: must be a whole number of at least 0"),
        (
            ["--combine-template", "gone.jinja"],
            "--combine-template gone.jinja cannot be read: [Errno 2] No such file or directory: 'gone.jinja'",
        ),
        (["--on-overlong", "error"], "--combine-template needs --on-overlong split"),
        (
            ["--system", "Be brief."],
            "the prompt that combines answers (--combine-template): the prompt template must write the system"
            " once and unchanged, but does so 0 times",
        ),
    ],
)
def test_settings_that_cannot_work(batch, documents, capfd, flags, message):
    assert batch(documents, *flags) == 2
    assert capfd.readouterr().err == f"marsinfer: error: {message}\n"


def test_an_overlap_that_is_too_long_is_an_error_row(batch, tmp_path):
    source = write(tmp_path / "in.jsonl", [SENTENCES[:1000]])
    assert batch(source, "--split-overlap", 300) == 3
    (row,) = rows_of(tmp_path)
    assert row["error_type"] == "over_long"
    assert row["error_message"].startswith("in.jsonl line 1: --split-overlap 300 is more than half of the ")


def test_the_last_answer_alone_has_the_form(batch, tmp_path):
    """Also where all parts but one are white space, so that there is nothing to combine."""
    source = write(tmp_path / "in.jsonl", [SENTENCES[:2000], "a red fish. " * 3 + "\n" * 2000, "one fish"])
    assert batch(source, "--choices", "red,blue", "--logprobs") == 0
    long, gap, short = rows_of(tmp_path)
    for row in (long, gap, short):
        assert row["status"] == "ok"
        assert row["answer"] in ("red", "blue")
        assert len(row["choice_logprobs"]) == 2
    assert short["parts"] is None
    for row in (long, gap):
        *before, last = [part for part in row["parts"] if part["status"] == "ok"]
        assert (last["answer"], last["depth"] > 0) == (row["answer"], True)
        assert all(part["new_tokens"] == NEW_TOKENS for part in before)
    assert [part["depth"] for part in gap["parts"] if part["status"] == "ok"] == [0, 1]
    assert batch(source, out="free.parquet") == 0
    free = rows_of(tmp_path, "free.parquet")
    assert [part["depth"] for part in free[1]["parts"] if part["status"] == "ok"] == [0]
    firsts = [
        [part["answer"] for part in row["parts"] if part["depth"] == 0]
        for row in (long, gap, free[0], free[1])
    ]
    assert firsts[:2] == firsts[2:]


def test_an_answer_of_parts_that_is_not_valid_is_drawn_again_whole(batch, tmp_path):
    source, schema = write(tmp_path / "in.jsonl", [SENTENCES[:2000], "one fish"]), tmp_path / "s.json"
    schema.write_text('{"type": "object"}')
    assert batch(source, "--validate", schema) == 0
    assert batch(source, "--validate", schema, "--retries", "1", out="again.parquet") == 0
    once, again = rows_of(tmp_path), rows_of(tmp_path, "again.parquet")
    assert [(row["valid"], row["tries"]) for row in (*once, *again)] == [(False, 1)] * 2 + [(False, 2)] * 2
    assert [row["answer"] for row in again] != [row["answer"] for row in once]
    before, now = ([part for part in rows[0]["parts"] if part["depth"] == 0] for rows in (once, again))
    assert len(now) > 2
    assert [part["start"] for part in now] == [part["start"] for part in before]
    assert all(part["answer"] != other["answer"] for part, other in zip(now, before, strict=True))
